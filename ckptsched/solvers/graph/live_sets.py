"""A graph as the chain of its live sets, which is planned as such.

Between node i and the next lie the states that nodes up to i have made and later ones read. They
are handed on as one: every graph is a chain in this way, of which a state that several sets
share counts once. Its schedules are those of the graph that keep or drop live sets as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import numpy as np
import numpy.typing as npt

from ...schedule.language import Drop, Schedule
from ...workload.chain import Chain
from ...workload.graph import Graph
from ...workload.stage import Stage, StageLedger, StageParts
from .to_schedule import with_drops


@final
@dataclass(frozen=True)
class LiveSets:
    """A graph, and the chain of its live sets, a stage a node."""

    graph: Graph
    chain: Chain
    """Its exact bytes are no less than what the graph's planning model charges the same runs with,
    if the last node is taped before Turn."""

    def lower(self, schedule: Schedule) -> Schedule:
        """The graph's schedule with the runs of one of the chain; its peak is no higher."""
        return with_drops(self.graph, [o for o in schedule if not isinstance(o, Drop)])


def live_sets(graph: Graph) -> LiveSets:
    """The chain of a graph's live sets, in the order of its nodes."""
    last = [max(readers, default=len(graph) + 1) for readers in graph.readers]
    gradients = graph.arrays.gradient_bytes
    # A chain's caller holds the output to the end. Here that is in `held_bytes`, or not so: the
    # last state counts as a part of its tape alone.
    sizes = [*graph.arrays.state_bytes[:-1], 0]
    stages, before = [], [0]
    for i, stage in enumerate(graph.stages, 1):
        after = [u for u in (*before, i) if last[u] > i]
        read = graph.reads[i - 1]
        parts = StageParts(
            inputs=len(before),
            output_bytes=tuple(int(sizes[u]) for u in after),
            output_sources=tuple(before.index(u) if u != i else -1 for u in after),
            saved_inputs=tuple(before.index(u) for u in read),
            saved_outputs=(after.index(i),),
            backward_peak_bytes=(_backward_peak(stage, gradients[list(read)]),) * 4,
        )
        gradient = sum(int(gradients[u]) for u in after)
        stages.append(_handing_on(stage, stage.tape_bytes - int(sizes[i]), gradient, parts))
        before = after
    there = graph.input_bytes + graph.held_bytes
    chain = replace(graph.in_a_row, stages=tuple(stages), input_bytes=there, held_bytes=0)
    return LiveSets(graph, chain)


def _backward_peak(stage: Stage, gradients: npt.NDArray[np.int64]) -> int:
    """What a node's backward takes besides what is there: the gradients of what it reads, too."""
    made = stage.parameter_gradient_bytes + stage.backward_overhead_bytes
    return int(gradients.sum()) + made


def _handing_on(stage: Stage, own: int, gradient: int, parts: StageParts) -> Stage:
    """A node as a stage that hands on a live set.

    Args:
        stage: The node.
        own: Bytes of its tape without its state.
        gradient: Bytes of the gradients of the live set after it.
        parts: Its input, output and tape by states.
    """
    state = sum(parts.output_bytes)
    ledger = StageLedger(
        state_bytes=state,
        output_is_view=False,
        tape_bytes=own,
        input_saved=True,
        output_saved=True,
        forward_peak_bytes=stage.state_bytes + stage.forward_overhead_bytes,
        taped_peak_bytes=stage.tape_bytes + stage.forward_overhead_bytes,
        backward_peak_bytes=parts.backward_peak_bytes[:1] * 8,
        parts=parts,
    )
    return replace(
        stage, state_bytes=state, tape_bytes=own + state, gradient_bytes=gradient, ledger=ledger
    )
