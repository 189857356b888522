"""Copies of a model's tensors, each made just before something writes to it, and a sum of the rest.

A copy of a whole model takes as many bytes as the model. A forward pass writes to little of it, if
to anything, and torch says of every operator which tensors it writes to. What goes by torch's back,
through numpy or a pointer, is copied when that is asked for; what goes by both is found by the sums
of bits, and said: it cannot be put back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..tensors.pytree import State
from ..tensors.wrapper_tensors import all_parts, cannot_be_followed

Keep: TypeAlias = Callable[[Tensor], None]

# They change running statistics, which what torch says of them does not tell.
_WRITE_UNSAID = ("batch_norm", "instance_norm")
# Storages are asked for everywhere to tell tensors apart, and hardly ever to write to them.
_HAND_OUT = frozenset({"numpy", "__array__", "data_ptr", "__dlpack__"})
_WORD = 8  # bytes that are added up at once


def storage_of(tensor: Tensor) -> int | None:
    """Identity of the storage of a tensor; None for one that has none, or several."""
    parts = [*all_parts([tensor])] if not cannot_be_followed(tensor, without_data=True) else []
    return parts[0].untyped_storage()._cdata if len(parts) == 1 else None


@torch.no_grad()
def sum_of_bits(tensor: Tensor) -> int:
    """A number that is another, as good as always, once the storage of a tensor is written to.

    Args:
        tensor: One with a storage, and data in it.
    """
    storage = tensor.untyped_storage()
    words, rest = divmod(storage.nbytes(), _WORD)
    whole = torch.empty(0, dtype=torch.int64, device=tensor.device)
    total = int(whole.set_(storage, 0, (words,), (1,)).sum())
    if rest:
        last = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        total += int(last.set_(storage, words * _WORD, (rest,), (1,)).sum())
    return total


@contextmanager
def told_of_writes(homes: Container[int | None], keep: Keep) -> Iterator[None]:
    """Call a function with tensors that are about to be written to in a `with` block.

    Args:
        homes: Storages, by identity; other tensors are passed by.
        keep: The function. It is called where no mode looks on, in a thread of its own.
    """
    with _Operators(homes, keep), _Functions(homes, keep):
        yield


def _told(homes: Container[int | None], keep: Keep, values: Iterable[Any]) -> None:
    given = State.of(tuple(values), opaque=True).leaves
    # A thread takes as long as many operators: most of what is written to is none of the model's.
    tensors = [tensor for tensor in given if storage_of(tensor) in homes]
    if not tensors:
        return

    def tell() -> None:
        for tensor in tensors:
            keep(tensor)

    # Modes are the thread's: what looks on where the model runs sees none of it.
    thread = threading.Thread(target=tell, name="ckptsched copies before a write")
    thread.start()
    thread.join()


@final
class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of operators that write to what they are given."""

    def __init__(self, homes: Container[int | None], keep: Keep) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._homes, self._keep = homes, keep
        self._writes: dict[Any, bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have torch not import its compiler for this mode, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes = self._writes.get(func)
        if writes is None:
            said = getattr(getattr(func, "_schema", None), "is_mutable", True)
            unsaid = any(part in str(func) for part in _WRITE_UNSAID)
            writes = self._writes[func] = said or unsaid
        if writes:
            _told(self._homes, self._keep, (args, kwargs))
        return func(*args, **kwargs)


@final
class _Functions(TorchFunctionMode):
    """Tells of functions that hand out memory, for others to write to."""

    def __init__(self, homes: Container[int | None], keep: Keep) -> None:
        super().__init__()
        self._homes, self._keep = homes, keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _HAND_OUT:
            _told(self._homes, self._keep, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))
