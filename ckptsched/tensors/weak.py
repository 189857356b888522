"""Weak references to tensors, which in torch 2.9 ask for more than others do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

# There a tensor's Python object may belong to the data, and is gone with it, whoever holds it.
_own: Callable[[Any], object] | None = getattr(Tensor, "_fix_weakref", None)


def referent(reference: weakref.ref[Tensor]) -> Tensor | None:
    """What a weak reference refers to, as safe to hold as any tensor; None if it is gone."""
    tensor = reference()
    if tensor is not None and _own is not None:
        _own(tensor)
    return tensor
