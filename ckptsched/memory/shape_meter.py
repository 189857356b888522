"""The meter of tensors that have shapes and no data: counts what operators make, and when it dies.

What an operator takes for itself while it runs is not seen: on the meta device nothing runs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .meters import Meter, Window


@final
class ShapeMeter(Meter):
    """The meta device: bytes of the storages that operators make inside a window.

    It counts operators of the calling thread, in which autograd goes back, too, where nothing
    lies on an accelerator.
    """

    name: ClassVar[str] = "shapes"

    @contextlib.contextmanager
    def window(self) -> Iterator[Window]:  # noqa: D102 - inherited
        births = _Births()
        readings: list[tuple[int, int]] = []
        window = Window(lambda: readings.append(births.read()))
        with births:
            yield window
            window.mark()
        births.close()
        window._finish(readings)


@final
class _Births(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By identity in C++; the weak references call back when a storage is gone.
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._live = self._peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have torch not import its compiler for this mode, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in _tensors((made,)):
            storage = tensor.untyped_storage()
            if storage._cdata in self._alive:
                continue
            if given is None:
                given = {
                    t.untyped_storage()._cdata for t in _tensors((*args, *(kwargs or {}).values()))
                }
            if storage._cdata not in given:  # else it is a view of what was there before
                self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive[key] = size, weakref.ref(storage, lambda _: self._remove(key))
        self._live += size
        self._peak = max(self._peak, self._live)

    def _remove(self, key: int) -> None:
        size, _ = self._alive.pop(key, (0, None))
        self._live -= size

    def read(self) -> tuple[int, int]:
        """The bytes now, and the most since the last call."""
        found = self._live, self._peak
        self._peak = self._live
        return found

    def close(self) -> None:
        """Forget all: what is still there is counted no more."""
        self._alive.clear()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The dense tensors among the arguments of an operator, or what it gave."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
