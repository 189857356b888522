"""The ledger: what a schedule really allocates, to the byte.

A state's storage counts once, while anything holds it: the store, a tape that saved it as
its input or output, a tape that hands it on, or the caller. Backward passes are charged by
whether the storages they saved outlive them. See `StageLedger` for the figures of a stage.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from ..base.budget import Tier
from ..base.errors import InvalidScheduleError
from ..schedule.language import Code, Kind, Schedule
from ..schedule.trace import Live
from ..workload.chain import Chain
from ..workload.stage import Stage, StageLedger, backward_variant
from .liveness import Liveness, analyse, blocks_of, cut, snapshot_bytes

# From so many operations on, the compiled pass saves more than it takes to load; once it is loaded,
# it is faster for all but the shortest schedules.
_COMPILED_OPERATIONS = 8_000
_COMPILED_ONCE_LOADED = 50

Storages = tuple[int, ...]
"""What a state lies in, by number: a run counts up, the caller's and clones count down."""


@final
@dataclass(frozen=True)
class Account:
    """Bytes while each operation runs, and what was live when the account stopped."""

    timeline: npt.NDArray[np.int64]
    live: tuple[Live, ...]


@dataclass(slots=True)
class _Tape:
    """What one stored tape holds."""

    ledger: StageLedger
    input: Storages
    output: Storages
    saved: list[int]
    """Saved inputs, then saved outputs, then clones of buffers; one may occur twice."""
    hands_on: bool
    snapshot: int
    """Bytes of what it takes to run on from its output."""


@dataclass(slots=True)
class _Books:
    """All that is live, by holder."""

    level: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    holders: dict[int, int] = field(default_factory=dict)
    states: dict[int, tuple[Storages, int]] = field(default_factory=dict)
    tapes: dict[int, _Tape] = field(default_factory=dict)
    extras: dict[str, int] = field(default_factory=dict)

    def hold(self, storage: int) -> None:
        count = self.holders.get(storage, 0)
        if not count:
            self.level += self.sizes[storage]
        self.holders[storage] = count + 1

    def release(self, storage: int) -> None:
        count = self.holders[storage] - 1
        if count:
            self.holders[storage] = count
        else:
            del self.holders[storage]
            self.level -= self.sizes.pop(storage)

    def extra(self, name: str, size: int) -> None:
        """Set the bytes of something that has one number, such as the gradients."""
        self.level += size - self.extras.get(name, 0)
        self.extras[name] = size


def charge(chain: Chain, schedule: Schedule, *, until: int | None = None) -> Account:
    """Charge a valid schedule by the ledger.

    Args:
        chain: A chain whose stages all have a ledger.
        schedule: A schedule that the planning model has found valid, without copies.
        until: Stop before this operation, and say what is live while it runs.

    Returns:
        The bytes of every operation before `until`, and what is live then.
    """
    is_loaded = f"{__package__}.exact_bytes_kernel" in sys.modules
    fewest = _COMPILED_ONCE_LOADED if is_loaded else _COMPILED_OPERATIONS
    compiled = until is None and len(schedule) >= fewest and _is_plain(schedule)
    ledger = _Ledger(chain, schedule, compiled=compiled)
    return ledger.run_compiled() if compiled else ledger.run(until)


def _is_plain(schedule: Schedule) -> bool:
    """Whether values stay on the device: what the compiled pass knows."""
    codes = schedule.codes
    away = (codes == Code.DROP) & (schedule.sources != Tier.DEVICE)
    return not (away | (codes == Code.COPY)).any()


class _Ledger:
    """Interprets a schedule, counting holders of storages."""

    def __init__(self, chain: Chain, schedule: Schedule, *, compiled: bool) -> None:
        self.chain, self.schedule = chain, schedule
        self.n = len(chain)
        self.liveness: Liveness = analyse(schedule, self.n, compiled=compiled)
        self.books = _Books()
        first = self._stage(1)[1]
        theirs = tuple(range(-1, -1 - (first.parts.inputs if first.parts else 1), -1))
        for storage in theirs:
            self.books.sizes[storage] = chain.input_bytes if storage == -1 else 0
            self.books.hold(storage)
            self.books.hold(storage)
        self.blocks = blocks_of(chain.blocks, self.n)
        self.random = chain.random_state_bytes
        self.snapshots = snapshot_bytes(self.blocks, self.n, self.random).tolist()
        # Hidden state as the step begins is kept whatever is planned: for one more backward.
        self.books.extra("hidden state, and what modules keep", chain.kept_bytes)
        at_first = self.random * self.liveness.snapshots_input
        self.books.states[0] = (theirs, at_first)
        self.books.level += at_first
        self.next_storage = 0
        self.owner = np.zeros(self.n + 1, dtype=np.int64)
        for k, block in enumerate(self.blocks):
            self.owner[block.first : block.last + 1] = k
        self.replays = self._replays()
        self.clones: dict[int, int] = {}  # storage of the clones of a block's buffers
        self.next_clone = theirs[-1]

    def _replays(self) -> dict[int, list[tuple[int, int]]]:
        """Blocks that each backward segment runs again, with their buffers' bytes, by start."""
        blocks, stages = self.blocks, self.schedule.stages
        replays = {}
        for segment in cut(self.schedule, blocks).backward:
            repeated = self.liveness.repeats[segment.start : segment.stop]
            touched = np.unique(self.owner[stages[segment.start : segment.stop][repeated]])
            sizes = {int(k): blocks[int(k)].buffer_bytes for k in touched}
            if sizes:  # hidden buffers of other blocks are cloned with them
                hidden = {k: block.hidden_bytes for k, block in enumerate(blocks)}
                sizes = {k: size for k, size in hidden.items() if size} | sizes
            replays[segment.start] = list(sizes.items())
        return replays

    def _begin_segment(self, replays: list[tuple[int, int]]) -> None:
        """Let clones of the last segment go, unless a tape saved them, and make new ones."""
        books = self.books
        for storage in self.clones.values():
            books.release(storage)
        self.clones = {}
        for k, size in replays:
            self.next_clone -= 1
            self.clones[k] = self.next_clone
            books.sizes[self.next_clone] = size
            books.hold(self.next_clone)
        books.extra("random state to put back", self.random if replays else 0)

    def run(self, until: int | None) -> Account:
        """Interpret the operations before `until`."""
        schedule, books = self.schedule, self.books
        stop = len(schedule) if until is None else until
        codes, numbers = schedule.codes.tolist(), schedule.stages.tolist()
        kinds, sources = schedule.kinds, schedule.sources
        during = np.zeros(stop, dtype=np.int64)
        peak = 0
        for p in range(stop + (until is not None)):
            if p in self.replays:
                self._begin_segment(self.replays[p])
            if p == stop:
                peak = self._peak_of(p, codes[p], numbers[p])
                return Account(during, self._live(peak))
            code, i = codes[p], numbers[p]
            during[p] = self._peak_of(p, code, i)
            if code <= Code.TAPED_FORWARD:
                during[p] = max(int(during[p]), self._forward(p, i, taped=bool(code)))
            elif code == Code.BACKWARD:
                self._backward(i)
            elif code == Code.TURN:
                self._turn(p)
            elif code == Code.DROP and sources[p] == Tier.DEVICE:
                if kinds[p] == Kind.STATE:
                    self._drop_state(i)
                elif kinds[p] == Kind.TAPE:
                    self._drop_tape(i)
                else:
                    books.extra("gradient of a state", 0)
            else:
                raise InvalidScheduleError(
                    p, str(schedule[p]), "the ledger knows the device only, not other tiers"
                )
        return Account(during, ())

    def run_compiled(self) -> Account:
        """Do the same for all operations by compiled code."""
        from . import exact_bytes_arrays as ledger_arrays
        from . import exact_bytes_kernel as ledger_kernel

        chain, schedule, live, books = self.chain, self.schedule, self.liveness, self.books
        kinds = ledger_arrays.kinds_of(chain)
        replays = ledger_arrays.replays_of(self.replays)
        made, width = ledger_arrays.storages_of(kinds, schedule)
        start = ledger_kernel.Start(
            level=books.level,
            snapshot=books.states[0][1],
            inputs=len(books.states[0][0]),
            input_bytes=chain.input_bytes,
            storages=len(books.states[0][0]) + made + len(replays.block),
            width=width,
            blocks=len(self.blocks),
            held=chain.held_bytes - chain.kept_bytes,
            loss=chain.loss_overhead_bytes,
            random=self.random,
        )
        flags = (live.keeps_output, live.frees_input, live.restores, live.snapshots, live.repeats)
        stages = ledger_arrays.stages_of(chain, self.snapshots, self.owner)
        during = np.zeros(len(schedule), dtype=np.int64)
        ledger_kernel.charge(
            *(schedule.packed, np.stack(flags), kinds, stages, replays, start, during)
        )
        return Account(during, ())

    def _stage(self, i: int) -> tuple[Stage, StageLedger]:
        stage = self.chain.stages[i - 1]
        assert stage.ledger is not None
        return stage, stage.ledger

    def _peak_of(self, p: int, code: int, i: int) -> int:
        """Bytes while an operation runs."""
        level = self.books.level
        if code == Code.FORWARD:
            return level + self._stage(i)[1].forward_peak_bytes
        if code == Code.TAPED_FORWARD:
            return level + self._stage(i)[1].taped_peak_bytes
        if code == Code.BACKWARD:
            return level + self._backward_peak(i)
        if code == Code.TURN:
            output = self.chain.arrays.gradient_bytes[self.n]
            return level + int(output) + self.chain.loss_overhead_bytes
        return level

    def _input_of(self, i: int) -> Storages:
        """The storages that a run of stage i reads."""
        state = self.books.states.get(i - 1)
        return state[0] if state is not None else self.books.tapes[i - 1].output

    def _output_of(self, ledger: StageLedger, source: Storages) -> Storages:
        """The storages of what a run makes of these; new ones are not held yet."""
        if ledger.output_is_view:
            return source
        made: list[int] = []
        sizes: tuple[int, ...] = (ledger.state_bytes,)
        sources: tuple[int, ...] = (-1,)
        if ledger.parts is not None:
            sizes, sources = ledger.parts.output_bytes, ledger.parts.output_sources
        for size, origin in zip(sizes, sources, strict=True):
            if origin >= 0:
                made.append(source[origin])
                continue
            self.books.sizes[self.next_storage] = size
            made.append(self.next_storage)
            self.next_storage += 1
        return tuple(made)

    def _forward(self, p: int, i: int, *, taped: bool) -> int:
        """Book a run; returns the level when its output is there and its input still is."""
        books, (_, ledger) = self.books, self._stage(i)
        source = self._input_of(i)
        output = self._output_of(ledger, source)
        snapshot = self.snapshots[i] * bool(self.liveness.snapshots[p])
        if not taped:
            for storage in output:
                books.hold(storage)
            books.states[i] = (output, snapshot)
            books.level += snapshot
        else:
            saved = _saved(ledger, source, output)
            # Norm layers save their running statistics, here the clones of them.
            clone = self.clones.get(int(self.owner[i]))
            saved += [] if clone is None else [clone]
            hands_on = bool(self.liveness.keeps_output[p])
            for storage in saved + list(output) * hands_on:
                books.hold(storage)
            snapshot *= hands_on
            books.level += ledger.tape_bytes + snapshot
            books.tapes[i] = _Tape(ledger, source, output, saved, hands_on, snapshot)
            for storage in output:
                if storage not in books.holders:
                    books.sizes.pop(storage, None)
        level = books.level
        if self.liveness.frees_input[p]:
            self._stop_handing_on(i - 1)
        return level

    def _stop_handing_on(self, i: int) -> None:
        tape = self.books.tapes[i]
        if tape.hands_on:
            tape.hands_on = False
            self.books.level -= tape.snapshot
            tape.snapshot = 0
            for storage in tape.output:
                self.books.release(storage)

    def _turn(self, p: int) -> None:
        books = self.books
        output = self._input_of(self.n + 1)
        for storage in output:
            books.hold(storage)  # by the caller, to the end of the step
        rest = (
            self.chain.held_bytes
            - self.chain.kept_bytes
            - sum(books.sizes[storage] for storage in set(output))
        )
        books.extra("value of the loss", max(0, rest))
        if self.liveness.frees_input[p]:
            self._stop_handing_on(self.n)
        books.extra("gradient of a state", int(self.chain.arrays.gradient_bytes[self.n]))

    def _backward_peak(self, i: int) -> int:
        tape = self.books.tapes[i]
        stage, ledger = self._stage(i)
        first = stage.parameter_gradient_bytes > 0
        variants = {first, True} if ledger.shares_parameters_partly else {first}
        if ledger.parts is not None:
            count = len(ledger.parts.saved_inputs) + len(ledger.parts.saved_outputs)
            outlives = tuple(self._outlives(tape, storage) for storage in tape.saved[:count])
            return max(ledger.parts.backward_peak(outlives, first=variant) for variant in variants)
        (source,), (output,) = tape.input, tape.output
        return max(
            ledger.backward_peak_bytes[
                backward_variant(
                    input_held=self._outlives(tape, source),
                    output_held=self._outlives(tape, output),
                    first=variant,
                )
            ]
            for variant in variants
        )

    def _outlives(self, tape: _Tape, storage: int) -> bool:
        """Whether something besides the tape holds a storage."""
        return self.books.holders.get(storage, 0) > tape.saved.count(storage)

    def _backward(self, i: int) -> None:
        books, (stage, _) = self.books, self._stage(i)
        self._drop_tape(i)
        books.extra("gradient of a state", int(self.chain.arrays.gradient_bytes[i - 1]))
        known = books.extras.get("parameter gradients", 0)
        books.extra("parameter gradients", known + stage.parameter_gradient_bytes)

    def _drop_state(self, i: int) -> None:
        storages, snapshot = self.books.states.pop(i)
        self.books.level -= snapshot
        for storage in storages:
            self.books.release(storage)

    def _drop_tape(self, i: int) -> None:
        self._stop_handing_on(i)
        tape = self.books.tapes.pop(i)
        self.books.level -= tape.ledger.tape_bytes
        for storage in tape.saved:
            self.books.release(storage)

    def _live(self, peak: int) -> tuple[Live, ...]:
        """What is live now, and the rest of the peak as what the operation itself needs."""
        books = self.books
        names: dict[int, str] = {}
        held = [(storage, i) for i, (state, _) in books.states.items() for storage in state]
        for i, tape in books.tapes.items():
            held += [(s, i) for s in tape.output] + [(s, i - 1) for s in tape.input]
        for storage, i in held:
            names.setdefault(storage, f"state[{i}]")
        for storage in books.sizes:
            names.setdefault(storage, "output" if storage >= 0 else "copies of buffers")
        found = [Live(names[s], size) for s, size in books.sizes.items() if size]
        found += [Live(f"tape[{i}]", tape.ledger.tape_bytes) for i, tape in books.tapes.items()]
        found += [Live(name, size) for name, size in books.extras.items()]
        snapshots = sum(size for _, size in books.states.values())
        snapshots += sum(tape.snapshot for tape in books.tapes.values())
        name = "random states" if self.snapshots[0] == self.random else "random and hidden states"
        found.append(Live(name, snapshots))
        found.append(Live("the operation itself", peak - sum(x.bytes for x in found)))
        return tuple(sorted((x for x in found if x.bytes), key=lambda x: -x.bytes))


def _saved(ledger: StageLedger, source: Storages, output: Storages) -> list[int]:
    """The storages of input and output that a tape keeps."""
    if ledger.parts is None:
        return list(source) * ledger.input_saved + list(output) * ledger.output_saved
    inputs = [source[k] for k in ledger.parts.saved_inputs]
    return inputs + [output[k] for k in ledger.parts.saved_outputs]
