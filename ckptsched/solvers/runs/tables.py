"""Tables of the recurrence on a chain of runs.

The recurrence is that of `tables`. Segments inside one run depend on their length alone: a
row a length. Segments of several runs are kept in *lines*: all that have one end, for every start
and every number of slots. Ends are those of a mesh, a few a run, and a line is filled from those
with earlier ends, at the starts of the mesh; where a segment splits in the run of its first stage,
all splits count. So a table has some hundred lines, and what is lost is in the choice of the few
places at which a left part of several runs starts and ends.

A segment's position is the number of stages from its first one to the end of the chain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, final

import numpy as np
import numpy.typing as npt

from ...base.progress import report
from .find_runs import Limits, Runs, RunSlots, run_slots

if TYPE_CHECKING:
    from .table_kernel import Entries, InRun, Mesh

Numbers: TypeAlias = npt.NDArray[np.float32]
End: TypeAlias = tuple[int, int]
"""Run of a segment's last stage, and the stage's number in the run; (R, 0) for the loss."""

# Numbers that are filled between two looks for Ctrl-C: some tenths of a second.
_NUMBERS_AT_ONCE = 2e6
_ADDITIONS_AT_ONCE = 5e9
# Where it takes no more additions (a second or two), all splits are tried.
_MOST_ADDITIONS = 2e10
# Runs of fewer stages do not count as long, where it is asked how far back a line reaches.
_LONG = 8
# Stages next to a run's ends that are ends and starts of the mesh in any case.
_MARGIN = 2


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """How the schedule of a segment begins."""

    left: End | None
    """The end of the left part where it splits; None where its first stage is taped."""
    rest: int = 0
    """The position of what follows."""
    slots: int = 0
    """What that has less."""
    peels: bool = False
    """Whether what follows is reversed stage by stage, each swept to from the start."""


@final
class RunTable:
    """Extra seconds of segments for every number of slots up to `top`."""

    def __init__(self, runs: Runs, unit: int, top: int, *, ends: int, starts: int) -> None:
        """Fill the lines of the mesh.

        Args:
            runs: The runs, with the sizes to plan with.
            unit: Bytes of a slot; sizes are rounded to the nearest.
            top: Most slots of interest.
            ends: Ends of lines in a long run, about; 0 for those next to its own ends alone.
            starts: Starts in a long run from which another run may be split, likewise.
        """
        self.runs, self.unit, self.top = runs, unit, top
        # Where all seconds are equal, runs are counted: whole numbers add up without rounding.
        same = bool((runs.seconds == runs.seconds[0]).all()) and runs.seconds[0] > 0
        self.scale = float(runs.seconds[0]) if same else 1.0
        self.seconds = np.ones_like(runs.seconds) if same else runs.seconds
        self.slots: RunSlots = run_slots(replace(runs, seconds=self.seconds), unit, "nearest")
        line_of, stage, point_of, place = [0], [], [0], []
        for count, end in zip(runs.count.tolist(), self.slots.end.tolist(), strict=True):
            lines = _margins(count) | (_ends(count, ends) if ends else set())
            stage += sorted(lines)
            line_of.append(len(stage))
            after = {count - x for x in lines}  # what follows a split there
            after |= _margins(count) | (_starts(count, starts) if starts else set())
            place += [end + x for x in sorted(after) if x]
            point_of.append(len(place))
        self.mesh, numbers = self._place(line_of, stage, point_of, place)
        self.crossing = np.full(numbers, np.inf, np.float32)
        self.rows = self._in_run()
        self.entries = self._entries()
        self._fill()
        self.whole = self.line_to(self.loss, runs.stages, top)

    @property
    def loss(self) -> End:
        """The end of the whole chain."""
        return len(self.runs), 0

    @property
    def extra_seconds(self) -> Numbers:
        """Extra seconds of the whole chain by slots, shape (top + 1,)."""
        row: Numbers = self.whole.values[:, -1] * np.float32(self.scale)
        return row

    def run_at(self, place: int) -> int:
        """The run of a segment's first stage; R for the loss."""
        if place == 0:
            return len(self.runs)
        return int(np.searchsorted(self.runs.first, self.stage_at(place), side="right")) - 1

    def stage_at(self, place: int) -> int:
        """A segment's first stage."""
        return self.runs.stages + 1 - place

    def stage_of(self, end: End) -> int:
        """The stage that an end stands for; n + 1 for the loss."""
        if end == self.loss:
            return self.runs.stages + 1
        return int(self.runs.first[end[0]]) + end[1] - 1

    def in_run(self, r: int, m: int) -> tuple[Numbers, int, Limits, float]:
        """The table of segments in run r, and what its loops take.

        Returns:
            Extra seconds by slots and length, the row of m slots, what a state and a tape take
            and what a stage with tape and sweeps need in such rows, and a stage's seconds,
            in what `scale` says.
        """
        zero, unit = int(self.rows.zero[r]), int(self.rows.unit[r])
        width = int(self.runs.count[r]) + 1
        height = self.top // unit + 1
        values = self.rows.values[zero : zero + width * height].reshape(height, width)
        return values, m // unit, _limits(self.slots, r, unit), float(self.seconds[r])

    def line_to(self, end: End, place: int, m: int) -> Line:
        """All segments with one end, from a position and a number of slots down."""
        values = np.empty((m + 1, place + 1), np.float32)
        self._fill_line(end, values, self.run_at(place))
        return Line(self, end, values)

    def _place(
        self, line_of: list[int], stage: list[int], point_of: list[int], place: list[int]
    ) -> tuple[Mesh, int]:
        """The mesh, and how many numbers its lines have at its starts."""
        from . import table_kernel as run_kernel

        run = np.repeat(np.arange(len(self.runs)), np.diff(line_of))
        reach = [self._reach((int(r), own)) for r, own in zip(run, stage, strict=True)]
        of = np.array(point_of)
        width = of[run + 1] - of[reach]
        zero = np.cumsum(np.append(0, (self.top + 1) * width))
        columns = (line_of, stage, point_of, place, of[reach], zero[:-1])
        mesh = run_kernel.Mesh(*(np.array(x, dtype=np.int64) for x in columns))
        return mesh, int(zero[-1])

    def _left(self, k: int, m: int) -> int:
        """Where the numbers of a line in m slots lie, less its first point."""
        mesh = self.mesh
        run = int(np.searchsorted(mesh.line_of, k, side="right")) - 1
        width = int(mesh.point_of[run + 1] - mesh.least[k])
        return int(mesh.zero[k]) + m * width - int(mesh.least[k])

    def left_seconds(self, k: int, m: int, p: int) -> float:
        """Extra seconds of the segment from a start of the mesh to the end of a line."""
        if p < self.mesh.least[k]:
            return math.inf
        return float(self.crossing[self._left(k, m) + p])

    def _in_run(self) -> InRun:
        from . import table_kernel as run_kernel

        slots = self.slots
        units, tables = [], []
        for r in range(len(self.runs)):
            unit = math.gcd(*_limits(slots, r)) or 1
            count = int(slots.stages[r])
            values = np.empty((self.top // unit + 1, count + 1), np.float32)
            limits, seconds = _limits(slots, r, unit), float(slots.seconds[r])
            exact = count**2 / 2 * len(values) <= _MOST_ADDITIONS
            cost = count**2 / 2 if exact else 250 * count
            step = max(1, int(_ADDITIONS_AT_ONCE / cost))
            for m in range(0, len(values), step):
                last = min(m + step, len(values)) - 1
                report(f"segments of {count} equal stages", m / len(values))
                run_kernel.fill_in_run(values, count, limits, seconds, exact, m, last)
            units.append(unit)
            tables.append(values.ravel())
        zero = np.cumsum([0, *(len(table) for table in tables)])[:-1]
        return run_kernel.InRun(np.concatenate(tables), zero, np.array(units))

    def _entries(self) -> Entries:
        from . import table_kernel as run_kernel

        counts, zero, tables, numbers = self.runs.count, [], [np.empty(0, np.float32)], 0
        for r, count in enumerate(counts.tolist()):
            if r == 0 or count == 1 or counts[r - 1] > 1:
                zero.append(-1)
                continue
            inside, _, _, _ = self.in_run(r, 0)
            values = np.empty((self.top + 1, count + 1), np.float32)
            exact = count**2 / 2 * len(values) <= _MOST_ADDITIONS / len(counts)
            step = max(1, int(_ADDITIONS_AT_ONCE / (count**2 / 2 if exact else 250 * count)))
            for m in range(0, len(values), step):
                last = min(m + step, len(values)) - 1
                unit = int(self.rows.unit[r])
                run_kernel.fill_entry(values, self.slots, inside, unit, r, exact, m, last)
            zero.append(numbers)
            tables.append(values.ravel())
            numbers += values.size
        return run_kernel.Entries(np.concatenate(tables), np.array(zero, dtype=np.int64))

    def entry(self, r: int, m: int) -> Numbers | None:
        """Extra seconds of a single stage and the first stages of run r after it, by their number.

        Args:
            r: A run.
            m: Slots.
        """
        if r >= len(self.runs) or self.entries.zero[r] < 0:
            return None
        width = int(self.runs.count[r]) + 1
        zero = int(self.entries.zero[r]) + m * width
        row: Numbers = self.entries.values[zero : zero + width]
        return row

    def _fill(self) -> None:
        mesh, runs = self.mesh, self.runs
        buffer = np.empty((self.top + 1, runs.stages + 1), np.float32)
        what = f"table of {runs.stages} stages in {len(runs)} runs and {self.top} slots"
        for r in range(len(runs)):
            for k in range(int(mesh.line_of[r]), int(mesh.line_of[r + 1])):
                end = r, int(mesh.stage[k])
                report(what, k / (len(mesh.stage) + 1))
                self._fill_line(end, buffer, self._reach(end))
                points = slice(int(mesh.least[k]), int(mesh.point_of[r + 1]))
                numbers = buffer[:, mesh.place[points]]
                zero = int(mesh.zero[k])
                self.crossing[zero : zero + numbers.size] = numbers.ravel()

    def _reach(self, end: End) -> int:
        """The first run in which a left part with this end may start.

        Left parts that end inside a run hardly ever start before the last long run before it.
        """
        r, stage = end
        if stage == self.runs.count[r]:
            return 0
        before = np.flatnonzero(self.runs.count[:r] >= _LONG)
        return int(before[-1]) if len(before) else 0

    def _fill_line(self, end: End, values: Numbers, low: int) -> None:
        from . import table_kernel as run_kernel

        rows, width = values.shape
        additions = float((self.runs.count.astype(np.float64) ** 2).sum()) / 2
        exact = bool(end == self.loss and additions * rows <= _MOST_ADDITIONS)
        step = max(1, int(_NUMBERS_AT_ONCE / width))
        if exact:
            step = max(1, int(_ADDITIONS_AT_ONCE / additions))
        for first in range(0, rows, step):
            last = min(first + step, rows) - 1
            tables = (self.slots, self.rows, self.entries, self.mesh, self.crossing)
            run_kernel.fill_line(values, *tables, end, low, exact, first, last)


@final
class Line:
    """All segments with one end."""

    def __init__(self, table: RunTable, end: End, values: Numbers) -> None:
        """Take the line's numbers, by slots and position."""
        self.table, self.end, self.values = table, end, values

    def choose(self, place: int, m: int) -> Choice:
        """The beginning of least extra seconds; taping where it is as good as splitting."""
        table, slots, b = self.table, self.table.slots, self.end[0]
        a = table.run_at(place)
        best, choice = math.inf, Choice(None)
        tape, keep = int(slots.tape[a]), int(slots.keep[a])
        if m >= max(tape, int(slots.taped[a, b])):
            best, choice = self._number(place - 1, m - tape), Choice(None, place - 1, tape)
        values, row, _, seconds = table.in_run(a, m)
        most = place - int(slots.end[a])
        if m < max(keep, int(slots.alone[a, b])):
            most = 0
        elif m < slots.pair[a, b]:
            most = min(most, 1)
        if most:
            lengths = np.arange(1, most + 1)
            costs = values[row, 1 : most + 1] + seconds * lengths
            costs = costs + self.values[m - keep, place - lengths]
            i = int(costs.argmin())
            if costs[i] < best:
                last = int(slots.stages[a]) - (place - int(slots.end[a])) + i + 1
                best, choice = float(costs[i]), Choice((a, last), place - i - 1, keep)
        best, choice = self._enter(a, place, m, best, choice)
        return self._cross(a, place, m, best, choice)

    def _enter(
        self, a: int, place: int, m: int, best: float, choice: Choice
    ) -> tuple[float, Choice]:
        """Splits in the run after a single stage."""
        slots, (b, stage) = self.table.slots, self.end
        c = a + 1
        left = self.table.entry(c, m)
        if left is None or c > b:
            return best, choice
        keep = int(slots.keep[c])
        most = stage - 1 if c == b else int(slots.stages[c])
        if m < slots.cross[a, c, b, 0, 1]:
            most = min(most, 1)
        least = 1 if m >= slots.cross[a, c, b, 0, 0] else 2
        if m < keep or least > most:
            return best, choice
        stages = np.arange(least, most + 1)
        after = int(slots.end[c] + slots.stages[c]) - stages
        costs = slots.elapsed[place] - slots.elapsed[after] + left[stages]
        costs = costs + self.values[m - keep, after]
        i = int(costs.argmin())
        if costs[i] < best:
            return float(costs[i]), Choice((c, int(stages[i])), int(after[i]), keep)
        return best, choice

    def _number(self, place: int, m: int) -> float:
        return float(self.values[m, place])

    def _cross(self, a: int, place: int, m: int, best: float, choice: Choice) -> Choice:
        """Splits in later runs, where the position is one of the mesh."""
        table, mesh, slots = self.table, self.table.mesh, self.table.slots
        p = int(np.searchsorted(mesh.place[mesh.point_of[a] : mesh.point_of[a + 1]], place))
        p += int(mesh.point_of[a])
        if p == mesh.point_of[a + 1] or mesh.place[p] != place:
            return choice
        x = int(place > slots.end[a] + 1)
        b, stage = self.end
        for c in range(a + 1, min(b, len(table.runs) - 1) + 1):
            for k in range(int(mesh.line_of[c]), int(mesh.line_of[c + 1])):
                own = int(mesh.stage[k])
                if c == b and own >= stage:
                    break
                need = int(slots.cross[a, c, b, x, int(own > 1)])
                keep = int(slots.keep[c])
                if m < max(need, keep):
                    break
                rest = int(slots.end[c] + slots.stages[c]) - own
                swept = float(slots.elapsed[place] - slots.elapsed[rest])
                found = swept + table.left_seconds(k, m, p) + self._number(rest, m - keep)
                if found < best:
                    best, choice = found, Choice((c, own), rest, keep)
        return self._peel(place, p, m, best, choice)

    def _peel(self, place: int, p: int, m: int, best: float, choice: Choice) -> Choice:
        table, mesh, slots = self.table, self.table.mesh, self.table.slots
        b, stage = self.end
        a = table.run_at(place)
        if b == len(table.runs) or m < slots.cross[a, b, b, 1, 1]:
            return choice
        lines = range(int(mesh.line_of[b]), int(mesh.line_of[b + 1]))
        earlier = [k for k in lines if mesh.stage[k] < stage][-1:]
        if earlier and p < mesh.least[earlier[0]]:
            earlier = []  # down to the end of the run before
        k = earlier[0] if earlier else lines[0] - 1
        own, keep = (int(mesh.stage[k]), 0) if earlier else (0, int(slots.keep[b - 1]))
        keep = max(keep, int(slots.keep[b]))
        if m < keep + slots.taped[b, b]:
            return choice
        peeled = stage - own
        rest = int(slots.end[b] + slots.stages[b]) - own
        found = peeled * float(slots.elapsed[place] - slots.elapsed[rest])
        found += float(slots.seconds[b]) * peeled * (peeled - 1) / 2
        found += table.left_seconds(k, m, p)
        if found < best:
            left = (b, own) if own else (b - 1, int(slots.stages[b - 1]))
            return Choice(left, peels=True)
        return choice


def _limits(slots: RunSlots, r: int, unit: int = 1) -> Limits:
    """What a state and a tape take, and a stage with tape and sweeps need, inside run r."""
    keep, tape, taped = int(slots.keep[r]), int(slots.tape[r]), int(slots.taped[r, r])
    alone, pair = int(slots.alone[r, r]), int(slots.pair[r, r])
    return keep // unit, tape // unit, taped // unit, alone // unit, pair // unit


def _ends(count: int, number: int) -> set[int]:
    """Numbers of stages at which lines end: evenly spaced, and closer at the run's start."""
    gap = count / number
    found = {count, *(max(1, round(gap * k)) for k in range(1, number))}
    while gap >= 2:
        gap /= 4
        found.add(max(1, round(gap)))
    return found


def _starts(count: int, number: int) -> set[int]:
    """Lengths that a segment may have in its first run: evenly spaced, closer at both ends."""
    gap = count / number
    found = {count, *(max(1, round(gap * k)) for k in range(1, number))}
    while gap >= 1.5:
        gap /= 1.6
        found |= {max(1, round(gap)), max(1, count - round(gap))}
    return found


def _margins(count: int) -> set[int]:
    """The first and the last stages, which decide on the least memory."""
    return {x for k in range(_MARGIN) for x in (1 + k, count - k) if 1 <= x <= count}
