"""Checks that a stage that runs again returns the same output, by checksums or a few bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from ctypes import string_at
from typing import final

import torch
from torch import Tensor

from ..base.errors import ExecutionError
from ..tensors.wrapper_tensors import all_parts

_GLANCE = 32  # bytes at each place
_STRIDED = torch.strided


@final
class SeenOutputs:
    """First outputs of the stages of one step, as checksums to compare with later runs."""

    def __init__(self, *, whole: bool) -> None:
        """Begin with nothing seen.

        Args:
            whole: Whether to compare all of each output, by a checksum of 16 bytes a stage. Else a
                few bytes of it, which costs next to nothing: what changes a stage from outside,
                such as a flag of another library, nearly always changes all of its output.
        """
        self._whole = whole
        self._first: dict[tuple[int, int], object] = {}

    def see(
        self,
        i: int,
        name: Callable[[int], str],
        given: Sequence[Tensor],
        output: Sequence[Tensor],
    ) -> None:
        """Note the output of a stage's first run, and compare that of every later one.

        Of outputs that are compared by a few bytes only those of one size are, and of each what the
        stage was not given itself: a state carries tensors past many stages.

        Args:
            i: The stage, counted from 1.
            name: Tells its name, for the message.
            given: The tensors that it was given.
            output: The tensors that it returned.

        Raises:
            ExecutionError: It returned something else before.
        """
        size, found = (0, checksum(output)) if self._whole else glance(output, given)
        if self._first.setdefault((i, size), found) != found:
            raise ExecutionError(
                f"stage {name(i)!r} gave another result when it ran again on the same input: it "
                "has a state of its own, depends on something that changed since (a number, a "
                "mode, a generator that is not torch's default), or its kernels differ from run to "
                "run (torch.use_deterministic_algorithms(True) helps) or with and without "
                "gradients; let it depend on its input, parameters and buffers only, give what a "
                "library keeps for itself by checkpointed(..., context_fn=), or plan with "
                "solver='store_all', which runs nothing again"
            )


def glance(tensors: Iterable[Tensor], given: Iterable[Tensor] = ()) -> tuple[int, int]:
    """How many bytes there are, and a number that depends on a few of them.

    They are read at the start, in the middle and at the end of each tensor.

    Args:
        tensors: Those that are not dense tensors on the CPU are passed over, and of those with gaps
            in their memory only the first element is read.
        given: Tensors that were there before: what begins where one of them does is passed over.
    """
    seen, total = [], 0
    passed_on = {tensor.data_ptr() for tensor in given if _is_dense(tensor)}
    for tensor in tensors:
        if not _is_dense(tensor):
            continue
        start, size = tensor.data_ptr(), tensor.nbytes
        if not start or not size or start in passed_on:
            continue
        total += size
        if not tensor.is_contiguous():
            size = tensor.element_size()
        if size <= _GLANCE:
            seen.append(string_at(start, size))
            continue
        half = size // 2
        seen.append(string_at(start, _GLANCE))
        seen.append(string_at(start + half, min(size - half, _GLANCE)))
        seen.append(string_at(start + size - _GLANCE, _GLANCE))
    return total, hash(tuple(seen))


def _is_dense(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_cpu and tensor.layout is _STRIDED


def checksum(tensors: Iterable[Tensor]) -> bytes:
    """A digest of shapes, dtypes and values, bit by bit.

    Reads tensors in the order of their memory where that has no gaps, and copies them if it has.

    Args:
        tensors: Dense tensors; those on another device are copied to the CPU one by one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in all_parts(tensors):
        strides = tensor.stride()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} {strides}".encode())
        order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
        straight = tensor.detach().permute(order).resolve_conj().resolve_neg().contiguous()
        if straight.numel():
            digest.update(straight.reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.digest()
