"""What training keeps besides a step: parameters, buffers, optimizer state, on how many devices.

The arithmetic of sharding is that of ZeRO (Rajbhandari et al., 2020): optimizer state, gradients
and parameters are parted between devices, in this order. What is parted is gathered unit by unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from ...base.errors import WorkloadError
from ...workload.chain import Chain
from ...workload.stage import Stage

SHARDS = ("none", "optimizer", "grads", "full")
_BLOCK = 256  # values that share a scale in 8-bit optimizers (bitsandbytes)
_SMALL = 4096  # tensors of fewer values are kept in 32 bits there


def _eight_bit(count: int, width: int) -> int:
    """One moment of one tensor in 8 bits, with a scale of float32 a block."""
    return 4 * count if count < _SMALL else count + 4 * math.ceil(count / _BLOCK)


# Bytes of state of a tensor, by its number of values and the bytes of one.
_STATES: Mapping[str, Callable[[int, int], int]] = {
    "none": lambda count, width: 0,
    "sgd": lambda count, width: 0,
    "sgd-momentum": lambda count, width: count * width,
    "adagrad": lambda count, width: count * width,
    "rmsprop": lambda count, width: count * width,
    # A number of steps of float32 is kept for each tensor, on the CPU by default.
    "adam": lambda count, width: 2 * count * width,
    "adamw": lambda count, width: 2 * count * width,
    "adamw8bit": lambda count, width: 2 * _eight_bit(count, width),
}
OPTIMIZERS = tuple(_STATES)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How training is parted between devices."""

    devices: int = 1
    """How many there are."""
    shard: str = "none"
    """What is parted: "none", "optimizer", "grads" (those, too) or "full" (parameters, too)."""

    def __post_init__(self) -> None:
        """Refuse what is not known by a WorkloadError."""
        whole = isinstance(self.devices, int) and not isinstance(self.devices, bool)
        if not whole or self.devices < 1:
            raise WorkloadError(f"{self.devices!r} devices: give a whole number of 1 or more")
        if self.shard not in SHARDS:
            raise WorkloadError(f"shard={self.shard!r} is not known; give one of {_or(SHARDS)}")
        if self.shard != "none" and self.devices == 1:
            raise WorkloadError(
                f"shard={self.shard!r} parts between devices, and there is one; give devices=2 or "
                "more"
            )

    def parts(self, kind: str) -> int:
        """Among how many devices a kind of bytes is parted.

        Args:
            kind: "optimizer", "grads" or "full" (parameters).
        """
        return self.devices if SHARDS.index(self.shard) >= SHARDS.index(kind) else 1


def kept_bytes(
    model: nn.Module, dtype: torch.dtype | None, optimizer: str, master: bool, sharing: Sharing
) -> dict[str, int]:
    """What lies on one device before a step, by kind, without the batch.

    Args:
        model: The model; it may lie on the meta device.
        dtype: Of all that is of floating point; None for what it is.
        optimizer: One of `OPTIMIZERS`.
        master: Whether the optimizer keeps parameters in float32 besides, and its state so.
        sharing: How that is parted.

    Raises:
        WorkloadError: The optimizer is not known.
    """
    if optimizer not in _STATES:
        raise WorkloadError(
            f"what the optimizer {optimizer!r} keeps is not known; give one of {_or(OPTIMIZERS)}"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    state = _STATES[optimizer]
    moments = sum(state(p.numel(), 4 if master else _width(p, dtype)) for p in trained)
    masters = 4 * sum(p.numel() for p in trained) if master else 0
    found = {
        "parameters": _share(_sizes(model.parameters(), dtype), sharing.parts("full")),
        "buffers": _sizes(model.buffers(), dtype),
        "optimizer state": _share(moments, sharing.parts("optimizer")),
    }
    if master:
        found["master weights"] = _share(masters, sharing.parts("optimizer"))
    if sharing.devices > 1 and sharing.parts("grads") == 1:
        # DistributedDataParallel's own copies, unless gradient_as_bucket_view=True.
        found["gradient buckets"] = _sizes(trained, dtype)
    if sharing.parts("grads") > 1:
        found["gathered units"] = _gathered(model, dtype, full=sharing.parts("full") > 1)
    return found


def _gathered(model: nn.Module, dtype: torch.dtype | None, *, full: bool) -> int:
    """What is whole at a time: gradients of a unit; with full sharding parameters, too.

    FSDP gathers the next unit while one is at work, and keeps its root gathered; blocks in
    lists are taken to be its units.
    """
    blocks = list(_units(model))
    sizes = [_sizes(block.parameters(), dtype) for block in blocks]
    inside = {id(p) for block in blocks for p in block.parameters()}
    root = _sizes((p for p in model.parameters() if id(p) not in inside), dtype)
    largest = sorted(sizes, reverse=True)[:2]
    gradients = max([*largest, root])
    return gradients + (root + sum(largest) if full else 0)


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from child.children()
        else:
            yield from _units(child)


def sharded(chain: Chain, sharing: Sharing) -> Chain:
    """A chain whose gradients of parameters are parted once their stage is done.

    While the stage goes back they are whole: its backward takes what is given away after it.
    """
    parts = sharing.parts("grads")
    if parts == 1:
        return chain
    known = {id(stage): _sharded(stage, parts) for stage in chain.stages}
    return replace(chain, stages=tuple(known[id(stage)] for stage in chain.stages))


def _sharded(stage: Stage, parts: int) -> Stage:
    size = _share(stage.parameter_gradient_bytes, parts)
    given = stage.parameter_gradient_bytes - size
    tapes = [
        replace(tape, backward_overhead_bytes=tape.backward_overhead_bytes + given)
        for tape in stage.other_tapes
    ]
    return replace(
        stage,
        parameter_gradient_bytes=size,
        backward_overhead_bytes=stage.backward_overhead_bytes + given,
        other_tapes=tuple(tapes),
    )


def _share(size: int, parts: int) -> int:
    return -(-size // parts)


def _width(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return dtype.itemsize if dtype and tensor.is_floating_point() else tensor.element_size()


def _sizes(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> int:
    return sum(tensor.numel() * _width(tensor, dtype) for tensor in tensors)


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
