"""Exact bytes of a schedule by value: on the graph of a recorded model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from ..base.errors import InvalidScheduleError
from ..base.jit import suited
from ..schedule.language import Code, Kind, Schedule, ScheduleBuilder
from ..schedule.trace import Live
from ..workload.graph import Graph
from ..workload.values import StageValues
from . import value_bytes_kernel as kernel
from .exact_bytes_arrays import ledgers_of, stages_of
from .liveness import snapshot_bytes

Integers = npt.NDArray[np.int64]

# Steps of the interpreter for an operation.
_STEPS = 60
_WORDS = {
    "KEPT": "hidden state, and what modules keep",
    "RANDOM": "random and hidden states",
    "GRADIENT": "gradients of states",
    "PARAMETERS": "parameter gradients",
    "BUFFERS": "copies of buffers",
}


def charge_values(graph: Graph, schedule: Schedule) -> Integers:
    """Charge a valid schedule for the graph of a recorded model, to the byte.

    Args:
        graph: One that knows the chain that it was made of.
        schedule: A schedule that the planning model has found valid.

    Returns:
        Bytes while each operation runs, shape (operations,). A drop of a state does nothing: a copy
        goes after it was read for the last time.

    Raises:
        InvalidScheduleError: It drops a tape, copies a value to another tier, or goes back through
            the nodes in another order than the reverse of their own.
    """
    runs = runs_of(schedule)
    ledger = ValueLedger(graph, len(runs))
    during = ledger.charge(runs)
    is_run = schedule.codes != Code.DROP
    before = np.cumsum(is_run) - 1  # a schedule begins with a run
    found: Integers = np.where(is_run, during[before], ledger.books.after[before])
    return found


def live_by_value(graph: Graph, schedule: Schedule, position: int, peak: int) -> tuple[Live, ...]:
    """What is live while an operation runs, the largest first.

    Args:
        graph: One that knows the chain that it was made of.
        schedule: A schedule that can be charged.
        position: Of the operation.
        peak: Bytes while it runs; those of nothing else are the operation's own.
    """
    runs = runs_of(schedule)
    ledger = ValueLedger(graph, len(runs))
    ledger.charge(runs)
    at = int(np.count_nonzero(schedule.codes[:position] != Code.DROP))
    sizes: dict[str, int] = {}
    for life in ledger.lives(runs):
        if life.since <= at < life.until:
            name = life.words(graph.names)
            sizes[name] = sizes.get(name, 0) + life.bytes
    sizes["the operation itself"] = peak - sum(sizes.values())
    found = [Live(name, size) for name, size in sizes.items()]
    return tuple(sorted((x for x in found if x.bytes), key=lambda x: -x.bytes))


def with_drops_by_value(graph: Graph, runs: Integers) -> Schedule:
    """The schedule of some runs: each copy goes right after it was read for the last time.

    Args:
        graph: One that knows the chain that it was made of.
        runs: Runs, Turn and Backwards, packed as `Schedule` packs them.
    """
    ledger = ValueLedger(graph, len(runs))
    ledger.charge(runs)
    last, n = ledger.books.last, len(graph)
    bare = np.flatnonzero(runs & 0xFF == Code.FORWARD)
    drops: list[list[int]] = [[] for _ in runs]
    read = {read.maker for each in ledger.chain.values for read in each.reads} | {n}
    for p in bare.tolist():
        i = int(runs[p]) >> 32
        # By the rules the last node reads what no other does; there is nothing in it.
        unread = i not in read and ledger.books.first_run[i] == p
        drops[ledger.books.gone[n] if unread else last[p]].append(i)
    builder = ScheduleBuilder()
    for packed, gone in zip(runs.tolist(), drops, strict=True):
        builder.packed(packed)
        for i in gone:
            builder.drop_state(i)
    builder.drop_state(0)
    return builder.build()


@final
@dataclass(frozen=True, slots=True)
class ValueLiveness:
    """How long copies and snapshots are needed by value, by position in the schedule."""

    keeps: frozenset[int]
    """Runs whose copy is read later."""
    snapshots: frozenset[int]
    """Runs before which a snapshot of random and hidden state is taken, that of their stage."""
    restores: frozenset[int]
    """Runs before which that of their stage is put back."""
    forgets: frozenset[int]
    """Those of them that are the last."""
    frees: dict[int, tuple[int, ...]]
    """The stages whose copies an operation reads for the last time; 0 for the input."""


def analyse_values(graph: Graph, schedule: Schedule) -> ValueLiveness:
    """Find how long copies are needed.

    Args:
        graph: One that knows the chain that it was made of.
        schedule: A valid schedule for it.

    Raises:
        InvalidScheduleError: As for `charge_values`.
    """
    runs = runs_of(schedule)
    ledger = ValueLedger(graph, len(runs))
    ledger.charge(runs)
    books, place = ledger.books, np.flatnonzero(schedule.codes != Code.DROP).tolist()
    frees: dict[int, list[int]] = {place[books.last[len(runs)]]: [0]}
    keeps, restores, previous = set[int](), set[int](), 0
    for p, packed in enumerate(runs.tolist()):
        i = packed >> 32
        if packed & 0xFF > Code.TAPED_FORWARD:
            previous = -1
            continue
        if books.last[p] > p:
            keeps.add(place[p])
            frees.setdefault(place[books.last[p]], []).append(i)
        if books.first_run[i] < p and previous != i - 1:
            restores.add(place[p])
        previous = i
    again = np.flatnonzero(books.restored[1:] >= 0) + 1
    return ValueLiveness(
        keeps=frozenset(keeps),
        snapshots=frozenset(place[p] for p in books.first_run[again]),
        restores=frozenset(restores),
        forgets=frozenset(place[p] for p in books.restored[again]),
        frees={p: tuple(stages) for p, stages in frees.items()},
    )


def runs_of(schedule: Schedule) -> Integers:
    """The operations of a schedule without drops, packed.

    Raises:
        InvalidScheduleError: As for `charge_values`.
    """
    codes, kinds = schedule.codes, schedule.kinds
    dropped = (codes == Code.DROP) & (kinds == Kind.TAPE)
    for fault, reason in (
        (codes == Code.COPY, "exact bytes are known of the device only, not of other tiers"),
        (dropped, "exact bytes by value are known where each tape is kept to its Backward"),
    ):
        if fault.any():
            p = int(np.argmax(fault))
            raise InvalidScheduleError(p, str(schedule[p]), reason)
    falls = np.diff(schedule.stages[codes == Code.BACKWARD]) < 0
    if not falls.all():
        p = int(np.flatnonzero(codes == Code.BACKWARD)[1 + np.argmin(falls)])
        reason = "by value, Backwards come in the reverse of the order of the nodes"
        raise InvalidScheduleError(p, str(schedule[p]), reason)
    runs: Integers = schedule.packed[codes != Code.DROP]
    return runs


class Life(NamedTuple):
    """Something that is live for a while, by operations without drops."""

    role: str
    """The name of a `Role`."""
    stage: int
    """Whose it is; 0 where it is of none."""
    bytes: int
    since: int
    """The first operation that finds it there."""
    until: int
    """The first one that does not any more."""

    def words(self, names: Sequence[str]) -> str:
        """What it is, for people.

        Args:
            names: Of the nodes, the input's first.
        """
        if self.role in ("STATE", "OUTPUT"):
            return names[self.stage] if self.stage else "value of the loss"
        if self.role == "TAPE":
            return f"tape of {names[self.stage]}"
        return _WORDS[self.role]


@final
class ValueLedger:
    """The figures of a recorded model, and room to charge schedules of so many operations."""

    def __init__(self, graph: Graph, operations: int) -> None:
        """Put what the pass looks up into arrays.

        Args:
            graph: One that knows the chain that it was made of.
            operations: The most that are charged, drops apart.
        """
        chain = graph.lined
        assert chain is not None
        n, random = len(chain), chain.random_state_bytes
        self.graph, self.chain = graph, chain
        self.ledgers = ledgers_of(chain)
        snapshots = snapshot_bytes(chain.blocks, n, random)
        snapshots[0] = random  # hidden state as the step begins is kept whatever is planned
        self.stages = stages_of(chain, snapshots, np.zeros(n + 1, np.int64))
        self.wiring = wiring_of(chain.values, int(self.ledgers.inputs[0]))
        self.level = kernel.Level(
            start=chain.input_bytes + chain.kept_bytes,
            held=chain.held_bytes - chain.kept_bytes,
            loss=chain.loss_overhead_bytes,
            again=sum(block.buffer_bytes for block in chain.blocks) + random,
        )
        most = int(np.diff(self.wiring.first_made).max())
        inputs = int(self.wiring.first_made[1])
        self.books = kernel.open_books(n, operations, len(self.wiring.maker), inputs, most)
        self.during = np.zeros(operations, np.int64)

    def charge(self, runs: Integers) -> Integers:
        """Bytes while each of some operations runs: they are no more than there is room for."""
        during = self.during[: len(runs)]
        charge = suited(kernel.charge, _STEPS * len(runs))
        charge(runs, self.ledgers, self.stages, self.wiring, self.level, self.books, during)
        return during

    def lives(self, runs: Integers) -> Iterator[Life]:
        """What lives how long.

        Args:
            runs: Those that were charged last.
        """
        m, n, stages = len(runs), len(self.chain), self.stages
        yield Life("KEPT", 0, self.chain.kept_bytes, 0, m + 1)
        yield from self._storages(runs)
        for i in (np.flatnonzero(self.books.restored[1:] >= 0) + 1).tolist():
            first, last = int(self.books.first_run[i]), int(self.books.restored[i])
            yield Life("RANDOM", i - 1, int(stages.snapshots[i - 1]), first + 1, last)
        for p, packed in enumerate(runs.tolist()):
            code, i = packed & 0xFF, packed >> 32
            if code == Code.TAPED_FORWARD:
                size = int(self.ledgers.tape[self.ledgers.of[i] + (packed >> 8 & 0xFF)])
                yield Life("TAPE", i, size, p + 1, int(self.books.gone[i]) + 1)
            elif code == Code.TURN:
                rest = kernel.rest_of_loss(self.wiring, self.books, n, self.level.held)
                yield Life("OUTPUT", 0, int(rest), p + 1, m + 1)
                gone = int(self.books.gone[n]) + 1
                yield Life("GRADIENT", n, int(stages.gradient[n]), p + 1, gone)
                if kernel.runs_again(runs, self.books):
                    copies = self.level.again - self.chain.random_state_bytes
                    yield Life("BUFFERS", 0, copies, p + 1, m + 1)
                    yield Life("RANDOM", 0, self.chain.random_state_bytes, p + 1, m + 1)
            elif code == Code.BACKWARD:
                gone = int(self.books.gone[i - 1]) + 1 if i > 1 else m + 1
                yield Life("GRADIENT", i - 1, int(stages.gradient[i - 1]), p + 1, gone)
                yield Life("PARAMETERS", i, int(stages.parameters[i]), p + 1, m + 1)

    def _storages(self, runs: Integers) -> Iterator[Life]:
        books, s, m = self.books, int(self.wiring.first_made[1]), len(runs)
        while books.born[s] < m:
            if books.end[s] > books.born[s]:
                maker = int(runs[books.born[s]] >> 32)
                role = "OUTPUT" if maker == len(self.chain) else "STATE"
                until = int(books.end[s]) + 1
                yield Life(role, maker, int(books.size[s]), int(books.born[s]) + 1, until)
            s += 1


def wiring_of(values: Sequence[StageValues], inputs: int) -> kernel.Wiring:
    """Who reads what, in flat arrays.

    Args:
        values: Of each stage.
        inputs: Storages of the input.
    """
    reads = [read for each in values for read in each.reads]
    made = [tuple(range(inputs)), *(each.made for each in values)]
    columns = np.array(reads, np.int64).reshape(-1, 3)
    return kernel.Wiring(
        first_read=np.cumsum([0, 0, *(len(each.reads) for each in values)], dtype=np.int64),
        maker=columns[:, 0].copy(),
        made=columns[:, 1].copy(),
        input=columns[:, 2].copy(),
        first_made=np.cumsum([0, *map(len, made)], dtype=np.int64),
        output=np.array([x for each in made for x in each], np.int64),
    )
