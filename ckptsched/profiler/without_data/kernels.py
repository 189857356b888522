"""Which kernels a device has for operators whose tapes hang on that.

On the meta device PyTorch takes compound operators apart by its plainest rules: attention keeps
its whole matrix there, and no real device would. While this is at work, the meta device runs the
operators that autograd sees on the device that is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
# The flash kernels of CUDA take these dtypes alone, no mask, and heads up to this width.
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_WIDTH = 256


def _flash(query: Tensor, key: Tensor, value: Tensor, p: float, causal: bool, **rest: Any) -> Any:
    """Attention that keeps its output and a number a row; CUDA's flash kernel keeps as much."""
    found = aten._scaled_dot_product_flash_attention_for_cpu
    return found(query, key, value, p, causal, **rest)[0]


def _heads_repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once for each head of the query, as kernels want that know no groups."""
    times = query.shape[-3] // key.shape[-3]
    if times == 1:
        return key, value
    return key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)


def _attention_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    rest = {"scale": scale}
    wants_mask = attn_mask is not None and attn_mask.requires_grad
    same = query.shape[-1] == key.shape[-1] == value.shape[-1]
    if dropout_p or wants_mask or query.dim() != 4 or not same:
        if enable_gqa:
            key, value = _heads_repeated(query, key, value)
        plain = aten._scaled_dot_product_attention_math
        return plain(query, key, value, attn_mask, dropout_p, is_causal, **rest)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _as_numbers(attn_mask, query)
    if attn_mask is not None and attn_mask.dim() < 2:
        attn_mask = attn_mask.expand(1, 1)
    return _flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, **rest)


def _attention_on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    same = query.shape[-1] == key.shape[-1] == value.shape[-1]
    rest = {"scale": scale}
    if query.dim() != 4 or query.dtype == torch.float64:
        if enable_gqa:
            key, value = _heads_repeated(query, key, value)
        plain = aten._scaled_dot_product_attention_math
        return plain(query, key, value, attn_mask, dropout_p, is_causal, **rest)[0]
    narrow = query.shape[-1] <= _FLASH_WIDTH
    if attn_mask is None and query.dtype in _FLASH_DTYPES and narrow and same:
        # A mask of dropout is not kept, but the state it was drawn with: a few bytes.
        return _flash(query, key, value, 0.0, is_causal, **rest)
    key, value = _heads_repeated(query, key, value)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = _as_numbers(attn_mask, query)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    keeps_sums = torch.is_grad_enabled()
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, keeps_sums, dropout_p, is_causal, **rest)[0]


def _as_numbers(mask: Tensor, query: Tensor) -> Tensor:
    """A mask of truth values as PyTorch hands it to a kernel: 0 and minus infinity."""
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))


def _dropout_on_cuda(x: Tensor, p: float, train: bool) -> Any:
    """The fused kernel, which keeps a mask of one byte a value."""
    if not train or not 0 < p < 1:
        return aten.mul(x, 0.0) if train and p == 1 else x
    return aten.native_dropout(x, p, True)[0]


_KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "cpu": {"scaled_dot_product_attention": _attention_on_cpu},
    "cuda": {
        "scaled_dot_product_attention": _attention_on_cuda,
        "dropout": _dropout_on_cuda,
    },
}


@contextmanager
def kernels_of(device_type: str) -> Iterator[None]:
    """Have the meta device use the operators that another device uses.

    They are registered for the process while this is at work, for meta tensors alone.

    Args:
        device_type: "cpu" or "cuda"; others are taken to do as CUDA.
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, kernel in _KERNELS["cpu" if device_type == "cpu" else "cuda"].items():
        library.impl(name, kernel, "AutogradMeta")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        # What is registered goes with the library; torch has had this method since 2.0.
        getattr(library, "_destroy", lambda: None)()
        del library
