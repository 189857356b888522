"""Whether a stage that runs again gives what it gave: checksums of outputs, bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from .errors import ExecutionError
from .tensor_types import all_parts


@final
class Checksums:
    """The outputs of the stages of one step as they were first, 16 bytes each."""

    def __init__(self) -> None:
        self._first: dict[int, bytes] = {}

    def see(self, i: int, name: str, output: Iterable[Tensor]) -> None:
        """Note the output of a stage's first run, and compare that of every later one.

        Args:
            i: The stage, counted from 1.
            name: Its name, for the message.
            output: The tensors that it returned.

        Raises:
            ExecutionError: It returned something else before.
        """
        found = checksum(output)
        if self._first.setdefault(i, found) != found:
            raise ExecutionError(
                f"stage {name!r} gave another result when it ran again on the same input: it has a "
                "state of its own, depends on something that changed since (a number, a mode, a "
                "generator that is not torch's default), or its kernels differ from run to run "
                "(torch.use_deterministic_algorithms(True) helps) or with and without gradients; "
                "let it depend on its input, parameters and buffers only, or plan with "
                "solver='store_all', which runs nothing again"
            )


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
