"""What a chain's ledger says, in arrays, as the pass over a schedule takes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..schedule.language import Code, Schedule
from ..workload.chain import Chain
from ..workload.stage import Block, StageLedger
from .exact_bytes_kernel import Ledgers, Replays, Stages
from .liveness import Liveness, Segment

Integers = npt.NDArray[np.int64]
_T = TypeVar("_T")


def ledgers_of(chain: Chain) -> Ledgers:
    """The different ledgers of a chain; equal stages share an object.

    Those of a stage with its other tapes come after that with its own.

    Args:
        chain: A chain whose stages all have a ledger.
    """
    seen: dict[tuple[tuple[int, ...], int], int] = {}
    found: list[tuple[StageLedger, int]] = []
    of, width = [0], _inputs(chain)
    widths: list[int] = []
    for stage in chain.stages:
        ledgers = stage.ledgers
        number = seen.setdefault((tuple(map(id, ledgers)), width), len(found))
        if number == len(found):
            found += [(ledger, width) for ledger in ledgers]
            widths += [len(_outputs(ledger, width)) for ledger in ledgers]
        of.append(number)
        width = widths[number]
    first_output, outputs = _flat([_outputs(*each) for each in found])
    first_saved, saved = _flat([_saved(*each) for each in found])
    first_peak, peak = _flat([_peaks(ledger) for ledger, _ in found])
    pairs = np.array(outputs, dtype=np.int64).reshape(-1, 2)
    each = [ledger for ledger, _ in found]
    return Ledgers(
        of=np.array(of, dtype=np.int64),
        forward=np.array([x.forward_peak_bytes for x in each], dtype=np.int64),
        taped=np.array([x.taped_peak_bytes for x in each], dtype=np.int64),
        tape=np.array([x.tape_bytes for x in each], dtype=np.int64),
        inputs=np.array([inputs for _, inputs in found], dtype=np.int64),
        first_output=first_output,
        size=pairs[:, 0].copy(),
        source=pairs[:, 1].copy(),
        first_saved=first_saved,
        saved=np.array(saved, dtype=np.int64),
        has_parts=np.array([x.parts is not None for x in each]),
        first_peak=first_peak,
        peak=np.array(peak, dtype=np.int64),
    )


def storages_of(ledgers: Ledgers, schedule: Schedule) -> tuple[int, int]:
    """How many storages all runs of a schedule make, and how many a state has at the most."""
    outputs = np.diff(ledgers.first_output)
    owner = np.repeat(np.arange(len(outputs)), outputs)
    made = np.bincount(owner[ledgers.source < 0], minlength=len(outputs))
    runs = schedule.stages[schedule.codes <= Code.TAPED_FORWARD]
    return int(made[ledgers.of[runs]].sum()), int(max(ledgers.inputs.max(), outputs.max()))


def _inputs(chain: Chain) -> int:
    first = chain.stages[0].ledger
    assert first is not None
    return first.parts.inputs if first.parts else 1


def _outputs(ledger: StageLedger, inputs: int) -> list[tuple[int, int]]:
    """Bytes of each storage of the output, and which one of the input it is, or -1."""
    if ledger.output_is_view:
        return [(0, k) for k in range(inputs)]
    if ledger.parts is None:
        return [(ledger.state_bytes, -1)]
    return list(zip(ledger.parts.output_bytes, ledger.parts.output_sources, strict=True))


def _saved(ledger: StageLedger, inputs: int) -> list[int]:
    """Storages that the tape keeps: k of the input, -1 - k of the output."""
    if ledger.parts is not None:
        return [*ledger.parts.saved_inputs, *(-1 - k for k in ledger.parts.saved_outputs)]
    outputs = len(_outputs(ledger, inputs))
    both = [*range(inputs)] * ledger.input_saved, [-1 - k for k in range(outputs)]
    return both[0] + both[1] * ledger.output_saved


def _peaks(ledger: StageLedger) -> Sequence[int]:
    return (ledger if ledger.parts is None else ledger.parts).backward_peak_bytes


def _flat(rows: Iterable[Sequence[_T]]) -> tuple[Integers, list[_T]]:
    rows = list(rows)
    first = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return first, list(itertools.chain.from_iterable(rows))


def stages_of(chain: Chain, snapshots: Integers, owner: Integers) -> Stages:
    """Figures by stage.

    Args:
        chain: A chain whose stages all have a ledger.
        snapshots: What it takes to run on from each state.
        owner: The block of each stage.
    """
    partly = [False, *(bool(x.ledger and x.ledger.shares_parameters_partly) for x in chain.stages)]
    return Stages(
        gradient=np.array(chain.arrays.gradient_bytes, dtype=np.int64),
        parameters=np.array(chain.arrays.parameter_gradient_bytes, dtype=np.int64),
        partly=np.array(partly),
        snapshots=snapshots,
        owner=owner,
    )


def replays_of(
    schedule: Schedule,
    liveness: Liveness,
    blocks: Sequence[Block],
    owner: Integers,
    segments: Iterable[Segment],
) -> Replays:
    """Blocks that each backward segment runs again, and the bytes of their buffers.

    Args:
        schedule: The schedule.
        liveness: What `analyse` says of it.
        blocks: The chain's blocks.
        owner: The block of each stage.
        segments: What the backward of each block runs.
    """
    hidden = {k: block.hidden_bytes for k, block in enumerate(blocks) if block.hidden_bytes}
    positions, rows = [], []
    for segment in segments:
        part = slice(segment.start, segment.stop)
        touched = sorted({*owner[schedule.stages[part][liveness.repeats[part]]].tolist()})
        sizes = {k: blocks[k].buffer_bytes for k in touched}
        positions.append(segment.start)
        # Hidden buffers of other blocks are cloned with them.
        rows.append(list((hidden | sizes).items()) if sizes else [])
    first, pairs = _flat(rows)
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Replays(
        position=np.array(positions, dtype=np.int64),
        first=first,
        block=columns[:, 0].copy(),
        size=columns[:, 1].copy(),
    )
