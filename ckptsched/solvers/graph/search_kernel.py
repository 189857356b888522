"""Which node runs in which phase, as a table: its bytes and seconds, and a search through tables.

A phase ends with Turn, or with one Backward: phase 0 with Turn, phase k with that of node
n + 1 - k. In a phase each node runs at most once, in the order of the nodes. In what follows k is
a phase, v a node, u a state that it reads, e a place in the flat list of all reads, and w a node
that reads v. State 0 is the input. Every table in which phase 0 runs every node and each node is
run with tape once, no later than in the phase of its Backward, is a schedule: what is dropped
when follows from the last needs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...base.jit import compiled
from ...schedule.language import Backward, Forward, Schedule, Turn

Integers = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]
Flags = npt.NDArray[np.uint8]

# What a node does in a phase.
NOTHING, BARE, TAPED = range(3)
# Random numbers that a move takes.
DRAWS = 8


class Network(NamedTuple):
    """Figures of a graph of n nodes; index 0 is the input."""

    first: Integers
    """Node v reads source[first[v]] to source[first[v + 1] - 1]."""
    source: Integers
    first_from: Integers
    """State v is read by reader[first_from[v]] to reader[first_from[v + 1] - 1]."""
    reader: Integers
    state: Integers
    """Bytes of each state."""
    tape: Integers
    """Bytes of each tape, its state included."""
    overhead: Integers
    """Extra bytes while a node runs."""
    seconds: Seconds
    """Seconds of one run without tape."""
    level: Integers
    """By phase: bytes of all but states and tapes while it goes on."""
    ending: Integers
    """By phase: bytes that its Turn or Backward takes besides."""


class Table(NamedTuple):
    """What runs when."""

    runs: Flags
    """What each node does in each phase, shape (n + 1, n + 1): phase, node."""
    taped: Integers
    """The phase in which each node is run with tape."""
    low: Integers
    """By phase: no node below it runs."""
    high: Integers
    """By phase: no node above it runs."""


class Scratch(NamedTuple):
    """Room for one look at a table, and for taking a move back."""

    needed: Flags
    """By state: whether it lies by itself at the point that the look has come to."""
    kept: Flags
    """By node: whether its tape lies there."""
    idle: Integers
    """Runs that nothing needs, as phase * (n + 1) + node."""
    changed: Integers
    """Cells that a move has changed, with what they were: three numbers each."""
    moved: Integers
    """Nodes whose tape a move has moved, with its phase before."""
    counts: Integers
    """How much of `idle`, `changed` and `moved` is filled."""


IDLE, CHANGED, MOVED = range(3)


def scratch(n: int) -> Scratch:
    """Room for a graph of n nodes."""
    return Scratch(
        needed=np.zeros(n + 1, np.uint8),
        kept=np.zeros(n + 1, np.uint8),
        idle=np.zeros((n + 1) ** 2, np.int64),
        changed=np.zeros(3 * 8 * (n + 1), np.int64),
        moved=np.zeros(2 * (n + 1), np.int64),
        counts=np.zeros(3, np.int64),
    )


def table_of(n: int, schedule: Schedule) -> Table:
    """What runs when in a schedule for n nodes whose Backwards come in the reverse order."""
    table = Table(
        runs=np.zeros((n + 1, n + 1), np.uint8),
        taped=np.zeros(n + 1, np.int64),
        low=np.full(n + 1, n + 1, np.int64),
        high=np.zeros(n + 1, np.int64),
    )
    k = 0
    for operation in schedule:
        match operation:
            case Forward(v, tape=tape):
                table.runs[k, v] = TAPED if tape else max(table.runs[k, v], BARE)
                table.low[k], table.high[k] = min(table.low[k], v), max(table.high[k], v)
                if tape:
                    table.taped[v] = k
            case Turn() | Backward():
                k += 1
    return table


@compiled
def look(net: Network, table: Table, room: Scratch) -> tuple[int, float]:
    """The peak of a table's schedule, and the seconds of its runs without tape.

    The look goes from the end to the start, as what must lie at a point follows from what comes
    after it. Where a tape is made while both the bare state and the tape that holds it are
    there, the rules have it keep the bare one; here it may go a little early, so that the
    simulator has the last word.

    Args:
        net: The graph.
        table: What runs when.
        room: For the look; `idle` is filled.

    Returns:
        Bytes and seconds.
    """
    needed, kept = room.needed, room.kept
    needed[:] = 0
    kept[:] = 0
    n = len(net.state) - 1
    level, peak, seconds, idle = 0, 0, 0.0, 0
    for k in range(n, -1, -1):
        if k:
            b = n + 1 - k
            kept[b] = 1
            level += net.tape[b]
            for e in range(net.first[b], net.first[b + 1]):
                u = net.source[e]
                if not needed[u] and (not kept[u] or table.taped[b] < table.taped[u]):
                    needed[u] = 1
                    level += net.state[u]
        elif not needed[n] and not kept[n]:
            needed[n] = 1
            level += net.state[n]
        peak = max(peak, level + net.level[k] + net.ending[k])
        for v in range(table.high[k], table.low[k] - 1, -1):
            run = table.runs[k, v]
            if run == NOTHING:
                continue
            if run == TAPED:
                kept[v] = 0
                size = net.tape[v]
            elif needed[v] and not _is_held(net, kept, v):
                needed[v] = 0
                size = net.state[v]
                seconds += net.seconds[v]
            else:
                room.idle[idle] = k * (n + 1) + v
                idle += 1
                continue
            level -= size
            for e in range(net.first[v], net.first[v + 1]):
                u = net.source[e]
                if not needed[u] and not kept[u]:
                    needed[u] = 1
                    level += net.state[u]
            peak = max(peak, level + size + net.overhead[v] + net.level[k])
    room.counts[IDLE] = idle
    return peak, seconds


@compiled
def _is_held(net: Network, kept: Flags, v: int) -> bool:
    """Whether the tape of a reader holds state v, so that it has been there all along."""
    held = False
    for e in range(net.first_from[v], net.first_from[v + 1]):
        held = held or kept[net.reader[e]] != 0
    return held


@compiled
def _set(table: Table, room: Scratch, k: int, v: int, run: int) -> None:
    """Change a cell, and note what it was."""
    at = room.counts[CHANGED]
    if table.runs[k, v] == run or 3 * at + 3 > len(room.changed):
        return
    room.changed[3 * at] = k
    room.changed[3 * at + 1] = v
    room.changed[3 * at + 2] = table.runs[k, v]
    room.counts[CHANGED] = at + 1
    table.runs[k, v] = run
    table.low[k] = min(table.low[k], v)
    table.high[k] = max(table.high[k], v)


@compiled
def take_back(table: Table, room: Scratch) -> None:
    """Take the last move back."""
    for at in range(room.counts[CHANGED] - 1, -1, -1):
        k, v = room.changed[3 * at], room.changed[3 * at + 1]
        table.runs[k, v] = room.changed[3 * at + 2]
    for at in range(room.counts[MOVED] - 1, -1, -1):
        table.taped[room.moved[2 * at]] = room.moved[2 * at + 1]


@compiled
def clean(table: Table, room: Scratch, n: int) -> None:
    """Take out what the last look found idle, and draw the borders of phases in."""
    for at in range(room.counts[IDLE]):
        k, v = room.idle[at] // (n + 1), room.idle[at] % (n + 1)
        if k:
            table.runs[k, v] = NOTHING
    for at in range(room.counts[CHANGED]):
        k = room.changed[3 * at]
        while table.low[k] <= table.high[k] and table.runs[k, table.low[k]] == NOTHING:
            table.low[k] += 1
        while table.high[k] >= table.low[k] and table.runs[k, table.high[k]] == NOTHING:
            table.high[k] -= 1
        if table.high[k] < table.low[k]:
            table.low[k], table.high[k] = n + 1, 0


@compiled
def _tape_at(table: Table, room: Scratch, v: int, k: int, leave: bool) -> None:
    """Run a node with tape in another phase.

    Args:
        table: To be changed.
        room: Where the change is noted.
        v: The node.
        k: The phase.
        leave: Whether a run without tape is left where the tape was made.
    """
    old, at = table.taped[v], room.counts[MOVED]
    if old == k or 2 * at + 2 > len(room.moved):
        return
    room.moved[2 * at], room.moved[2 * at + 1] = v, old
    room.counts[MOVED] = at + 1
    table.taped[v] = k
    _set(table, room, old, v, BARE if leave or old == 0 else NOTHING)
    _set(table, room, k, v, TAPED)


@compiled
def _busy_phase(table: Table, n: int, share: float) -> int:
    """A phase after the first in which something runs, from a random one on; 0 if there is none."""
    begin = int(share * n)
    for step in range(n):
        k = 1 + (begin + step) % n
        if table.low[k] <= table.high[k]:
            return k
    return 0


@compiled
def move(table: Table, room: Scratch, draws: Seconds, n: int) -> None:
    """Change a table at random: runs of an interval of nodes, or where they are taped.

    Args:
        table: To be changed.
        room: Where the change is noted.
        draws: `DRAWS` numbers from 0 to 1.
        n: Number of nodes.
    """
    room.counts[CHANGED] = room.counts[MOVED] = 0
    a = 1 + int(draws[1] * n)
    b = min(n, a + int(draws[2] ** 4 * n))
    if draws[0] < 0.4:
        where = draws[3]
        for v in range(b, a - 1, -1):
            last = n + 1 - v
            if where < 0.2:
                k = 0
            elif where < 0.4:
                k = n + 1 - b
            elif where < 0.5:
                k = last
            elif where < 0.7:
                k = table.taped[min(n, b + 1)]
            elif where < 0.9:
                k = table.taped[max(1, a - 1)]
            else:
                k = int(draws[4] * (last + 1))
            _tape_at(table, room, v, min(k, last), draws[5] < 0.5)
        return
    if draws[0] < 0.7:
        k = table.taped[1 + int(draws[3] * n)] if draws[4] < 0.5 else 1 + int(draws[3] * n)
        if k:
            for v in range(a, min(b, n + 1 - k) + 1):
                if table.runs[k, v] == NOTHING:
                    _set(table, room, k, v, BARE)
        return
    k = _busy_phase(table, n, draws[3])
    if not k:
        return
    wide = table.high[k] - table.low[k] + 1
    a = table.low[k] + int(draws[1] * wide)
    b = min(table.high[k], a + int(draws[2] ** 2 * wide))
    other = 0
    if draws[0] > 0.85:
        other = 1 + int(draws[4] * n) if draws[5] < 0.5 else k + (1 if draws[4] < 0.5 else -1)
        if other > n:
            other = 0
    for v in range(a, b + 1):
        if table.runs[k, v] == BARE:
            _set(table, room, k, v, NOTHING)
            if other and v <= n + 1 - other and table.runs[other, v] == NOTHING:
                _set(table, room, other, v, BARE)


@compiled
def copy(target: Table, table: Table) -> None:
    """Make a table the same as another.

    By elements: assigning a slice takes seconds longer to compile, for the message of its error.
    """
    for k in range(table.runs.shape[0]):
        for v in range(table.runs.shape[1]):
            target.runs[k, v] = table.runs[k, v]
        target.taped[k] = table.taped[k]
        target.low[k] = table.low[k]
        target.high[k] = table.high[k]


@compiled
def is_taken(now: float, value: float, draw: float, heat: float) -> bool:
    """Whether a search goes on from a change: always from one for the better, by chance if not."""
    return now <= value or draw < math.exp((value - now) / heat)


@compiled
def is_better(peak: int, seconds: float, budget: int, found: Seconds) -> bool:
    """Whether a table is better than the best one, of which `found` tells as in `anneal`."""
    fits, fitted = peak <= budget, found[0] <= budget
    if fits:
        return not fitted or seconds < found[1]
    return not fitted and peak < found[0]


@compiled
def anneal(
    net: Network,
    table: Table,
    best: Table,
    room: Scratch,
    draws: Seconds,
    budget: int,
    price: float,
    heat: Seconds,
    found: Seconds,
) -> None:
    """Try moves; keep those that make it better, and by chance some that do not.

    Args:
        net: The graph.
        table: Where the search is; changed.
        best: The best table that fits, to be replaced by better ones.
        room: Scratch.
        draws: Random numbers, shape (moves, DRAWS).
        budget: Bytes that the peak may reach.
        price: Seconds that a byte above the budget counts as.
        heat: For each move the seconds by which a change for the worse is often taken.
        found: Peak in bytes and seconds of `best`, to be replaced: shape (2,). While the peak is
            above the budget a smaller one is better, else fewer seconds are.
    """
    n = len(net.state) - 1
    peak, seconds = look(net, table, room)
    value = seconds + price * max(0, peak - budget)
    for m in range(len(draws)):
        move(table, room, draws[m], n)
        if room.counts[CHANGED] == 0:
            continue
        peak, seconds = look(net, table, room)
        now = seconds + price * max(0, peak - budget)
        if not is_taken(now, value, draws[m, 6], heat[m]):
            take_back(table, room)
            continue
        value = now
        clean(table, room, n)
        if is_better(peak, seconds, budget, found):
            found[0], found[1] = peak, seconds
            copy(best, table)
