"""From the table of sliding checkpoints to schedules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import final

from ..schedule import Schedule, ScheduleBuilder
from .sliding_table import Choices, SlidingTable


@final
class Lowering:
    """Writes out one schedule, without recursion: what is still to be done lies on a stack."""

    def __init__(self, table: SlidingTable) -> None:
        """Start with nothing written."""
        self._table, self._build = table, ScheduleBuilder()
        self._todo: list[Callable[[], None]] = []

    def run(self, m: int) -> Schedule:
        """Write out the schedule of the whole chain.

        Args:
            m: Slots; the table must have a schedule for them.
        """
        whole = partial(self._segment, 1, self._table.n + 1, m)
        self._todo = [partial(self._build.drop_state, 0), whole]
        while self._todo:
            self._todo.pop()()
        return self._build.build()

    def _segment(self, s: int, t: int, m: int) -> None:
        """Reverse stages s..t from state s - 1, which stays."""
        if s > self._table.n:
            self._build.turn()
            return
        choices = self._table.choose(s, t, m)
        if choices.first < 0:
            tape = -1 - choices.first
            self._build.tape(s, self._table.option(s, tape))
            self._todo.append(partial(self._build.backward, s))
            if s < t:
                rest = self._table.rest(m, tape=tape)
                self._todo.append(partial(self._segment, s + 1, t, rest))
        else:
            self._build.sweep(s, choices.first)
            self._todo.append(partial(self._after, choices, choices.first, t, m))

    def _after(self, choices: Choices, kept: int, c: int, m: int) -> None:
        """Reverse stages s..c from state s - 1 and a kept state, which goes meanwhile."""
        z = choices.after(kept, c)
        if z > 0:
            self._build.forward(kept + 1)
            self._build.drop_state(kept)
            for i in range(kept + 2, z + 1):
                self._build.forward(i)
                self._build.drop_state(i - 1)
            self._todo.append(partial(self._after, choices, z, c, m))
        elif z < 0:
            self._build.sweep(kept + 1, -z)
            self._todo += [
                partial(self._after, choices, kept, -z, m),
                partial(self._build.drop_state, -z),
                partial(self._segment, 1 - z, c, self._table.rest(m, states=(kept, -z))),
            ]
        else:
            self._todo += [
                partial(self._segment, choices.s, kept, m),
                partial(self._build.drop_state, kept),
                partial(self._segment, kept + 1, c, self._table.rest(m, states=(kept,))),
            ]
