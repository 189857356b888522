"""Norms of the error of a step: one figure of all entries, for states that are tuples, too."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..function.fingerprint import fingerprint
from ..function.tuple_state import Shapes, split

Norm = Callable[[Tensor], Tensor]
"""The size of a tensor of errors, each in units of its tolerance; without dimensions."""


def rms_norm(errors: Tensor) -> Tensor:
    """The root of the mean square over all entries; 0 of none."""
    if not errors.numel():
        return errors.new_zeros((), dtype=errors.dtype.to_real())
    return errors.abs().square().mean().sqrt()


def batch_max_norm(errors: Tensor) -> Tensor:
    """The largest root of the mean square of any entry of the batch, the first dimension.

    With it every sample keeps the tolerance; under `rms_norm` a batch of easy ones hides one that
    is hard.
    """
    if not errors.numel():
        return errors.new_zeros((), dtype=errors.dtype.to_real())
    if errors.dim() < 2:
        return errors.abs().max()
    return errors.abs().square().flatten(1).mean(1).sqrt().max()


@final
@dataclass(frozen=True, slots=True)
class _NormOfParts:
    """The norm of flat errors of a tuple; as torchdiffeq's, the largest of its parts' norms."""

    shapes: tuple[torch.Size, ...]
    norm: Callable[[Any], Tensor] | None

    def __call__(self, errors: Tensor) -> Tensor:
        parts = split(errors, self.shapes)
        if self.norm is not None:
            return self.norm(parts)
        return torch.stack([rms_norm(part) for part in parts]).max()


def norm_of_parts(norm: Callable[[Any], Tensor] | None, shapes: Shapes) -> Norm:
    """The norm of flat errors, from one of errors shaped as the state is; None is `rms_norm`."""
    return (norm or rms_norm) if shapes is None else _NormOfParts(shapes, norm)


def identity_of_norm(norm: Norm) -> Hashable:
    """A key of a norm from `norm_of_parts`, the same where it is made anew for each solve."""
    if isinstance(norm, _NormOfParts):
        return norm.shapes, None if norm.norm is None else identity_of_norm(norm.norm)
    return fingerprint(norm) or object()  # without a key it is equal to nothing
