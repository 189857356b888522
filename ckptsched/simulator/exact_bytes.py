"""The ledger: what a schedule really allocates, to the byte.

A state's storage counts once, while anything holds it: the store, a tape that saved it as
its input or output, a tape that hands it on, or the caller. Backward passes are charged by
whether the storages they saved outlive them. See `StageLedger` for the figures of a stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from ..base.budget import Tier
from ..base.errors import InvalidScheduleError
from ..base.jit import suited
from ..schedule.language import Code, Schedule
from ..schedule.trace import Live
from ..workload.chain import Chain
from . import exact_bytes_kernel as kernel
from .exact_bytes_arrays import ledgers_of, replays_of, stages_of, storages_of
from .liveness import analyse, blocks_of, cut, snapshot_bytes

# Steps of the interpreter for an operation.
_STEPS = 20


def charge(chain: Chain, schedule: Schedule) -> npt.NDArray[np.int64]:
    """Charge a valid schedule by the ledger.

    Args:
        chain: A chain whose stages all have a ledger.
        schedule: A schedule that the planning model has found valid.

    Returns:
        Bytes while each operation runs, shape (operations,).

    Raises:
        InvalidScheduleError: A value is copied to another tier, of which the ledger knows nothing.
    """
    _refuse_other_tiers(schedule)
    return Ledger(chain, schedule).run(len(schedule))


def live_at(chain: Chain, schedule: Schedule, position: int, peak: int) -> tuple[Live, ...]:
    """What is live while an operation runs, the largest first.

    Args:
        chain: A chain whose stages all have a ledger.
        schedule: A schedule that can be charged.
        position: Of the operation.
        peak: Bytes while it runs; those of nothing else are the operation's own.
    """
    ledger = Ledger(chain, schedule)
    ledger.run(position)
    found = [*ledger.storages(), *ledger.tapes(), *ledger.others()]
    found.append(Live("the operation itself", peak - sum(x.bytes for x in found)))
    return tuple(sorted((x for x in found if x.bytes), key=lambda x: -x.bytes))


def _refuse_other_tiers(schedule: Schedule) -> None:
    codes = schedule.codes
    away = (codes == Code.DROP) & (schedule.sources != Tier.DEVICE)
    away |= codes == Code.COPY
    if away.any():
        p = int(np.argmax(away))
        raise InvalidScheduleError(
            p, str(schedule[p]), "the ledger knows the device only, not other tiers"
        )


@final
@dataclass(eq=False)
class Ledger:
    """A schedule on a chain, and what is live after so many of its operations."""

    chain: Chain
    schedule: Schedule

    def __post_init__(self) -> None:
        """Put what the pass looks up into arrays."""
        chain, schedule, n = self.chain, self.schedule, len(self.chain)
        blocks = blocks_of(chain.blocks, n)
        self.live = live = analyse(schedule, n)
        flags = live.keeps_output, live.frees_input, live.restores, live.snapshots, live.repeats
        self.facts = np.stack(flags)
        self.random = chain.random_state_bytes
        snapshots = snapshot_bytes(blocks, n, self.random)
        self.keeps_hidden = int(snapshots[0]) != self.random
        owner = np.zeros(n + 1, dtype=np.int64)
        for k, block in enumerate(blocks):
            owner[block.first : block.last + 1] = k
        self.ledgers = ledgers_of(chain)
        self.stages = stages_of(chain, snapshots, owner)
        self.replays = replays_of(schedule, live, blocks, owner, cut(schedule, blocks).backward)
        made, width = storages_of(self.ledgers, schedule)
        inputs = int(self.ledgers.inputs[0])
        at_first = self.random * live.snapshots_input
        self.start = kernel.Start(
            # Hidden state as the step begins is kept whatever is planned: for one more backward.
            level=chain.input_bytes + chain.kept_bytes + at_first,
            inputs=inputs,
            held=chain.held_bytes - chain.kept_bytes,
            loss=chain.loss_overhead_bytes,
            random=self.random,
        )
        storages = inputs + made + len(self.replays.block)
        self.books = kernel.open_books(n, storages, width, len(blocks))
        self.books.sizes[0] = chain.input_bytes
        self.books.holders[:inputs] = 2  # the caller holds them besides
        self.books.since[:inputs] = 0
        self.books.has_state[0] = True
        self.books.states[0, :inputs] = np.arange(inputs)
        self.books.state_snapshot[0] = at_first

    def run(self, stop: int) -> npt.NDArray[np.int64]:
        """Do so many operations, and begin what begins with the next one; bytes while each runs."""
        during = np.zeros(stop, dtype=np.int64)
        charge_all = suited(kernel.charge, _STEPS * stop)
        model = self.facts, self.ledgers, self.stages, self.replays, self.start
        charge_all(self.schedule.packed, *model, self.books, during)
        return during

    def storages(self) -> Iterator[Live]:
        """Those that anything holds, by the first state that lies in them."""
        books, names = self.books, dict[int, str]()
        outputs = np.diff(self.ledgers.first_output)[self.ledgers.of]
        outputs[0] = inputs = self.start.inputs
        for i in np.flatnonzero(books.has_state).tolist():
            for x in books.states[i, : outputs[i]].tolist():
                names.setdefault(x, f"state[{i}]")
        for i in np.flatnonzero(books.has_tape).tolist():
            for x in books.outputs[i, : outputs[i]].tolist():
                names.setdefault(x, f"state[{i}]")
            for x in books.inputs[i, : outputs[i - 1]].tolist():
                names.setdefault(x, f"state[{i - 1}]")
            names[int(books.clone[i])] = "copies of buffers"
        names |= dict.fromkeys(books.clones.tolist(), "copies of buffers")
        for x in np.flatnonzero(books.holders).tolist():
            name = names.get(x, "state[0]" if x < inputs else "output")
            yield Live(name, int(books.sizes[x]))

    def tapes(self) -> Iterator[Live]:
        """What tapes take besides storages of states."""
        for i in np.flatnonzero(self.books.has_tape).tolist():
            yield Live(f"tape[{i}]", int(self.ledgers.tape[self.books.ledger[i]]))

    def others(self) -> Iterator[Live]:
        """What there is one of."""
        books, totals = self.books, self.books.totals.tolist()
        yield Live("hidden state, and what modules keep", self.chain.kept_bytes)
        yield Live("random state to put back", totals[kernel.RANDOM])
        yield Live("gradient of a state", totals[kernel.GRADIENT])
        yield Live("parameter gradients", totals[kernel.PARAMETERS])
        yield Live("value of the loss", totals[kernel.LOSS])
        snapshots = books.state_snapshot[books.has_state].sum()
        snapshots += books.tape_snapshot[books.hands_on].sum()
        name = "random and hidden states" if self.keeps_hidden else "random states"
        yield Live(name, int(snapshots))
