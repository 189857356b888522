"""Tensors that are no plain ones: wrappers of others, other layouts, those without data.

A wrapper has no storage of its own, and asking for one may end the process. One that says what it
wraps (`__tensor_flatten__`) is counted, and told apart, by that. What cannot be counted is refused
by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
_DISPATCH = Tensor.__torch_dispatch__


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that hold a tensor's data: what it wraps, or itself."""
    if type(tensor) in _PLAIN or not _flattens(tensor):
        return (tensor,)
    return tuple(part for inner in _inner(tensor).values() for part in dense_parts(inner))


def all_parts(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The dense tensors that hold the data of several."""
    for tensor in tensors:
        if type(tensor) in _PLAIN:
            yield tensor
        else:
            yield from dense_parts(tensor)


def rebuilt(tensor: Tensor, parts: Iterator[Tensor]) -> Tensor:
    """A tensor of the same type around other parts; as many are taken as `dense_parts` gave."""
    if type(tensor) in _PLAIN:
        return next(parts)
    if not _flattens(tensor):
        made = next(parts).as_subclass(type(tensor))
        made.__dict__.update(vars(tensor))
        return made
    kind: Any = type(tensor)
    names, context = kind.__tensor_flatten__(tensor)
    inner = {name: getattr(tensor, name) for name in names}
    inner |= {name: rebuilt(part, parts) for name, part in _inner(tensor).items()}
    made = kind.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return made  # type: ignore[no-any-return]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of torch's own type and holds its numbers as they are."""
    return type(tensor) in _PLAIN and not (tensor.is_conj() or tensor.is_neg())


def type_name(tensor: Tensor) -> str:
    """Name of the type of a tensor that is not plain, such as "DTensor"; empty for plain ones."""
    return "" if type(tensor) in _PLAIN else type(tensor).__name__


def is_subclass(tensor: Tensor) -> bool:
    """Whether it is of a type that adds to torch's own, and lies in a storage as those do."""
    kind = type(tensor)
    return kind not in _PLAIN and kind.__torch_dispatch__ is _DISPATCH


def lost_attributes(tensor: Tensor) -> str:
    """Names of attributes of a tensor of another type that a copy without its graph has not."""
    if not is_subclass(tensor):
        return ""
    return ", ".join(sorted(vars(tensor).keys() - vars(tensor.detach()).keys()))


def cannot_be_followed(tensor: Tensor, *, without_data: bool = False) -> str:
    """Why the bytes of a tensor cannot be counted, or a run from it not be repeated.

    Such as "has layout torch.sparse_coo; ..."; empty where nothing stands in the way. Its storage
    is not touched; on the meta device it may be if `without_data`.
    """
    if _of_transform(tensor):
        return "belongs to a transform of torch.func; call this outside of it"
    if tensor.is_nested:
        return (
            "is a nested tensor, whose shape is another for each batch; let stages pass on its "
            "values() and offsets(), or a padded one"
        )
    kind = type(tensor)
    if kind not in _PLAIN and kind.__torch_dispatch__ is not _DISPATCH:
        return _cannot_unwrap(tensor, without_data=without_data)
    if tensor.layout is not torch.strided:
        return (
            f"has layout {tensor.layout}, which has no one storage; give a dense one (to_dense())"
        )
    if tensor.is_meta and not without_data:
        return "lies on the meta device, so it holds no data; give a real one, or pass fake=True"
    lost = "" if isinstance(tensor, nn.Parameter) else lost_attributes(tensor)
    if lost:
        return (
            f"is a {kind.__name__} with attributes that detach() loses ({lost}), and so would a "
            "stage that runs again; let its __torch_function__ keep them"
        )
    return ""


def _cannot_unwrap(tensor: Tensor, *, without_data: bool) -> str:
    name = type(tensor).__name__
    if not _flattens(tensor):
        return (
            f"is a {name}, which wraps other tensors or runs operations of its own, and does not "
            "say what it holds; give a plain tensor, or give its type __tensor_flatten__ and "
            "__tensor_unflatten__"
        )
    for key, part in _inner(tensor).items():
        reason = cannot_be_followed(part, without_data=without_data)
        if reason:
            return f"is a {name} whose {key} {reason}"
    return ""


def _flattens(tensor: Tensor) -> bool:
    kind: Any = type(tensor)
    return hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")


def _inner(tensor: Any) -> dict[str, Tensor]:
    """The tensors that it wraps; it may name other objects besides, such as a mesh of devices."""
    names, _ = tensor.__tensor_flatten__()
    parts = ((name, getattr(tensor, name)) for name in names)
    return {name: part for name, part in parts if isinstance(part, Tensor)}


def _of_transform(tensor: Tensor) -> bool:
    """Whether it is a wrapper of torch.func; False where torch does not tell."""
    functorch: Any = getattr(torch._C, "_functorch", None)
    wrapped = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return wrapped is not None and bool(wrapped(tensor))
