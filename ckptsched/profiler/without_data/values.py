"""Values that are known though tensors hold no data: what follows from sizes and from the inputs.

A model may decide by positions, masks and lengths. These follow from constants and from inputs of
whole numbers, not from weights: while this is at work they are computed beside the meta device, as
long as they are small, and a model that asks for them is answered.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...recompute.stateful_buffers import note_move

aten = torch.ops.aten
_MOST_VALUES = 1 << 20  # of a tensor whose values are computed along
# What these make does not hang on the values that they are given.
_BY_SHAPE_ALONE = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}
_ASKS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
# Of these those write to the statistics that they are given which are told to train, or always do.
_NORMALISES = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
_TRAINS = "_batch_norm_with_update"
_STATISTICS, _TRAINING = slice(3, 5), 5  # where these lie among the arguments
_EMPTY = ("aten::empty", "aten::new_empty")  # whose values are whatever was there


@final
class KnownValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes small values along, where nothing that they hang on is unknown."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have torch not import its compiler for this mode, which takes seconds."""
        return False

    def know(self, tensor: Tensor, value: Tensor) -> None:
        """Say what a tensor without data would hold.

        Args:
            tensor: It lies on the meta device.
            value: As large, with data; nothing is noted where it is too large to compute with.
        """
        if tensor.is_meta and tensor.numel() <= _MOST_VALUES:
            key = id(tensor)
            gone = weakref.ref(tensor, lambda _: self._known.pop(key, None))
            self._known[key] = gone, value

    def value(self, tensor: Tensor) -> Tensor | None:
        """What a tensor would hold; None where it is not known."""
        if not tensor.is_meta:
            return tensor if tensor.numel() <= _MOST_VALUES else None
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _note_statistics(func, args)
        if func in _BY_SHAPE_ALONE:
            made = func(*args, **kwargs)
            self._know_filled(made, _BY_SHAPE_ALONE[func])
            return made
        given = list(_tensors((args, kwargs)))
        values = [self.value(tensor) for tensor in given]
        unknown = any(value is None for value in values) or self._is_drawn(func)
        if func is aten.index.Tensor and unknown:
            args = self._places(*args)
        if unknown:
            made = func(*args, **kwargs)
            if func._schema.is_mutable:
                self._forget(func, args, kwargs)
            return made
        return self._along(func, args, kwargs)

    def _is_drawn(self, func: Any) -> bool:
        return torch.Tag.nondeterministic_seeded in func.tags or func._schema.name in _EMPTY

    def _along(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator whose values are all known, with data as well."""
        if not any(tensor.is_meta for tensor in _tensors((args, kwargs))) and not _on_meta(kwargs):
            return func(*args, **kwargs)  # all of it has data
        asks = func in _ASKS or _hangs_on_values(func) or _leaves_meta(kwargs)
        if not asks:
            made = func(*args, **kwargs)
            if any(tensor.numel() > _MOST_VALUES for tensor in _tensors((made,))):
                return made
        with torch.no_grad():
            real = func(*self._real(args), **self._real(_on_cpu(kwargs)))
        if asks:
            return real if func in _ASKS or _leaves_meta(kwargs) else self._without_data(real)
        for tensor, value in zip(_tensors((made,)), _tensors((real,)), strict=True):
            self.know(tensor, value)
        return made

    def _real(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.value(value)
        if isinstance(value, list | tuple):
            return type(value)([self._real(part) for part in value])
        if isinstance(value, dict):
            return {key: self._real(part) for key, part in value.items()}
        return value

    def _without_data(self, value: Any) -> Any:
        """Results with data as results without; what they hold is known."""
        if isinstance(value, Tensor):
            made = torch.empty_like(value, device="meta")
            self.know(made, value)
            return made
        if isinstance(value, list | tuple):
            return type(value)([self._without_data(part) for part in value])
        return value

    def _places(self, x: Tensor, indices: Any) -> Any:
        """The arguments of indexing, masks whose values are known as the places that they name."""
        found: list[Any] = []
        for index in indices:
            value = None if index is None else self.value(index)
            if value is None or value.dtype not in (torch.bool, torch.uint8):
                found.append(index)
            else:
                found.extend(self._without_data(place) for place in value.nonzero().unbind(1))
        return x, found

    def _know_filled(self, made: Tensor, number: int) -> None:
        if made.is_meta and made.numel() <= _MOST_VALUES:
            shape, dtype = made.shape, made.dtype
            self.know(made, torch.full(shape, number, dtype=dtype, device="cpu"))

    def _forget(self, func: Any, args: Any, kwargs: Any) -> None:
        """What an operator writes to is known no more, nor is anything that lies there."""
        if not self._known:
            return
        written = set[int]()
        for k, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[k] if k < len(args) else kwargs.get(argument.name)
                written |= {t.untyped_storage()._cdata for t in _tensors((value,))}
        for key, (reference, _) in list(self._known.items()):
            tensor = reference()
            if tensor is None or tensor.untyped_storage()._cdata in written:
                self._known.pop(key, None)


def _note_statistics(func: Any, args: Any) -> None:
    name = func._schema.name.removeprefix("aten::")
    if name == _TRAINS or (name in _NORMALISES and args[_TRAINING]):
        for buffer in _tensors(args[_STATISTICS]):
            note_move(buffer)


def _hangs_on_values(func: Any) -> bool:
    """Whether the shape of what an operator gives, or what it tells, hangs on values."""
    tags = func.tags
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def _on_meta(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _leaves_meta(kwargs: dict[str, Any]) -> bool:
    """Whether something is to be copied to a device with data."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != "meta"


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("cpu")} if _on_meta(kwargs) else kwargs


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operator, or what it gave."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
