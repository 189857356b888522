"""The one judge of every schedule: is it valid, what is its peak, what does it cost.

Two levels. The planning model adds up a few numbers a stage and is what solvers optimise.
The ledger charges what PyTorch allocates, to the byte, where the profile has the figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal, final

import numpy as np
import numpy.typing as npt

from ..base.budget import Link, Tier
from ..base.errors import InvalidScheduleError, WorkloadError
from ..base.jit import suited
from ..schedule.language import Code, Copy, Kind, Schedule
from ..schedule.trace import Live, Trace
from ..workload.chain import Chain
from ..workload.graph import Graph
from ..workload.stage import TapeOption
from . import simulator_kernel as kernel
from .exact_bytes import charge, live_at
from .rule_words import Words, named
from .value_bytes import charge_values, live_by_value

Links = Mapping[tuple[Tier, Tier], Link]

# Steps of the interpreter for an operation.
_STEPS = 9
_NO_TAPE = TapeOption(tape_bytes=0, forward_seconds=0.0, backward_seconds=0.0)


def simulate(
    chain: Chain | Graph,
    schedule: Schedule,
    *,
    model: Literal["auto", "planning", "ledger"] = "auto",
    links: Links | None = None,
) -> Trace:
    """Run a schedule on paper.

    Args:
        chain: The chain or graph that it is for.
        schedule: The schedule.
        model: The planning model, the ledger, or the ledger where the chain has one.
        links: Speed of copies between tiers; a copy without a link costs no time.

    Returns:
        Peak, seconds, counts, and what is live at the peak.

    Raises:
        InvalidScheduleError: With the first operation that breaks a rule, and the rule.
        WorkloadError: The ledger was asked for and the chain has none.
    """
    if model == "ledger" and not chain.has_ledger:
        raise WorkloadError(
            "this chain has no exact bytes: profile the model for a ledger, or ask for the "
            "planning model"
        )
    planning = _Planning(chain, schedule)
    planning.run()
    timeline = planning.timeline
    ledger_peak = None
    if model != "planning" and chain.has_ledger:
        timeline = _exact(chain, schedule)
        ledger_peak = int(timeline.max())
    position = int(timeline.argmax())
    exact = ledger_peak is not None
    return Trace(
        seconds=planning.seconds(links or {}),
        peak_bytes=int(timeline[position]),
        planning_peak_bytes=int(planning.timeline.max()),
        ledger_peak_bytes=ledger_peak,
        host_peak_bytes=planning.peak_on(Tier.HOST),
        disk_peak_bytes=planning.peak_on(Tier.DISK),
        forwards=int((schedule.codes <= Code.TAPED_FORWARD).sum()),
        peak_position=position,
        peak_operation=Words(chain).operation(schedule[position]),
        timeline=timeline,
        find_live=functools.partial(
            _live_at, chain, schedule, position, int(timeline[position]), exact=exact
        ),
    )


def _exact(chain: Chain | Graph, schedule: Schedule) -> npt.NDArray[np.int64]:
    """Exact bytes while each operation runs."""
    if isinstance(chain, Graph):
        return charge_values(chain, schedule)
    return charge(chain, schedule)


def live_during(chain: Chain | Graph, schedule: Schedule, position: int) -> tuple[Live, ...]:
    """What is live while any operation runs, largest first; adds up to its bytes.

    Args:
        chain: The chain or graph.
        schedule: A valid schedule.
        position: Of the operation.
    """
    trace = simulate(chain, schedule)
    exact = trace.ledger_peak_bytes is not None
    return _live_at(chain, schedule, position, int(trace.timeline[position]), exact=exact)


def _live_at(
    chain: Chain | Graph, schedule: Schedule, position: int, peak: int, *, exact: bool
) -> tuple[Live, ...]:
    """What is live when an operation runs, in the ledger or in the planning model."""
    if exact:
        if isinstance(chain, Graph):
            return live_by_value(chain, schedule, position, peak)
        return live_at(chain, schedule, position, peak)
    run = _Planning(chain, schedule)
    run.run(until=position)
    return run.live(peak)


@final
class _Planning:
    """A schedule by the rules and sizes of the planning model."""

    def __init__(self, chain: Chain | Graph, schedule: Schedule) -> None:
        self.chain, self.schedule, self.words = chain, schedule, Words(chain)
        self.tapes, self.edges = _Tapes(chain), _edges_of(chain)
        columns, shape = chain.arrays, (len(Tier), len(Kind), len(chain) + 1)
        self.sizes = kernel.Sizes(
            state=columns.state_bytes,
            gradient=columns.gradient_bytes,
            forward=columns.forward_overhead_bytes,
            parameters=columns.parameter_gradient_bytes,
            first=self.tapes.first,
            tape=self.tapes.bytes,
            taped=self.tapes.forward_overhead_bytes,
            backward=self.tapes.backward_overhead_bytes,
            loss=chain.loss_overhead_bytes,
        )
        self.stored = kernel.Stored(
            at=np.zeros(shape, dtype=np.uint8),
            bare=np.zeros(len(self.edges.source), dtype=np.uint8),
            size=np.zeros(shape, dtype=np.int64),
            tape=self.tapes.first[:-1].copy(),
            done=np.zeros(len(chain) + 1, dtype=np.uint8),
            spent=self.tapes.first[:-1].copy(),
            totals=np.zeros(kernel.MOST_AWAY + len(Tier), dtype=np.int64),
        )
        self.stored.at[Tier.DEVICE, Kind.STATE, 0] = 1
        self.stored.totals[kernel.LEVEL] = chain.input_bytes + chain.held_bytes
        self.timeline = np.zeros(max(len(schedule), 1), dtype=np.int64)
        self.moved = np.zeros(len(schedule), dtype=np.int64)

    def run(self, until: int | None = None) -> None:
        """Interpret all operations, or those before `until`; check the end if all."""
        stop = len(self.schedule) if until is None else until
        run = suited(kernel.run, _STEPS * stop)
        during = self.timeline[:stop]
        rule = run(self.schedule.packed, self.edges, self.sizes, self.stored, during, self.moved)
        if rule:
            position = int(self.stored.totals[kernel.POSITION])
            operation = self.schedule[position]
            reason = self.words.fault(rule, operation, self.stored, self.sizes)
            raise InvalidScheduleError(position, self.words.operation(operation), reason)
        if until is None:
            self._check_end()

    def peak_on(self, tier: Tier) -> int:
        """The most bytes on another tier."""
        return int(self.stored.totals[kernel.MOST_AWAY + tier])

    def seconds(self, links: Links) -> float:
        """Seconds of all operations, exactly rounded: their order is no matter.

        Args:
            links: Speed of copies between tiers.
        """
        schedule, tapes = self.schedule, self.tapes
        codes, stages = schedule.codes, schedule.stages
        taped = codes == Code.TAPED_FORWARD
        copies = []
        for p in np.flatnonzero(codes == Code.COPY).tolist():
            operation = schedule[p]
            assert isinstance(operation, Copy)
            link = links.get((operation.source, operation.target))
            copies.append(link.seconds(int(self.moved[p])) if link else 0.0)
        # What may take seconds, and which of them is run, an entry a time.
        parts = (
            (self.chain.arrays.forward_seconds, stages[codes == Code.FORWARD]),
            (tapes.forward_seconds, tapes.first[stages[taped]] + schedule.kinds[taped]),
            (tapes.backward_seconds, self.stored.spent[stages[codes == Code.BACKWARD]]),
            (np.array([self.chain.loss_seconds]), np.zeros((codes == Code.TURN).sum(), np.int64)),
            (np.array(copies, dtype=np.float64), np.arange(len(copies))),
        )
        return _sum_of_runs(
            np.concatenate([seconds for seconds, _ in parts]),
            np.concatenate([np.bincount(which, minlength=len(x)) for x, which in parts]),
        )

    def _check_end(self) -> None:
        """Refuse a schedule that ends early or leaks."""
        at, position = self.stored.at, len(self.schedule)

        def fail(reason: str) -> None:
            raise InvalidScheduleError(position, "", reason)

        if not self.stored.totals[kernel.TURNED]:
            fail("the forward pass was never ended: Turn is missing")
        missing = np.flatnonzero(self.stored.done[1:] == 0)
        if len(missing):
            fail(f"{self.words.stage(int(missing[-1]) + 1)} never had its backward")
        if not at[Tier.DEVICE, Kind.GRAD, 0]:
            result = self.words.value(Kind.GRAD, 0)
            fail(f"{result} is not stored: it is the result, and was dropped")
        at[Tier.DEVICE, Kind.GRAD, 0] = 0
        for tier, kind, i in np.argwhere(at).tolist():
            where = "" if tier == Tier.DEVICE else f" on the {named(tier)}"
            fail(f"{self.words.value(kind, i)} is still stored{where}: it leaks")

    def live(self, peak: int) -> tuple[Live, ...]:
        """What is stored now, and the rest of the peak as what the operation itself needs."""
        chain, sizes = self.chain, self.sizes
        by_kind = sizes.state, sizes.tape[self.stored.tape], sizes.gradient
        found = [
            Live(self.words.value(kind, i), int(size[i]))
            for kind, size in zip(Kind, by_kind, strict=True)
            for i in np.flatnonzero(self.stored.at[Tier.DEVICE, kind]).tolist()
        ]
        parameters = int(self.stored.totals[kernel.PARAMETERS])
        found.append(Live("parameter gradients", parameters))
        found.append(Live("output held by the caller", chain.held_bytes))
        found.append(Live("the operation itself", peak - sum(item.bytes for item in found)))
        return tuple(sorted((x for x in found if x.bytes), key=lambda x: -x.bytes))


@final
class _Tapes:
    """All tapes that the stages of a chain offer, in a row: stage i has those from first[i] on."""

    def __init__(self, chain: Chain | Graph) -> None:
        columns = chain.arrays
        self.first = np.arange(len(chain) + 2)  # index 0 stands for one of the input, of no bytes
        self.bytes = columns.tape_bytes
        self.forward_overhead_bytes = columns.forward_overhead_bytes
        self.backward_overhead_bytes = columns.backward_overhead_bytes
        self.forward_seconds = columns.forward_seconds
        self.backward_seconds = columns.backward_seconds
        if not chain.offers_tapes:
            return
        tapes = [_NO_TAPE, *(tape for stage in chain.stages for tape in stage.tapes)]
        self.first = np.cumsum([0, 1, *(len(stage.tapes) for stage in chain.stages)])
        self.bytes = np.array([x.tape_bytes for x in tapes])
        self.forward_overhead_bytes = np.array([x.forward_overhead_bytes for x in tapes])
        self.backward_overhead_bytes = np.array([x.backward_overhead_bytes for x in tapes])
        self.forward_seconds = np.array([x.forward_seconds for x in tapes])
        self.backward_seconds = np.array([x.backward_seconds for x in tapes])


def _edges_of(chain: Chain | Graph) -> kernel.Edges:
    """Who reads what: in a chain each stage the state before."""
    n = len(chain)
    if isinstance(chain, Graph):
        source = np.array([u for sources in chain.reads for u in sources], dtype=np.int64)
        reader = np.repeat(np.arange(1, n + 1), [len(sources) for sources in chain.reads])
        leaving = np.argsort(source, kind="stable")
        first = np.searchsorted(reader, np.arange(n + 2))
        first_from = np.searchsorted(source[leaving], np.arange(n + 2))
    else:
        source = leaving = np.arange(n)
        reader = source + 1
        first = np.maximum(np.arange(-1, n + 1), 0)
        first_from = np.minimum(np.arange(n + 2), n)
    pins = not (isinstance(chain, Graph) and chain.lined is not None)
    return kernel.Edges(first, source, reader, first_from, leaving, pins)


def _sum_of_runs(seconds: npt.NDArray[np.float64], runs: npt.NDArray[np.int64]) -> float:
    """The exactly rounded sum of times that occur so often, as of a list of them all.

    Each is cut in two parts of 26 bits; times up to 2**26 runs, both stay exact.
    """
    fraction, exponent = np.frexp(seconds)
    shifted = np.ldexp(fraction, 26)
    high = np.rint(shifted)
    parts = (np.ldexp(runs * part, exponent - 26) for part in (high, shifted - high))
    return math.fsum(np.concatenate(tuple(parts)))
