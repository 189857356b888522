"""Whether tensors hold the same values, to the last bit or as far as kernels may differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .wrapper_tensors import dense_parts


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one structure are equal bit by bit; NaN equals NaN."""
    return all(
        torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
        for a, b in zip(dense_parts(one), dense_parts(other), strict=True)
    )


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two results of one computation are equal as far as its kernels give the same.

    On the CPU equal means equal; CUDA kernels may add up in another order. Tensors without data
    always agree.
    """
    tolerance = 0.0 if one.device.type == "cpu" else tolerance_of(one.dtype)
    pairs = zip(dense_parts(one), dense_parts(other), strict=True)
    return all(
        a.is_meta or torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
        for a, b in pairs
    )


def tolerance_of(dtype: torch.dtype) -> float:
    """How far two results may be apart where additions come in another order, relative or absolute.

    At least four of the last bits, as bfloat16 has few; 0 for what is not rounded.
    """
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    last_bit = torch.finfo(dtype).eps
    return max(4 * last_bit, min(1e-3, 3 * math.sqrt(last_bit)))
