"""The one judge of every schedule: is it valid, what is its peak, what does it cost.

Two levels. The planning model adds up a few numbers a stage and is what solvers optimise.
The ledger charges what PyTorch allocates, to the byte, where the profile has the figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..base.budget import Link, Tier
from ..base.errors import InvalidScheduleError, WorkloadError
from ..schedule.language import Code, Copy, Drop, Kind, Schedule, Value, format_operation
from ..schedule.trace import Live, Trace
from ..workload.chain import Chain
from ..workload.graph import Graph
from .exact_bytes import charge, live_at
from .graph_rules import simulate_graph

Links = Mapping[tuple[Tier, Tier], Link]

# From so many operations on, the compiled pass saves more than it takes to load.
_COMPILED_OPERATIONS = 8_000
# What the flag of a stored tape says: it was made from the tape before, or from the bare state,
# which is what a run reads where both are stored. It keeps that copy as long as it is there.
_FROM_TAPE, _FROM_STATE = 1, 2


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
    if isinstance(chain, Graph):
        return simulate_graph(chain, schedule, links)
    planning = _Planning(chain, schedule, links or {})
    planning.run()
    timeline = planning.timeline
    ledger_peak = None
    if model != "planning" and chain.has_ledger:
        timeline = charge(chain, schedule)
        ledger_peak = int(timeline.max())
    position = int(timeline.argmax())
    exact = ledger_peak is not None
    return Trace(
        seconds=planning.seconds,
        peak_bytes=int(timeline[position]),
        planning_peak_bytes=int(planning.timeline.max()),
        ledger_peak_bytes=ledger_peak,
        host_peak_bytes=planning.peaks[Tier.HOST],
        disk_peak_bytes=planning.peaks[Tier.DISK],
        forwards=int((schedule.codes <= Code.TAPED_FORWARD).sum()),
        peak_position=position,
        peak_operation=format_operation(schedule[position]),
        timeline=timeline,
        find_live=functools.partial(
            _live_at, chain, schedule, links or {}, position, int(timeline[position]), exact=exact
        ),
    )


def _live_at(
    chain: Chain, schedule: Schedule, links: Links, position: int, peak: int, *, exact: bool
) -> tuple[Live, ...]:
    """What is live when an operation runs, in the ledger or in the planning model."""
    if exact:
        return live_at(chain, schedule, position, peak)
    run = _Planning(chain, schedule, links)
    run.run(until=position)
    return run.live(peak)


class _Planning:
    """Interprets a schedule by the rules and sizes of the planning model."""

    def __init__(self, chain: Chain, schedule: Schedule, links: Links) -> None:
        columns = chain.arrays
        self.chain, self.schedule, self.links = chain, schedule, links
        self.n = len(chain)
        self.sizes = {
            Kind.STATE: columns.state_bytes.tolist(),
            Kind.TAPE: columns.tape_bytes.tolist(),  # of the tape that is, or was last, stored
            Kind.GRAD: columns.gradient_bytes.tolist(),
        }
        # By stage what a run with tape and the backward from it take: those of the tape that is
        # stored, where a stage offers several.
        self.taped_seconds = columns.forward_seconds.tolist()
        self.taped_overhead = columns.forward_overhead_bytes.tolist()
        self.backward_seconds = columns.backward_seconds.tolist()
        self.backward_overhead = columns.backward_overhead_bytes.tolist()
        self.stored = {kind: bytearray(self.n + 1) for kind in Kind}
        self.stored[Kind.STATE][0] = 1
        self.away: dict[tuple[Value, Tier], int] = {}
        self.level = chain.input_bytes + chain.held_bytes
        self.parameter_gradients = 0
        self.turned = False
        self.done = bytearray(self.n + 1)
        self.seconds = 0.0
        self.peaks = {Tier.HOST: 0, Tier.DISK: 0}
        self.timeline = np.zeros(max(len(schedule), 1), dtype=np.int64)
        self.position = 0

    def run(self, until: int | None = None) -> None:
        """Interpret all operations, or those before `until`; check the end if all."""
        schedule, chain = self.schedule, self.chain
        if self.run_compiled(until):
            return
        columns, offers_tapes = chain.arrays, chain.offers_tapes
        forward_seconds, o_f = (
            columns.forward_seconds.tolist(),
            columns.forward_overhead_bytes.tolist(),
        )
        backward_seconds, o_b = self.backward_seconds, self.backward_overhead
        w_p = columns.parameter_gradient_bytes.tolist()
        w_a, w_t, w_g = (self.sizes[kind] for kind in Kind)
        states, tapes, grads = (self.stored[kind] for kind in Kind)
        stop = len(schedule) if until is None else until
        codes, numbers = schedule.codes.tolist(), schedule.stages.tolist()
        kinds, sources = schedule.kinds.tolist(), schedule.sources.tolist()
        times: list[float] = []
        during = [0] * stop
        level = self.level
        for p in range(stop):
            code, i = codes[p], numbers[p]
            self.position = p
            if code <= Code.TAPED_FORWARD:
                target = tapes if code else states
                if not (1 <= i <= self.n and (states[i - 1] or tapes[i - 1]) and not target[i]):
                    self.check_forward(i, "tape" if code else "state", target)
                target[i] = _FROM_TAPE + states[i - 1] if code else 1
                if code and (kinds[p] or offers_tapes):
                    self.take_option(i, kinds[p])
                    during[p] = level + w_t[i] + self.taped_overhead[i]
                    level += w_t[i]
                    times.append(self.taped_seconds[i])
                else:
                    size = w_t[i] if code else w_a[i]
                    during[p] = level + size + o_f[i]
                    level += size
                    times.append(forward_seconds[i])
            elif code == Code.DROP:
                during[p] = level
                plain = kinds[p] == Kind.STATE and sources[p] == Tier.DEVICE and 0 < i < self.n
                if plain and states[i] and tapes[i + 1] != _FROM_STATE:  # most drops, at less cost
                    states[i] = 0
                    level -= w_a[i]
                else:
                    level -= self.drop(p)
            elif code == Code.BACKWARD:
                fits = self.turned and 1 <= i <= self.n and grads[i] and tapes[i]
                if not fits or self.done[i] or not (states[i - 1] or tapes[i - 1]):
                    self.check_backward(i)
                fresh = w_p[i]
                during[p] = level + w_g[i - 1] + o_b[i] + fresh
                level += w_g[i - 1] + fresh - w_g[i] - w_t[i]
                self.parameter_gradients += fresh
                tapes[i] = grads[i] = 0
                grads[i - 1] = self.done[i] = 1
                times.append(backward_seconds[i])
            elif code == Code.TURN:
                self.require(not self.turned, "the forward pass was ended before")
                self.require(
                    states[self.n] or tapes[self.n],
                    f"state[{self.n}] is not available for the loss",
                )
                self.turned = True
                grads[self.n] = 1
                during[p] = level + w_g[self.n] + chain.loss_overhead_bytes
                level += w_g[self.n]
                times.append(chain.loss_seconds)
            else:
                seconds, size = self.copy(p)
                level += size
                during[p] = level
                times.append(seconds)
        self.level = level
        self.seconds = math.fsum(times)  # exactly rounded: the order of operations is no matter
        self.timeline[:stop] = during
        if until is None:
            self.check_end()

    def run_compiled(self, until: int | None) -> bool:
        """Do the same by compiled code; whether all went well.

        Where it did not, nothing has changed, and `run` finds out what is wrong.
        """
        stop = len(self.schedule) if until is None else until
        if stop < _COMPILED_OPERATIONS or self.chain.offers_tapes:
            return False
        from . import simulator_kernel

        c, chain = self.chain.arrays, self.chain
        overheads = c.forward_overhead_bytes, c.backward_overhead_bytes
        sizes = simulator_kernel.Sizes(
            *(c.state_bytes, c.tape_bytes, c.gradient_bytes, *overheads),
            *(c.parameter_gradient_bytes, chain.loss_overhead_bytes),
        )
        flags = [*(self.stored[kind] for kind in Kind), self.done]
        stored = simulator_kernel.Stored(*(np.array(x, dtype=np.uint8) for x in flags))
        packed = self.schedule.packed[:stop]
        timeline = np.zeros(stop, dtype=np.int64)
        if simulator_kernel.run(packed, sizes, stored, self.level, timeline) < stop:
            return False
        for flag, found in zip(flags, stored, strict=True):
            flag[:] = found.tobytes()
        codes, stages = self.schedule.codes[:stop], self.schedule.stages[:stop]
        self.turned = bool((codes == Code.TURN).any())
        self.parameter_gradients = int(
            c.parameter_gradient_bytes[stages[codes == Code.BACKWARD]].sum()
        )
        forwards = np.bincount(stages[codes <= Code.TAPED_FORWARD], minlength=self.n + 1)
        backwards = np.bincount(stages[codes == Code.BACKWARD], minlength=self.n + 1)
        turns = [np.count_nonzero(codes == Code.TURN)]
        self.seconds = _sum_of_runs(
            np.concatenate((c.forward_seconds, c.backward_seconds, [chain.loss_seconds])),
            np.concatenate((forwards, backwards, turns)),
        )
        self.timeline[:stop] = timeline
        if until is None:
            self.check_end()
        return True

    def require(self, condition: object, reason: str) -> None:
        if not condition:
            operation = format_operation(self.schedule[self.position])
            raise InvalidScheduleError(self.position, operation, reason)

    def check_forward(self, i: int, name: str, target: bytearray) -> None:
        states, tapes = self.stored[Kind.STATE], self.stored[Kind.TAPE]
        self.require(1 <= i <= self.n, f"the chain has stages 1 to {self.n}")
        self.require(
            states[i - 1] or tapes[i - 1],
            f"state[{i - 1}] is not available: neither it nor tape[{i - 1}] is stored",
        )
        self.require(not target[i], f"{name}[{i}] is already stored")

    def take_option(self, i: int, option: int) -> None:
        """Have a stage's figures be those of one of its tapes."""
        stage = self.chain.stages[i - 1]
        offered = len(stage.other_tapes)
        self.require(option <= offered, f"stage {i} offers no tape {option}, the last is {offered}")
        tape = stage.tapes[option]
        self.sizes[Kind.TAPE][i] = tape.tape_bytes
        self.taped_seconds[i] = tape.forward_seconds
        self.taped_overhead[i] = tape.forward_overhead_bytes
        self.backward_seconds[i] = tape.backward_seconds
        self.backward_overhead[i] = tape.backward_overhead_bytes

    def check_backward(self, i: int) -> None:
        states, tapes, grads = (self.stored[kind] for kind in Kind)
        self.require(1 <= i <= self.n, f"the chain has stages 1 to {self.n}")
        self.require(self.turned, "the forward pass has not ended: Turn comes first")
        self.require(not self.done[i], f"stage {i} has had its backward")
        self.require(grads[i], f"grad[{i}] is not stored: stage {i + 1} comes first")
        self.require(tapes[i], f"tape[{i}] is not stored")
        self.require(states[i - 1] or tapes[i - 1], f"state[{i - 1}] is not available")

    def drop(self, p: int) -> int:
        """Check and do a Drop; returns the bytes that it frees on the device."""
        operation = self.schedule[p]
        assert isinstance(operation, Drop)
        value, tier = operation.value, operation.tier
        self.require(0 <= value.stage <= self.n, f"the chain has stages 1 to {self.n}")
        if tier is not Tier.DEVICE:
            self.require(
                (value, tier) in self.away, f"{value} is not stored on the {tier.name.lower()}"
            )
            del self.away[value, tier]
            return 0
        self.require(self.stored[value.kind][value.stage], f"{value} is not stored")
        if value == Value(Kind.STATE, 0):
            self.require(self.done[1], "the input is needed until Backward(1)")
        i = value.stage
        if value.kind is not Kind.GRAD and i < self.n:
            holds = _FROM_STATE if value.kind is Kind.STATE else _FROM_TAPE
            self.require(
                self.stored[Kind.TAPE][i + 1] != holds,
                f"tape[{i + 1}] holds state[{i}], which this would forget: it was made from "
                f"{value} and keeps that copy, which can go after B{i + 1} or -t{i + 1} only",
            )
        self.stored[value.kind][i] = 0
        return int(self.sizes[value.kind][i])

    def copy(self, p: int) -> tuple[float, int]:
        """Check and do a Copy; returns seconds, and bytes that it takes on the device."""
        operation = self.schedule[p]
        assert isinstance(operation, Copy)
        value, source, target = operation.value, operation.source, operation.target
        self.require(0 <= value.stage <= self.n, f"the chain has stages 1 to {self.n}")
        self.require(source is not target, "source and target are the same tier")
        device = self.stored[value.kind]
        here = device[value.stage] if source is Tier.DEVICE else (value, source) in self.away
        self.require(here, f"{value} is not stored on the {source.name.lower()}")
        there = device[value.stage] if target is Tier.DEVICE else (value, target) in self.away
        self.require(not there, f"{value} is already stored on the {target.name.lower()}")
        size = int(self.sizes[value.kind][value.stage])
        link = self.links.get((source, target))
        seconds = link.seconds(size) if link else 0.0
        if target is Tier.DEVICE:
            device[value.stage] = self.holding(value)
            return seconds, size
        self.away[value, target] = size
        stored = sum(bytes_ for (_, tier), bytes_ in self.away.items() if tier is target)
        self.peaks[target] = max(self.peaks[target], stored)
        return seconds, 0

    def holding(self, value: Value) -> int:
        """The flag of a value that is copied to the device: a tape comes to hold its input."""
        i = value.stage
        if value.kind is not Kind.TAPE or i == 0:
            return 1
        alone, taped = (self.stored[kind][i - 1] for kind in (Kind.STATE, Kind.TAPE))
        self.require(alone or taped, f"{value} holds state[{i - 1}], which is not available")
        return _FROM_TAPE + alone

    def check_end(self) -> None:
        """Refuse a schedule that ends early or leaks."""
        self.position = len(self.schedule)

        def fail(reason: str) -> None:
            raise InvalidScheduleError(self.position, "", reason)

        if not self.turned:
            fail("the forward pass was never ended: Turn is missing")
        missing = self.done.rfind(b"\0", 1, self.n + 1)
        if missing > 0:
            fail(f"stage {missing} never had its backward")
        if not self.stored[Kind.GRAD][0]:
            fail("grad[0] is not stored: it is the result, and was dropped")
        self.stored[Kind.GRAD][0] = 0
        for kind in Kind:
            left = len(self.stored[kind]) - len(self.stored[kind].lstrip(b"\0"))
            if left <= self.n:
                fail(f"{Value(kind, left)} is still stored: it leaks")
        for value, tier in self.away:
            fail(f"{value} is still stored on the {tier.name.lower()}: it leaks")

    def live(self, peak: int) -> tuple[Live, ...]:
        """What is stored now, and the rest of the peak as what the operation itself needs."""
        chain = self.chain
        found = [
            Live(f"{name}[{i}]", self.sizes[kind][i])
            for kind, name in ((kind, kind.name.lower()) for kind in Kind)
            for i, is_stored in enumerate(self.stored[kind])
            if is_stored
        ]
        found.append(Live("parameter gradients", self.parameter_gradients))
        found.append(Live("output held by the caller", chain.held_bytes))
        found.append(Live("the operation itself", peak - sum(item.bytes for item in found)))
        return tuple(sorted((x for x in found if x.bytes), key=lambda x: -x.bytes))


def _sum_of_runs(seconds: npt.NDArray[np.float64], runs: npt.NDArray[np.int64]) -> float:
    """The exactly rounded sum of times that occur so often, as of a list of them all.

    Each is cut in two parts of 26 bits; times up to 2**26 runs, both stay exact.
    """
    fraction, exponent = np.frexp(seconds)
    shifted = np.ldexp(fraction, 26)
    high = np.rint(shifted)
    parts = (np.ldexp(runs * part, exponent - 26) for part in (high, shifted - high))
    return math.fsum(np.concatenate(tuple(parts)))
