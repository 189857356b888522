"""The ledger and liveness in readable form, with dictionaries, to check those of arrays by."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ckptsched.base.budget import Tier
from ckptsched.schedule.language import Code, Kind, Schedule
from ckptsched.simulator.liveness import Liveness, blocks_of, cut, snapshot_bytes
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Stage, StageLedger, backward_variant

Storages = tuple[int, ...]
"""What a state lies in, by number: a run counts up, the caller's and clones count down."""


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


class Ledger:
    """Interprets a schedule, counting holders of storages."""

    def __init__(self, chain: Chain, schedule: Schedule) -> None:
        self.chain, self.schedule = chain, schedule
        self.n = len(chain)
        self.liveness = analyse(schedule, self.n)
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

    def run(self) -> list[int]:
        """Interpret all operations; bytes while each runs."""
        schedule, books = self.schedule, self.books
        during = []
        for p, (code, i, kind) in enumerate(
            zip(schedule.codes.tolist(), schedule.stages.tolist(), schedule.kinds, strict=True)
        ):
            if p in self.replays:
                self._begin_segment(self.replays[p])
            option = int(kind) if code == Code.TAPED_FORWARD else 0
            during.append(self._peak_of(code, i, option))
            if code <= Code.TAPED_FORWARD:
                during[p] = max(during[p], self._forward(p, i, option, taped=bool(code)))
            elif code == Code.BACKWARD:
                self._backward(i)
            elif code == Code.TURN:
                self._turn(p)
            elif kind == Kind.STATE:
                self._drop_state(i)
            elif kind == Kind.TAPE:
                self._drop_tape(i)
            else:
                books.extra("gradient of a state", 0)
        return during

    def _stage(self, i: int, option: int = 0) -> tuple[Stage, StageLedger]:
        stage = self.chain.stages[i - 1]
        ledger = stage.tapes[option].ledger
        assert ledger is not None
        return stage, ledger

    def _peak_of(self, code: int, i: int, option: int) -> int:
        """Bytes while an operation runs."""
        level = self.books.level
        if code == Code.FORWARD:
            return level + self._stage(i)[1].forward_peak_bytes
        if code == Code.TAPED_FORWARD:
            return level + self._stage(i, option)[1].taped_peak_bytes
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

    def _forward(self, p: int, i: int, option: int, *, taped: bool) -> int:
        """Book a run; returns the level when its output is there and its input still is."""
        books, (_, ledger) = self.books, self._stage(i, option)
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
        stage, ledger = self.chain.stages[i - 1], tape.ledger
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


def _saved(ledger: StageLedger, source: Storages, output: Storages) -> list[int]:
    """The storages of input and output that a tape keeps."""
    if ledger.parts is None:
        return list(source) * ledger.input_saved + list(output) * ledger.output_saved
    inputs = [source[k] for k in ledger.parts.saved_inputs]
    return inputs + [output[k] for k in ledger.parts.saved_outputs]


def analyse(schedule: Schedule, stages: int) -> Liveness:
    """Find how long outputs and random states are needed."""
    size = len(schedule)
    flags = np.zeros((5, size), dtype=np.bool_)
    keeps_output, frees_input, restores, snapshots, repeats = flags
    states = [-2] * (stages + 1)  # position of the run that made it; -1 the input, -2 none
    tapes = [-2] * (stages + 1)
    last_read: dict[int, int] = {}
    states[0] = -1
    snapshots_input = False
    seen = bytearray(stages + 1)
    previous = 0  # stage whose run came last; the input counts as the run of stage 0
    codes, numbers, kinds = schedule.codes.tolist(), schedule.stages.tolist(), schedule.kinds
    sources = schedule.sources
    for p, (code, i) in enumerate(zip(codes, numbers, strict=True)):
        if code <= Code.TAPED_FORWARD:
            maker = states[i - 1]
            if maker == -2:
                maker = tapes[i - 1]
                last_read[maker] = p
            if previous != i - 1:
                restores[p] = True
                if maker < 0:
                    snapshots_input = True
                else:
                    snapshots[maker] = True
            repeats[p] = seen[i]
            seen[i] = 1
            previous = i
            (tapes if code else states)[i] = p
        elif code == Code.TURN:
            if states[stages] == -2:
                last_read[tapes[stages]] = p
            previous = -1
        elif code == Code.BACKWARD:
            tapes[i] = -2
            previous = -1
        elif code == Code.DROP and sources[p] == Tier.DEVICE:
            if kinds[p] == Kind.STATE:
                states[i] = -2
            elif kinds[p] == Kind.TAPE:
                tapes[i] = -2
    for maker, reader in last_read.items():
        if maker >= 0:
            keeps_output[maker] = True
            frees_input[reader] = True
    return Liveness(*flags, snapshots_input)
