"""Measures what a lean tape of a stage takes, and sees that its gradients are the same bits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...base.errors import ExecutionError
from ...memory.meters import Meter
from ...torch_state.foreign_generators import foreign_generators
from ...torch_state.replay_context import RandomState
from ...torch_state.saved_hooks import hooks_now
from ...workload.stage import StageLedger
from ..stage_kind import StageKind
from .stage_memory import weigh

# What a lean tape must save to be worth a choice: a part of the own tape's bytes.
_LEAST_SAVED = 1 / 16


def weigh_leanly(
    kind: StageKind, own: StageLedger, meter: Meter, *, always: bool = False
) -> StageLedger | None:
    """Measure a stage with a lean tape.

    Args:
        kind: The stage, weighed with its own tape.
        own: Its ledger.
        meter: What counts bytes.
        always: Whether a tape counts that saves little: for a schedule that was made with it.

    Returns:
        None where the stage offers no such tape, where it saves little, where hooks of the
        caller pack what is saved, or where its gradients are not those of the own tape to the bit.
    """
    leanly = kind.leanly()
    if leanly is None or hooks_now() is not None or (own.tape_bytes == 0 and not always):
        return None
    try:
        if not _same_gradients(kind, leanly):
            return None
        found = weigh(leanly, meter)
        kind.made_again = leanly.call.made_again
    except (ExecutionError, RuntimeError):  # torch.func, for one, allows no hooks
        return None
    if found.tape_bytes > (1 - _LEAST_SAVED) * own.tape_bytes and not always:
        return None
    # A run without tape is the same.
    return replace(found, forward_peak_bytes=own.forward_peak_bytes)


def _same_gradients(kind: StageKind, leanly: StageKind) -> bool:
    foreign = foreign_generators(kind.call.module.modules())
    random = RandomState.take(kind.x.leaves[0].device, foreign)
    found: list[list[Tensor | None]] = []
    try:
        for way in (kind, leanly):
            random.restore()
            way.set_gradients(first=True)
            way.begin()
            tape, output = way.record(way.x)
            sent = way.go_back(tape)
            found.append([*output.leaves, *sent, *[alias.grad for alias in way.aliases]])
    finally:  # also where a stage allows no hooks: what is weighed next finds neither
        random.restore()
        kind.clear_gradients()
    return all(
        (a is None and b is None) or (a is not None and b is not None and _same_bits(a, b))
        for a, b in zip(*found, strict=True)
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    )
