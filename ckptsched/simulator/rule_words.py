"""Operations, values and broken rules in words, by the names that a workload has for its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ..base.budget import Tier
from ..schedule.language import (
    Backward,
    Copy,
    Drop,
    Forward,
    Kind,
    Operation,
    Value,
    format_operation,
)
from ..workload.chain import Chain
from ..workload.graph import Graph
from . import simulator_kernel as kernel

_PLAIN = {
    kernel.UNKNOWN: "there is no such operation",
    kernel.NOT_TURNED: "the forward pass has not ended: Turn comes first",
    kernel.TURNED_BEFORE: "the forward pass was ended before",
    kernel.SAME_TIER: "source and target are the same tier",
}


@final
@dataclass(frozen=True, slots=True)
class Words:
    """What is said of a chain's stages by their numbers, of a graph's nodes by their names."""

    workload: Chain | Graph

    def operation(self, operation: Operation) -> str:
        """One word of a schedule."""
        if isinstance(self.workload, Graph):
            return self.workload.operation_text(operation)
        return format_operation(operation)

    def value(self, kind: int, i: int) -> str:
        """Such as "state[3]" or "tape[conv1]"."""
        name = self.workload.names[i] if isinstance(self.workload, Graph) else i
        return f"{Kind(kind).name.lower()}[{name}]"

    def stage(self, i: int) -> str:
        """Such as "stage 3" or "node 'conv1'"."""
        is_graph = isinstance(self.workload, Graph)
        return f"node {self.workload.stage_name(i)!r}" if is_graph else f"stage {i}"

    def fault(
        self, rule: int, operation: Operation, stored: kernel.Stored, sizes: kernel.Sizes
    ) -> str:
        """A broken rule.

        Args:
            rule: One of `simulator_kernel`.
            operation: What breaks it.
            stored: What is stored before, and what else the rule is about.
            sizes: Bytes of stages.
        """
        about = int(stored.totals[kernel.ABOUT])
        if rule in _PLAIN:
            return _PLAIN[rule]
        if rule == kernel.NO_STAGE:
            kind = "graph has nodes" if isinstance(self.workload, Graph) else "chain has stages"
            return f"the {kind} 1 to {len(self.workload)}"
        match operation:
            case Forward():
                return self._of_forward(rule, about, operation, sizes)
            case Backward(i):
                return self._of_backward(rule, about, i, stored)
            case Copy() | Drop():
                return self._of_value(rule, about, operation)
            case _:
                return f"{self.value(Kind.STATE, len(self.workload))} is not available for the loss"

    def _lacking(self, u: int) -> str:
        state, tape = self.value(Kind.STATE, u), self.value(Kind.TAPE, u)
        return f"{state} is not available: neither it nor {tape} is stored"

    def _of_forward(self, rule: int, about: int, run: Forward, sizes: kernel.Sizes) -> str:
        if rule == kernel.NO_INPUT:
            return self._lacking(about)
        if rule == kernel.STORED:
            return (
                f"{self.value(Kind.TAPE if run.tape else Kind.STATE, run.stage)} is already stored"
            )
        last = int(sizes.first[run.stage + 1] - sizes.first[run.stage]) - 1
        return f"{self.stage(run.stage)} offers no tape {run.option}, the last is {last}"

    def _of_backward(self, rule: int, about: int, i: int, stored: kernel.Stored) -> str:
        gradient, part = self.value(Kind.GRAD, i), self.value(Kind.GRAD, about)
        away = Tier.HOST if stored.at[Tier.HOST, Kind.GRAD, about] else Tier.DISK
        copy = f"the copy of {part} on the {named(away)}"
        return {
            kernel.HAD_BACKWARD: f"{self.stage(i)} has had its backward",
            kernel.NOT_COMPLETE: f"{gradient} is not complete: {self.stage(about)} comes first",
            kernel.NO_GRADIENT: f"{gradient} is not stored",
            kernel.NO_TAPE: f"{self.value(Kind.TAPE, i)} is not stored",
            kernel.NO_INPUT: self._lacking(about),
            kernel.LOST_PART: f"{part} was begun and is not stored: its first part would be lost",
            kernel.OTHER_COPY: f"{copy} would no longer be what it is",
        }[rule]

    def _of_value(self, rule: int, about: int, operation: Copy | Drop) -> str:
        kind, i = operation.value.kind, operation.value.stage
        called, tape = self.value(kind, i), self.value(Kind.TAPE, about)
        read, done = self.value(Kind.STATE, about), self.operation(Backward(about))
        gone = self.operation(Drop(Value(Kind.TAPE, about)))
        source = operation.source if isinstance(operation, Copy) else operation.tier
        where = f" on the {named(source)}"
        if isinstance(operation, Drop) and source is Tier.DEVICE:
            where = ""
        there = f" on the {named(operation.target)}" if isinstance(operation, Copy) else ""
        return {
            kernel.NOT_HERE: f"{called} is not stored{where}",
            kernel.THERE_ALREADY: f"{called} is already stored{there}",
            kernel.INPUT_NEEDED: f"the input is needed until {done}",
            kernel.HELD_BY_TAPE: f"{tape} holds {self.value(Kind.STATE, i)}, which this would "
            f"forget: it was made from {called} and keeps that copy, which can go after {done} or "
            f"{gone} only",
            kernel.NO_INPUT_OF_TAPE: f"{called} holds {read}, which is not available",
        }[rule]


def named(tier: int) -> str:
    """A tier in words."""
    return Tier(tier).name.lower()
