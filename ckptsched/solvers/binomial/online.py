"""Checkpoints of a chain whose length is known only when it has been run.

While the chain runs forward, `OnlinePlacement` says which states to keep: by Algorithm I of
Stumm and Walther (New algorithms for optimal online checkpointing, SIAM J. Sci. Comput. 32(2),
2010) as long as that is best, by the rule of Wang, Moin and Iaccarino (Minimal repetition dynamic
checkpointing algorithm, SIAM J. Sci. Comput. 31(4), 2009) beyond. What is then known to be the
whole chain is reversed by `reversal`: revolve in each interval, with the slots that are free.

Slots are counted as `revolve` does: s states are kept at once, the input included; the state that
a sweep has just made is not among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from ...base.errors import WorkloadError
from ...schedule.language import Code
from .revolve import first_advance

Operation: TypeAlias = tuple[Code, int]
"""An operation on a stage: a run, one with tape, a backward, or that its state is dropped."""

# Level of what Algorithm I has placed, for the rule that takes over. 0 to 3 were tried with 2 to 12
# slots and up to 1000 stages: with 3 the worst cost is 1.15 to 1.33 times the least; with the rule
# alone, or with level 0 as elsewhere, up to 1.39 and 1.33 times.
_LEVEL_OF_FIRST_PHASE = 3.0


def optimal_length(slots: int) -> int:
    """Stages up to which keeping states without knowing the length costs nothing more.

    Args:
        slots: States kept at once, the input included, at least 1.

    Returns:
        beta(s, 2) = (s + 1) (s + 2) / 2; Stumm and Walther 2010, equation (2.2).
    """
    return (slots + 1) * (slots + 2) // 2


@final
@dataclass(frozen=True, slots=True)
class Visit:
    """What to do with the state that a run of the chain has come to."""

    store: bool
    """Whether to keep it."""
    evicted: int | None
    """Position of the state to let go for it; None where a slot is free."""


@final
class OnlinePlacement:
    """Which states to keep while a chain of unknown length runs forward.

    Example:
        >>> placement = OnlinePlacement(2)
        >>> for _ in range(4):
        ...     visit = placement.visit()
        >>> visit, placement.positions
        (Visit(store=True, evicted=2), (0, 3))
    """

    def __init__(self, slots: int, *, optimal_start: bool = True) -> None:
        """Start before the first state.

        Args:
            slots: States kept at once, the input included.
            optimal_start: Whether Algorithm I rules up to `optimal_length`, and not the rule of
                Wang, Moin and Iaccarino from the start.

        Raises:
            WorkloadError: Fewer than one.
        """
        if slots < 1:
            raise WorkloadError(f"{slots} slots cannot hold the input; give at least 1")
        self.slots = slots
        self._limit = optimal_length(slots) if optimal_start else 0
        self._next = 0  # position of the state that comes next
        self._held: list[int | None] = []  # what the slots hold, while Algorithm I rules
        # Algorithm I: the slot to write next, the last one of this round, and where the round ends.
        self._slot, self._last_slot, self._round_end = 0, slots, slots
        self._storing = True
        # Beyond: positions that rise, and the level of each.
        self._levels: list[tuple[int, float]] = []

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions of the states that are kept, rising; 0 is the input."""
        if self._next <= self._limit:
            return tuple(sorted(p for p in self._held if p is not None))
        return tuple(p for p, _ in self._levels)

    def visit(self) -> Visit:
        """Come to the next state: the input first, then that after each stage but the last."""
        n = self._next
        if n == self._limit:
            self._levels = [(p, _LEVEL_OF_FIRST_PHASE if p else math.inf) for p in self.positions]
        self._next += 1
        return self._visit_first(n) if n < self._limit else self._visit_beyond(n)

    def _visit_first(self, n: int) -> Visit:
        """Stumm and Walther's Algorithm I: rounds, each with a slot fewer to write."""
        visit = Visit(False, None)
        if self._storing:
            visit = self._write(self._slot, n)
            self._slot += 1
            if self._slot > self._last_slot:
                self._slot = 1
        if n + 1 == self._round_end:
            self._storing = False
        if n == self._round_end:
            self._round_end += self._last_slot
            self._last_slot -= 1
            self._slot = self._last_slot
            self._storing = self._last_slot > 0
        return visit

    def _write(self, slot: int, n: int) -> Visit:
        if slot >= len(self._held):
            self._held.append(n)
            return Visit(True, None)
        evicted, self._held[slot] = self._held[slot], n
        return Visit(True, evicted)

    def _visit_beyond(self, n: int) -> Visit:
        """Wang, Moin and Iaccarino's rule: a state below a later one's level is dispensable."""
        levels = self._levels
        if len(levels) < self.slots:
            levels.append((n, 0.0 if n else math.inf))
            return Visit(True, None)
        if self.slots == 1:
            return Visit(False, None)
        highest = -1.0
        for k in reversed(range(len(levels))):
            if levels[k][1] < highest:
                evicted, _ = levels.pop(k)
                levels.append((n, 0.0))
                return Visit(True, evicted)
            highest = max(highest, levels[k][1])
        evicted, level = levels.pop()
        levels.append((n, level + 1))
        return Visit(True, evicted)


def reversal(
    positions: Sequence[int], stages: int, slots: int, *, last_input: bool
) -> Iterator[Operation]:
    """Reverse a chain from the states that are kept, with as few runs as they allow.

    The states cut the chain into intervals. The last is reversed first, by revolve with the slots
    that no state before it takes; its own slots are then free for the interval before it.
    Letting a state go early, or moving it, gains nothing with the positions of `OnlinePlacement`;
    tests compare.

    Args:
        positions: Of the states that are kept, rising from 0; at most as many as there are slots.
        stages: Length of the chain, above the last position.
        slots: States kept at once, the input included.
        last_input: Whether the input of the last stage is at hand besides; it goes at once.

    Yields:
        Operations in order, one at a time: however long the sweep is, it takes no memory. All
        states are dropped in the end, the input among them.

    Raises:
        WorkloadError: Positions that do not rise from 0, or are too many.
    """
    _check_positions(positions, stages, slots)
    end = stages
    if last_input and positions[-1] < stages - 1:
        end = stages - 1
        yield from ((Code.TAPED_FORWARD, stages), (Code.BACKWARD, stages), (Code.DROP, end))
    todo: list[tuple[int, int, int]] = []
    for k, (first, after) in enumerate(zip(positions, (*positions[1:], end), strict=True)):
        todo += [(first, 0, 0), (first, after - first, slots - k)]
    while todo:
        first, length, free = todo.pop()
        if length == 0:  # a part is done: its input goes
            yield Code.DROP, first
        elif length == 1:
            yield Code.TAPED_FORWARD, first + 1
            yield Code.BACKWARD, first + 1
        else:
            split = first_advance(length, free)
            for stage in range(first + 1, first + split + 1):
                yield Code.FORWARD, stage
                if stage > first + 1:
                    yield Code.DROP, stage - 1
            middle = first + split
            todo += [(first, split, free), (middle, 0, 0)]
            todo.append((middle, length - split, max(free - 1, 1)))


def _check_positions(positions: Sequence[int], stages: int, slots: int) -> None:
    ends = (*positions[1:], stages)
    rising = all(a < b for a, b in zip(positions, ends, strict=len(positions) > 0))
    if not positions or positions[0] != 0 or not rising or len(positions) > slots:
        raise WorkloadError(
            f"states kept at {list(positions)} cannot reverse {stages} stages with {slots} slots: "
            "positions rise from 0 to below the number of stages, and each takes a slot"
        )
