"""The bytes of a real step, operation by operation, as a meter has counted them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from ..memory.meters import Measurement, Window
from ..schedule.language import Code
from .prepared_plan import PreparedPlan


@final
class TimelineMarks:
    """Divides a window of a meter at the operations of one step by a plan.

    Marks are put before and after each piece of operations that run together. What is measured
    between two pieces is the loss at the turn, and else belongs to the piece that follows.
    """

    def __init__(self, prepared: PreparedPlan) -> None:
        """Watch nothing yet.

        Args:
            prepared: The plan.
        """
        self._prepared = prepared
        self._pieces: list[tuple[int, int]] = []
        self._window: Window | None = None

    @contextmanager
    def on(self, window: Window) -> Iterator[None]:
        """Watch a step that runs inside, by the plan and in this window.

        Args:
            window: It, without a mark so far.
        """
        self._window, self._prepared.watch = window, self._around
        try:
            yield
        finally:
            self._prepared.watch = None

    @contextmanager
    def _around(self, p: int, end: int) -> Iterator[None]:
        assert self._window is not None
        self._window.mark()
        yield
        self._window.mark()
        self._pieces.append((p, end))

    def timeline(self, phases: tuple[Measurement, ...]) -> tuple[int, ...]:
        """The largest number of bytes alive while each operation of the schedule ran.

        Args:
            phases: Those of the step: one before each piece, one of each, and one after the last.

        Returns:
            Bytes, one number an operation. Operations that run together have one number, those
            that this step does not run the bytes that were alive before.
        """
        schedule = self._prepared.plan.schedule
        turn = self._prepared.script.segments.turn
        found: list[int] = [0] * len(schedule)
        done, live = 0, 0
        for k, (p, end) in enumerate(self._pieces):
            before, piece = phases[2 * k], phases[2 * k + 1]
            found[done:p] = [live] * (p - done)
            most = piece.peak_bytes
            if done <= turn < p and schedule.codes[turn] == Code.TURN:
                found[turn] = max(found[turn], before.peak_bytes)
            elif before.peak_bytes > live:  # else nothing was made, and what was let go is past
                most = max(most, before.peak_bytes)
            found[p:end] = [most] * (end - p)
            done, live = end, piece.final_bytes
        found[done:] = [live] * (len(schedule) - done)
        last = max(done - 1, 0)
        found[last] = max(found[last], phases[-1].peak_bytes)
        return tuple(found)
