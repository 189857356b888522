"""What a run of a stage does, operator by operator: equal for runs that take the same bytes."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...tensors.wrapper_tensors import is_plain

_SIMPLE = (type(None), bool, int, complex, str, torch.dtype, torch.device, torch.layout)


@final
class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator with its numbers, and with the layouts of what it takes and makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Hashable] = []
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have torch not import its compiler for this mode, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = self._told(args), self._told(tuple((kwargs or {}).items()))
        made = func(*args, **(kwargs or {}))
        self.seen.append((func, taken, self._told(made)))
        return made

    def _told(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, list | tuple):
            return tuple([self._told(part) for part in value])
        if isinstance(value, float):
            return value.hex()
        if isinstance(value, _SIMPLE):
            return type(value), value
        return type(value), repr(value)

    def _tensor(self, tensor: Tensor) -> Hashable:
        known = self._numbers.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        self._count += 1
        self._numbers[id(tensor)] = weakref.ref(tensor), self._count
        if not is_plain(tensor) or tensor.layout is not torch.strided:
            return self._count, type(tensor), repr(tensor.layout)
        place = tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes()
        return self._count, tensor.dtype, tensor.device, tuple(tensor.shape), *place
