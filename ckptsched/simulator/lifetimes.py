"""What lives how long under a schedule: each value and storage with its bytes, from when to when.

One list serves every picture of a step over time: what is live while an operation runs, the bytes
by role, a snapshot for a memory viewer. It adds up to the timeline that the simulator judges by.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from ..base.budget import Tier
from ..schedule.language import Backward, Code, Copy, Drop, Forward, Kind, Operation, Schedule, Turn
from ..workload.chain import Chain
from ..workload.graph import Graph
from .exact_bytes import Ledger
from .exact_bytes_kernel import LOSS, NEVER
from .value_bytes import ValueLedger, runs_of


class Role(enum.IntEnum):
    """What bytes are there for."""

    STATE = 0
    """Outputs of stages (and the input), stored or held by a tape."""
    TAPE = 1
    """What a tape keeps besides; in the planning model with the state that it holds."""
    GRADIENT = 2
    """Gradients with respect to states."""
    PARAMETERS = 3
    """Gradients of parameters."""
    OUTPUT = 4
    """The model's output and the loss, which the caller holds."""
    RANDOM = 5
    """Random and hidden states, to run a stage again as it ran first."""
    BUFFERS = 6
    """Copies of buffers, while their block runs again."""
    KEPT = 7
    """Hidden state as the step began, and what modules keep as attributes."""


@final
@dataclass(frozen=True, eq=False)
class Lifetimes:
    """What is live while each of m operations runs, in columns; rows by their beginning."""

    role: npt.NDArray[np.int64]
    """The `Role` of each."""
    stage: npt.NDArray[np.int64]
    """The stage whose state, tape or gradient it is; 0 for the input's, and where it is of none."""
    size: npt.NDArray[np.int64]
    """Bytes of each."""
    since: npt.NDArray[np.int64]
    """The first operation that finds it there."""
    until: npt.NDArray[np.int64]
    """The first operation that does not any more; m where it outlives the step."""
    transient: npt.NDArray[np.int64]
    """Bytes that each operation takes while it runs, what it makes included, shape (m,)."""

    def bytes_by_role(self) -> npt.NDArray[np.int64]:
        """Bytes that each operation finds there, shape (roles, m); the transient ones apart."""
        change = np.zeros((len(Role), len(self.transient) + 1), dtype=np.int64)
        np.add.at(change, (self.role, self.since), self.size)
        np.add.at(change, (self.role, self.until), -self.size)
        found: npt.NDArray[np.int64] = np.cumsum(change, axis=1)[:, :-1]
        return found


def lifetimes(
    chain: Chain | Graph, schedule: Schedule, timeline: npt.NDArray[np.int64]
) -> Lifetimes:
    """Find what lives how long.

    Args:
        chain: The chain or graph.
        schedule: A schedule that the simulator has found valid.
        timeline: Its bytes while each operation runs, as the simulator found them: from the
            ledger where the chain has one.
    """
    book = _Book(len(schedule))
    if not chain.has_ledger:
        _write_planned(book, chain, schedule)
    elif isinstance(chain, Graph):
        _write_by_value(book, chain, schedule)
    else:
        _write_exact(book, chain, schedule)
    found = book.close(np.array(timeline, dtype=np.int64))
    found.transient[:] -= found.bytes_by_role().sum(axis=0)
    return found


@final
@dataclass(eq=False)
class _Book:
    """Rows that are begun and ended as a schedule is walked through."""

    operations: int
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    open: dict[tuple[Role, int], tuple[int, int]] = field(default_factory=dict)

    def begin(self, role: Role, stage: int, size: int, since: int) -> None:
        """Something of a stage is there from an operation on."""
        self.open[role, stage] = size, since

    def end(self, role: Role, stage: int, until: int) -> None:
        """It is there no longer; nothing happens where it was not."""
        if (role, stage) in self.open:
            size, since = self.open.pop((role, stage))
            self.add(role, stage, size, since, until)

    def add(self, role: Role, stage: int, size: int, since: int, until: int | None = None) -> None:
        """Something of known beginning and end; None for the end of the step."""
        until = self.operations if until is None else min(until, self.operations)
        if size and since < until:
            self.rows.append((since, int(role), stage, size, until))

    def close(self, timeline: npt.NDArray[np.int64]) -> Lifetimes:
        """All of it in columns; what is still open outlives the step."""
        for role, stage in list(self.open):
            self.end(role, stage, self.operations)
        columns = np.array(sorted(self.rows), dtype=np.int64).reshape(-1, 5).T
        since, roles, stages, sizes, until = columns
        return Lifetimes(roles, stages, sizes, since, until, timeline)


_ROLES = {Kind.STATE: Role.STATE, Kind.TAPE: Role.TAPE, Kind.GRAD: Role.GRADIENT}


def _write_planned(book: _Book, chain: Chain | Graph, schedule: Schedule) -> None:
    """By the planning model's sizes: a tape has the state that it holds."""
    n, columns = len(chain), chain.arrays
    states, gradients = columns.state_bytes.tolist(), columns.gradient_bytes.tolist()
    parameters = columns.parameter_gradient_bytes.tolist()
    tapes = dict[int, int]()  # bytes of the tape of each stage that has or had one
    reads: Callable[[int], tuple[int, ...]] = (
        (lambda i: chain.reads[i - 1]) if isinstance(chain, Graph) else (lambda i: (i - 1,))
    )
    book.begin(Role.STATE, 0, states[0], 0)
    book.add(Role.OUTPUT, n, chain.held_bytes, 0)

    def size_of(kind: Kind, i: int) -> int:
        return int((states, tapes, gradients)[kind][i])

    for p, operation in enumerate(schedule):
        now = p + 1
        match operation:
            case Forward(i, tape, option):
                if tape:
                    tapes[i] = chain.stages[i - 1].tapes[option].tape_bytes
                book.begin(
                    Role.TAPE if tape else Role.STATE, i, (tapes if tape else states)[i], now
                )
            case Turn():
                book.begin(Role.GRADIENT, n, gradients[n], now)
            case Backward(i):
                book.end(Role.TAPE, i, now)
                book.end(Role.GRADIENT, i, now)
                book.add(Role.PARAMETERS, i, parameters[i], now)
                for source in reads(i):
                    if (Role.GRADIENT, source) not in book.open:
                        book.begin(Role.GRADIENT, source, gradients[source], now)
            case Drop(value, Tier.DEVICE):
                book.end(_ROLES[value.kind], value.stage, now)
            case Copy(value, _, Tier.DEVICE):
                size = size_of(value.kind, value.stage)
                book.begin(_ROLES[value.kind], value.stage, size, now)
            case _:  # on other tiers
                pass


def _write_by_value(book: _Book, graph: Graph, schedule: Schedule) -> None:
    """By the ledger of the graph of a recorded model: drops change nothing."""
    runs = runs_of(schedule)
    ledger = ValueLedger(graph, len(runs))
    ledger.charge(runs)
    # What an operation leaves is found by the one after it, which may be a drop.
    after = [0, *(1 + np.flatnonzero(schedule.codes != Code.DROP)).tolist(), len(schedule)]
    for life in ledger.lives(runs):
        role = Role[life.role]
        book.add(role, life.stage, life.bytes, after[life.since], after[life.until])


def _write_exact(book: _Book, chain: Chain, schedule: Schedule) -> None:
    """By the ledger: storages as its pass has seen them, and what hangs on operations alone."""
    ledger = Ledger(chain, schedule)
    ledger.run(len(schedule))
    _write_storages(book, ledger)
    _write_segments(book, ledger)
    book.add(Role.KEPT, 0, chain.kept_bytes, 0)
    walk = _Walk(book, ledger)
    for p, operation in enumerate(schedule):
        walk.step(p, operation)


def _write_storages(book: _Book, ledger: Ledger) -> None:
    """Storages of states, and clones of buffers."""
    books, n = ledger.books, len(ledger.chain)
    for x in np.flatnonzero(books.since != NEVER).tolist():
        maker = int(books.maker[x])
        role = Role.BUFFERS if maker < 0 else Role.OUTPUT if maker == n else Role.STATE
        until = int(books.until[x])
        end = None if until == NEVER else until
        book.add(role, max(maker, 0), int(books.sizes[x]), int(books.since[x]), end)


def _write_segments(book: _Book, ledger: Ledger) -> None:
    """Random states to put back, while a block runs again."""
    replays = ledger.replays
    ends = [*replays.position[1:].tolist(), None]
    for k, (begin, end) in enumerate(zip(replays.position.tolist(), ends, strict=True)):
        if replays.first[k + 1] > replays.first[k]:
            book.add(Role.RANDOM, 0, ledger.random, begin, end)


@final
@dataclass(eq=False)
class _Walk:
    """What each operation makes and lets go besides storages."""

    book: _Book
    ledger: Ledger
    snapshots: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    """Of states that are stored or handed on by a tape: bytes, and since when."""

    def __post_init__(self) -> None:
        """Begin with the snapshot of the input."""
        self.snapshots["state", 0] = self.ledger.random * self.ledger.live.snapshots_input, 0

    def step(self, p: int, operation: Operation) -> None:
        """Do one operation."""
        book, ledger, stages, now = self.book, self.ledger, self.ledger.stages, p + 1
        n = len(ledger.chain)
        match operation:
            case Forward(i, tape, option):
                snapshot = int(stages.snapshots[i]) * bool(ledger.live.snapshots[p])
                if tape:
                    k = ledger.ledgers.of[i] + option
                    book.begin(Role.TAPE, i, int(ledger.ledgers.tape[k]), now)
                if not tape or ledger.live.keeps_output[p]:
                    self.snapshots["tape" if tape else "state", i] = snapshot, now
                if ledger.live.frees_input[p]:
                    self._let_go("tape", i - 1, now)
            case Turn():
                book.begin(Role.GRADIENT, n, int(stages.gradient[n]), now)
                book.add(Role.OUTPUT, 0, int(ledger.books.totals[LOSS]), now)
                if ledger.live.frees_input[p]:
                    self._let_go("tape", n, now)
            case Backward(i):
                self._drop_tape(i, now)
                book.end(Role.GRADIENT, i, now)
                book.begin(Role.GRADIENT, i - 1, int(stages.gradient[i - 1]), now)
                book.add(Role.PARAMETERS, i, int(stages.parameters[i]), now)
            case Drop(value):
                if value.kind is Kind.STATE:
                    self._let_go("state", value.stage, now)
                elif value.kind is Kind.TAPE:
                    self._drop_tape(value.stage, now)
                else:
                    book.end(Role.GRADIENT, value.stage, now)
            case Copy():  # which the ledger refuses
                raise AssertionError(operation)

    def _drop_tape(self, i: int, now: int) -> None:
        self.book.end(Role.TAPE, i, now)
        self._let_go("tape", i, now)

    def _let_go(self, holder: str, i: int, now: int) -> None:
        """The snapshot of a state that a tape hands on no more, or that is dropped."""
        size, since = self.snapshots.pop((holder, i), (0, 0))
        self.book.add(Role.RANDOM, i, size, since, now)
