"""Functions of torch that do something else than compute a tensor from tensors."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .calls import tensors_of

READS = frozenset(
    getattr(Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__"),
        *("__complex__", "__repr__", "__format__", "data_ptr", "storage", "untyped_storage"),
        *("__dlpack__", "__reduce_ex__", "__deepcopy__", "is_nonzero", "__contains__"),
    )
    if hasattr(Tensor, name)
)
"""They read values, some without an operator, and give something that is no tensor."""

ASKED = frozenset(
    getattr(Tensor, name)
    for name in (
        *("item", "tolist", "is_nonzero", "__contains__"),
        *("__bool__", "__int__", "__float__", "__index__"),
    )
) | {torch.is_nonzero, torch.equal, torch.allclose, Tensor.equal, Tensor.allclose}
"""They give numbers, which a guard can ask for again."""

SIZES = frozenset(
    (
        *(Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__, torch.numel),
        Tensor.shape.__get__,  # type: ignore[attr-defined]
    )
)
"""They tell the sizes of a tensor, which hang on data where an operator has made them so."""

EFFECTS = frozenset(
    (
        *(Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook),
        Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    )
)
"""They do something to a tensor and give none."""

GOES_BACK = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))
"""They go back through a graph."""

GRADIENT: Any = vars(torch._C.TensorBase)["grad"].__get__
"""It reads the gradient of a tensor."""

GRAPHS = frozenset((vars(torch._C.TensorBase)["grad_fn"].__get__,))
"""They give nodes of autograd's graph, of which nothing is seen."""

_MASKS = (torch.bool, torch.uint8)
_MOST_NUMBERS = 64  # that one guard compares


def sets_something(function: Any) -> bool:
    """Whether it sets a property of a tensor, such as `.data`, that is not among the effects."""
    return getattr(function, "__name__", "") == "__set__" and function not in EFFECTS


def makes_sizes_of_data(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether the sizes of what an operator gives hang on values.

    Args:
        operator: One that is said to give sizes of data.
        args: What it is given; indices make sizes of data if a mask is among them.
    """
    if operator is not torch.ops.aten.index.Tensor:
        return True
    return any(index is not None and index.dtype in _MASKS for index in args[1])


def can_be_asked(found: Any) -> bool:
    """Whether a guard can compare what a function gave."""
    if isinstance(found, list | tuple):
        return len(found) <= _MOST_NUMBERS and all(map(can_be_asked, found))
    return isinstance(found, bool | int | float | complex)


def may_hide_tensors(argument: Any) -> bool:
    """Whether a custom autograd Function may find tensors in an argument that is none."""
    return isinstance(argument, nn.Module) or inspect.isroutine(argument)


def closes_over_tensors(argument: Any) -> bool:
    """Whether an argument is a function that holds tensors or modules besides its arguments."""
    if not inspect.isfunction(argument):
        return False
    for cell in argument.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if isinstance(held, nn.Module) or tensors_of(held):
            return True
    return False
