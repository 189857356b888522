"""Rules and bytes of schedules on a graph, by operations: those of `docs/concepts/graphs.md`.

Written apart from the simulator's pass, which is compared with it: on graphs, and on chains as
the paths that they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import numpy as np

from ckptsched.base.budget import Link, Tier
from ckptsched.base.errors import InvalidScheduleError
from ckptsched.schedule.language import (
    Backward,
    Code,
    Copy,
    Drop,
    Forward,
    Kind,
    Operation,
    Schedule,
    Turn,
    Value,
)
from ckptsched.schedule.trace import Live, Trace
from ckptsched.workload.graph import Graph

Links = Mapping[tuple[Tier, Tier], Link]


def simulate_graph(graph: Graph, schedule: Schedule, links: Links | None = None) -> Trace:
    """Run a schedule on paper.

    Args:
        graph: The graph that it is for.
        schedule: The schedule, with the graph's numbers.
        links: Speed of copies between tiers; a copy without a link costs no time.

    Raises:
        InvalidScheduleError: With the first operation that breaks a rule, and the rule.
    """
    run = _Run(graph, schedule, links or {})
    timeline = np.array(run.run(len(schedule)) or [0], dtype=np.int64)
    run.check_end()
    position = int(timeline.argmax())
    peak = int(timeline[position])
    at_peak = _Run(graph, schedule, links or {})
    at_peak.run(position)
    return Trace(
        seconds=math.fsum(run.times),
        peak_bytes=peak,
        planning_peak_bytes=peak,
        ledger_peak_bytes=None,
        host_peak_bytes=run.peaks[Tier.HOST],
        disk_peak_bytes=run.peaks[Tier.DISK],
        forwards=int((schedule.codes <= Code.TAPED_FORWARD).sum()),
        peak_position=position,
        peak_operation=graph.operation_text(schedule[position]),
        timeline=timeline,
        find_live=lambda: at_peak.live(peak),
    )


@final
class _Run:
    """Interprets a schedule, one operation at a time."""

    def __init__(self, graph: Graph, schedule: Schedule, links: Links) -> None:
        columns = graph.arrays
        self.graph, self.schedule, self.links = graph, schedule, links
        self.n = len(graph)
        self.sizes = {
            Kind.STATE: columns.state_bytes.tolist(),
            Kind.TAPE: columns.tape_bytes.tolist(),
            Kind.GRAD: columns.gradient_bytes.tolist(),
        }
        self.stored = {kind: bytearray(self.n + 1) for kind in Kind}
        self.stored[Kind.STATE][0] = 1
        self.alone: dict[int, frozenset[int]] = {}  # by tape: what it read that was a bare state
        self.away: dict[tuple[Value, Tier], int] = {}
        self.level = graph.input_bytes + graph.held_bytes
        self.parameter_gradients = 0
        self.turned = False
        self.done = bytearray(self.n + 1)
        self.begun = bytearray(self.n + 1)  # states whose gradient has a first part
        self.times: list[float] = []
        self.peaks = {Tier.HOST: 0, Tier.DISK: 0}
        self.position = 0

    def run(self, stop: int) -> list[int]:
        """Interpret the operations before `stop`; returns the bytes while each runs."""
        return [self.step(p, self.schedule[p]) for p in range(stop)]

    def step(self, position: int, operation: Operation) -> int:
        self.position = position
        match operation:
            case Forward(i, taped, option):
                return self.forward(i, taped, option)
            case Turn():
                return self.turn()
            case Backward(i):
                return self.backward(i)
            case Copy():
                return self.copy(operation)
            case Drop():
                return self.drop(operation)

    # ---- operations: each checks its rules and returns the bytes while it runs ----------

    def forward(self, i: int, taped: bool, option: int) -> int:
        self.check_number(i, least=1)
        kind = Kind.TAPE if taped else Kind.STATE
        self.need_sources(i)
        self.require(not self.stored[kind][i], f"{self.called(kind, i)} is already stored")
        offered = f"offers no tape {option}, the last is 0"
        self.require(not option, f"node {self.graph.names[i]!r} {offered}")
        self.stored[kind][i] = 1
        if taped:
            self.hold(i)
        stage = self.graph.stages[i - 1]
        self.times.append(stage.forward_seconds)
        self.level += self.sizes[kind][i]
        return self.level + stage.forward_overhead_bytes

    def turn(self) -> int:
        graph, n = self.graph, self.n
        self.require(not self.turned, "the forward pass was ended before")
        self.require(
            self.available(n), f"{self.called(Kind.STATE, n)} is not available for the loss"
        )
        self.turned = True
        self.begun[n] = self.stored[Kind.GRAD][n] = 1
        self.times.append(graph.loss_seconds)
        self.level += self.sizes[Kind.GRAD][n]
        return self.level + graph.loss_overhead_bytes

    def backward(self, i: int) -> int:
        self.check_backward(i)
        graph, grads = self.graph, self.stored[Kind.GRAD]
        stage, reads, w_g = graph.stages[i - 1], graph.reads[i - 1], self.sizes[Kind.GRAD]
        new = stage.parameter_gradient_bytes
        fresh: int = sum(w_g[u] for u in reads)
        during = self.level + fresh + stage.backward_overhead_bytes + new
        self.level += new - w_g[i] - self.sizes[Kind.TAPE][i]
        for u in reads:
            if not grads[u]:
                self.begun[u] = grads[u] = 1
                self.level += w_g[u]
        self.parameter_gradients += new
        self.stored[Kind.TAPE][i] = grads[i] = 0
        self.done[i] = 1
        self.times.append(stage.backward_seconds)
        return during

    def drop(self, operation: Drop) -> int:
        value, tier, before = operation.value, operation.tier, self.level
        kind, i = value.kind, value.stage
        self.check_number(i)
        if tier is not Tier.DEVICE:
            place = tier.name.lower()
            self.require(
                (value, tier) in self.away,
                f"{self.called(kind, i)} is not stored on the {place}",
            )
            del self.away[value, tier]
            return before
        self.require(self.stored[kind][i], f"{self.called(kind, i)} is not stored")
        if value == Value(Kind.STATE, 0):
            for v in self.graph.readers[0]:
                word = self.graph.operation_text(Backward(v))
                self.require(self.done[v], f"the input is needed until {word}")
        if kind is not Kind.GRAD:
            for v in self.graph.readers[i]:
                self.check_not_held(kind, i, v)
        self.stored[kind][i] = 0
        self.level -= self.sizes[kind][i]
        return before

    def copy(self, operation: Copy) -> int:
        value, source, target = operation.value, operation.source, operation.target
        self.check_number(value.stage)
        name = self.called(value.kind, value.stage)
        device = self.stored[value.kind]

        def stored(tier: Tier) -> bool:
            here = bool(device[value.stage])
            return here if tier is Tier.DEVICE else (value, tier) in self.away

        self.require(source is not target, "source and target are the same tier")
        self.require(stored(source), f"{name} is not stored on the {source.name.lower()}")
        self.require(not stored(target), f"{name} is already stored on the {target.name.lower()}")
        size = self.sizes[value.kind][value.stage]
        link = self.links.get((source, target))
        self.times.append(link.seconds(size) if link else 0.0)
        if target is Tier.DEVICE:
            if value.kind is Kind.TAPE and value.stage:
                self.check_input_of_copy(value.stage)
                self.hold(value.stage)
            device[value.stage] = 1
            self.level += size
        else:
            self.away[value, target] = size
            level = sum(size for (_, tier), size in self.away.items() if tier is target)
            self.peaks[target] = max(self.peaks[target], level)
        return self.level

    # ---- rules --------------------------------------------------------------------------

    def available(self, i: int) -> bool:
        return bool(self.stored[Kind.STATE][i] or self.stored[Kind.TAPE][i])

    def hold(self, i: int) -> None:
        """Note which copies tape i keeps: bare states, which a run reads where there are both."""
        states = self.stored[Kind.STATE]
        self.alone[i] = frozenset(u for u in self.graph.reads[i - 1] if states[u])

    def called(self, kind: Kind, i: int) -> str:
        return f"{kind.name.lower()}[{self.graph.names[i]}]"

    def require(self, condition: object, reason: str) -> None:
        if not condition:
            operation = self.graph.operation_text(self.schedule[self.position])
            raise InvalidScheduleError(self.position, operation, reason)

    def check_number(self, i: int, least: int = 0) -> None:
        self.require(least <= i <= self.n, f"the graph has nodes 1 to {self.n}")

    def need_sources(self, i: int) -> None:
        for u in self.graph.reads[i - 1]:
            self.require(
                self.available(u),
                f"{self.called(Kind.STATE, u)} is not available: neither it nor "
                f"{self.called(Kind.TAPE, u)} is stored",
            )

    def check_not_held(self, kind: Kind, u: int, v: int) -> None:
        """A tape keeps the copy of its input that it was made from, be there another or not."""
        if not self.stored[Kind.TAPE][v] or (kind is Kind.STATE) != (u in self.alone[v]):
            return
        words = [self.graph.operation_text(x) for x in (Backward(v), Drop(Value(Kind.TAPE, v)))]
        self.require(
            False,
            f"{self.called(Kind.TAPE, v)} holds {self.called(Kind.STATE, u)}, which this would "
            f"forget: it was made from {self.called(kind, u)} and keeps that copy, which can go "
            f"after {words[0]} or {words[1]} only",
        )

    def check_input_of_copy(self, i: int) -> None:
        for u in self.graph.reads[i - 1]:
            held = f"{self.called(Kind.TAPE, i)} holds {self.called(Kind.STATE, u)}"
            self.require(self.available(u), f"{held}, which is not available")

    def check_backward(self, i: int) -> None:
        self.check_number(i, least=1)
        names = self.graph.names
        self.require(self.turned, "the forward pass has not ended: Turn comes first")
        self.require(not self.done[i], f"node {names[i]!r} has had its backward")
        for v in self.graph.readers[i]:
            later = f"{self.called(Kind.GRAD, i)} is not complete: node {names[v]!r} comes first"
            self.require(self.done[v], later)
        for kind in (Kind.GRAD, Kind.TAPE):
            self.require(self.stored[kind][i], f"{self.called(kind, i)} is not stored")
        self.need_sources(i)
        for u in self.graph.reads[i - 1]:
            self.check_sum(u)

    def check_sum(self, u: int) -> None:
        """A gradient that was begun is added to where it lies, and has no other copy."""
        called = self.called(Kind.GRAD, u)
        if self.begun[u]:
            self.require(
                self.stored[Kind.GRAD][u],
                f"{called} was begun and is not stored: its first part would be lost",
            )
        for tier in (Tier.HOST, Tier.DISK):
            self.require(
                (Value(Kind.GRAD, u), tier) not in self.away,
                f"the copy of {called} on the {tier.name.lower()} would no longer be what it is",
            )

    def check_end(self) -> None:
        """Refuse a schedule that ends early or leaks."""

        def fail(reason: str) -> None:
            raise InvalidScheduleError(len(self.schedule), "", reason)

        if not self.turned:
            fail("the forward pass was never ended: Turn is missing")
        missing = [i for i in range(1, self.n + 1) if not self.done[i]]
        if missing:
            fail(f"node {self.graph.names[missing[-1]]!r} never had its backward")
        if not self.stored[Kind.GRAD][0]:
            fail(f"{self.called(Kind.GRAD, 0)} is not stored: it is the result, and was dropped")
        self.stored[Kind.GRAD][0] = 0
        for kind in Kind:
            left = self.stored[kind].find(1)
            if left >= 0:
                fail(f"{self.called(kind, left)} is still stored: it leaks")
        for value, tier in self.away:
            name = self.called(value.kind, value.stage)
            fail(f"{name} is still stored on the {tier.name.lower()}: it leaks")

    def live(self, peak: int) -> tuple[Live, ...]:
        """What is stored now, and the rest of the peak as what the operation itself needs."""
        found = [
            Live(self.called(kind, i), self.sizes[kind][i])
            for kind in Kind
            for i in range(self.n + 1)
            if self.stored[kind][i]
        ]
        found.append(Live("parameter gradients", self.parameter_gradients))
        found.append(Live("output held by the caller", self.graph.held_bytes))
        found.append(Live("the operation itself", peak - sum(item.bytes for item in found)))
        return tuple(sorted((x for x in found if x.bytes), key=lambda x: -x.bytes))
