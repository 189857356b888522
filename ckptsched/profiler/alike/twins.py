"""Stages that do the same with tensors of their own are measured once.

What is known beforehand of a stage (`likeness_of`, the layouts of its input) says which may be
alike. One run with a tape says whether it is: it must run the same operators on the same layouts,
and its tape must keep the same storages in the same nodes. Then bytes and seconds are those of the
stage that was looked at first. Parameters, inputs and outputs stay each stage's own.

A stage that hangs on more than its input, parameters and draws (buffers that it reads and changes,
values that it decides by, tensors that it leaves elsewhere) is looked at by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

from torch import Tensor

from ...base.errors import ProfileError
from ...capture.likeness import InDoubtError, Likeness
from ...capture.signature import stage_label
from ...capture.stage_discovery import FusedStage, ModuleStage, StageCall, TracedBlock
from ...recompute.parameter_swap import Slots
from ...recompute.stateful_buffers import BufferWatch, every_generator, is_write_only
from ...recompute.tape import Alone, Carries
from ...tensors.pytree import Extras, State, storages
from ...torch_state.replay_context import RandomState
from ...workload.stage import StageLedger
from ..stage_kind import Gradients, StageKind, Standing, layout
from ..stage_paths import Path, path_of
from .operators import Operators


def likeness_of(call: StageCall) -> Hashable:
    """Equal for stages that do the same with tensors of their own; None where it cannot be told.

    Args:
        call: The stage.
    """
    if not isinstance(call, ModuleStage | FusedStage):
        return call.likeness()
    parts = call.stages if isinstance(call, FusedStage) else (call,)
    if not all(isinstance(part, ModuleStage) for part in parts):
        return None
    found = Likeness()
    try:
        return "modules", tuple([found.module(part.module) for part in parts])
    except InDoubtError:
        return None


def layout_of_gradients(gradients: Gradients) -> Hashable:
    """Which gradients there are, and their layouts.

    Args:
        gradients: With respect to the tensors of a state.
    """
    flags = tuple([gradient is not None for gradient in gradients])
    return flags, layout(gradient for gradient in gradients if gradient is not None)


@final
@dataclass(frozen=True, slots=True)
class Candidate:
    """A stage that is to be looked at, and where it stands."""

    block: TracedBlock
    call: StageCall
    x: State
    """Its input, without a graph."""
    extras: Extras
    wanted: tuple[Carries, ...]
    """For each tensor of the input what it carries."""
    standing: Standing

    def look(self, likeness: Hashable) -> Hashable:
        """What decides what a run takes, as far as it is known beforehand.

        Args:
            likeness: That of the stage.
        """
        given, standing = self.extras.apart(), self.standing
        homes = storages(self.x.leaves)
        return (
            likeness,
            _place(self.x),
            tuple([(home in standing.fixed, home in standing.buffers) for home in homes]),
            self.wanted,
            (_place(given), tuple([leaf.requires_grad for leaf in given.leaves])),
            tuple([homes.get(home) is not None for home in storages(given.leaves)]),
        )

    def collecting(self) -> list[Tensor]:
        """What collects gradients."""
        given = [leaf for leaf in self.extras.apart().leaves if leaf.requires_grad]
        owned = [p for p in Slots([self.call.module]).parameters() if p.requires_grad]
        return list({id(leaf): leaf for leaf in (*owned, *given)}.values())


def _place(state: State) -> Hashable:
    return layout(state.leaves), state.describe(lambda _: "tensor")


@final
@dataclass(frozen=True, slots=True)
class _Facts:
    """What a run with a tape shows."""

    operators: tuple[Hashable, ...]
    path: Path
    """What its tape keeps, and in how many nodes."""
    carries: tuple[Carries, ...]
    repeated: tuple[int, ...]
    """Those of what collects gradients that it uses more than once, by number."""
    fixed: tuple[tuple[bool, bool], ...]
    """For each storage of the output whether it is there before a step, and in a buffer."""
    draws: bool = False
    alone: Alone = Alone.PLAIN


_Weight: TypeAlias = tuple[StageLedger, StageLedger | None, tuple[int, ...], int]
"""A stage's ledger, that with a lean tape, the calls that this makes again, what a run leaves."""


@final
class Alike:
    """What was found out about stages, by what they are like."""

    def __init__(self, *, outlives: bool = False) -> None:
        """Nothing is known yet.

        Args:
            outlives: Whether other chains are to be measured with what is known of this one.
        """
        self._outlives = outlives
        self._expected: set[Hashable] = set()
        self._numbers: dict[Hashable, int] = {}
        # Of stages that look alike beforehand: those that a run has told apart, each by a number.
        self._facts: dict[int, list[tuple[int, _Facts]]] = {}
        self._looks = 0
        self._weighed: dict[Hashable, _Weight] = {}

    def expect(self, calls: Iterable[StageCall]) -> None:
        """Find out which stages of a model may have twins; what has none is looked at as ever.

        Args:
            calls: All stages.
        """
        distinct = {call.key: call for call in calls}.values()
        counts = Counter(map(likeness_of, distinct))
        least = 1 if self._outlives else 2
        self._expected = {
            likeness for likeness, n in counts.items() if n >= least and likeness is not None
        }

    def number(self, candidate: Candidate) -> int | None:
        """A number for what a stage is like, equal for those that may be twins.

        Args:
            candidate: The stage; None is returned where it has none, or where it cannot be told.
        """
        likeness = likeness_of(candidate.call)
        if likeness not in self._expected:
            return None
        return self._numbers.setdefault(candidate.look(likeness), len(self._numbers))

    def note(self, number: int, candidate: Candidate, kind: StageKind) -> None:
        """Let later stages be twins of one that was looked at, if it is simple enough.

        Args:
            number: What the stage is like.
            candidate: The stage.
            kind: What was found out about it.
        """
        hangs = kind.varies or kind.hidden or kind.foreign or kind.others or kind.begins_with
        leaves = kind.looks or kind.sides or kind.left or kind.left_bytes or kind.own_leaves
        if hangs or leaves or kind.alone is Alone.DIFFERENTIATES:
            return
        if self.number(candidate) != number:  # a run has changed it
            return
        found = _observed(kind)
        if found is not None:
            kind.look = self._looks
            self._looks += 1
            known = replace(found, draws=kind.draws, alone=kind.alone)
            self._facts.setdefault(number, []).append((kind.look, known))

    def twin(self, number: int, candidate: Candidate) -> StageKind | None:
        """A stage that is like one that was looked at; None where there is none, or a run differs.

        Args:
            number: What the stage is like.
            candidate: The stage.
        """
        if number not in self._facts:
            return None
        call, x = candidate.call, candidate.x
        aliases = candidate.collecting()
        kind = StageKind(
            name=stage_label(candidate.block, call.name),
            call=call,
            x=x,
            extras=candidate.extras,
            output=x,
            wanted=candidate.wanted,
            carries=(),
            aliases=aliases,
            repeated=[],
            draws=False,
            standing=candidate.standing,
        )
        found = _observed(kind)
        if found is None or self.number(candidate) != number:
            return None
        for look, facts in self._facts[number]:
            if replace(found, draws=facts.draws, alone=facts.alone) == facts:
                kind.look, kind.carries, kind.draws = look, facts.carries, facts.draws
                kind.repeated = [aliases[k] for k in facts.repeated]
                kind.alone = facts.alone
                return kind
        return None

    def ledger(self, kind: StageKind) -> StageLedger | None:
        """The bytes of a stage as they were weighed of one like it; None where none was.

        Args:
            kind: The stage, gone back through.
        """
        known = self._weighed.get(_weight_of(kind)) if kind.look is not None else None
        if known is None:
            return None
        ledger, kind.lean, kind.made_again, kind.left_bytes = known
        return ledger

    def note_ledger(self, kind: StageKind, ledger: StageLedger) -> None:
        """Keep the bytes of a stage for those like it.

        Args:
            kind: The stage.
            ledger: What was weighed.
        """
        if kind.look is not None:
            known = ledger, kind.lean, kind.made_again, kind.left_bytes
            self._weighed[_weight_of(kind)] = known


def _weight_of(kind: StageKind) -> Hashable:
    """What decides the bytes of stages that are alike."""
    return (
        kind.look,
        layout_of_gradients(kind.gradients),
        layout_of_gradients(kind.input_gradients),
        tuple([kind.gradient_bytes.get(id(alias)) for alias in kind.aliases]),
        tuple([id(alias) in kind.there for alias in kind.aliases]),
        (kind.is_last, kind.count > 1),
        (kind.saved_bytes, kind.largest_bytes, kind.used_bytes),
    )


class Backwards:
    """Backwards of one profile, for stages that are alike."""

    def __init__(self) -> None:
        """None has run."""
        self._known: dict[Hashable, StageKind] = {}

    def like(
        self, found: StageKind, arriving: Sequence[Gradients], *, is_last: bool
    ) -> StageKind | None:
        """A stage as one like it was after its backward; None where none has run.

        Args:
            found: The stage.
            arriving: The gradients that come back to it.
            is_last: Whether the caller holds its output.
        """
        key = self._key(found, arriving, is_last=is_last)
        known = None if key is None else self._known.get(key)
        if known is None:
            return None
        pairs = zip(known.aliases, found.aliases, strict=True)
        sizes = {id(mine): known.gradient_bytes.get(id(theirs)) for theirs, mine in pairs}
        return replace(
            found,
            is_last=is_last,
            gradients=arriving[0],
            gradient_bytes={alias: size for alias, size in sizes.items() if size is not None},
            input_gradients=known.input_gradients,
            sends_back=known.sends_back,
            saved_bytes=known.saved_bytes,
            largest_bytes=known.largest_bytes,
            used_bytes=known.used_bytes,
            others=[],
        )

    def note(
        self, found: StageKind, arriving: Sequence[Gradients], made: StageKind, *, is_last: bool
    ) -> None:
        """Keep what a backward has shown.

        Args:
            found: The stage, as it was before.
            arriving: The gradients that came back to it.
            made: The stage after it.
            is_last: Whether the caller holds its output.
        """
        key = self._key(found, arriving, is_last=is_last)
        if key is not None:
            self._known[key] = made

    def _key(self, found: StageKind, arriving: Sequence[Gradients], *, is_last: bool) -> Hashable:
        if found.look is None or len(arriving) != 1:
            return None
        return found.look, layout_of_gradients(arriving[0]), is_last


def _observed(kind: StageKind) -> _Facts | None:
    """Run a stage with its tape, and note what it does; None where it cannot be a twin.

    Where it can, its output becomes that of this run.
    """
    given = kind.extras.apart()
    own = every_generator(kind.call.module.modules(), given.constants())
    before = RandomState.take(kind.x.leaves[0].device, own)
    watch = BufferWatch(Slots([kind.call.module]))
    versions = kind.x.versions(), given.versions(), [a._version for a in kind.aliases]
    facts = None
    try:
        facts = _run(kind)
        now = kind.x.versions(), given.versions(), [a._version for a in kind.aliases]
        changed = watch.changed()
        if now != versions or not all(map(is_write_only, changed)):
            facts = None
    except Exception:  # whoever looks at it by itself says what is the matter
        facts = None
    finally:
        before.restore()
        if facts is None:
            watch.put_back(watch.changed())
    return facts


def _run(kind: StageKind) -> _Facts | None:
    with Operators() as operators:
        tape, output, _ = kind.recorded(kind.x)
    if tape.is_used or any(alias.grad is not None for alias in kind.aliases):
        raise ProfileError("it goes back in its forward")
    repeated, standing = tape.repeated_leaves(), kind.standing
    numbers: Any = {id(alias): k for k, alias in enumerate(kind.aliases)}
    if not repeated <= numbers.keys():
        return None
    facts = _Facts(
        operators=tuple(operators.seen),
        path=path_of(kind, tape, output),
        carries=tape.carries,
        repeated=tuple(sorted(numbers[leaf] for leaf in repeated)),
        fixed=tuple(
            [(home in standing.fixed, home in standing.buffers) for home in storages(output.leaves)]
        ),
    )
    kind.output = output
    is_held = tape.watch()
    del tape
    return facts if is_held() is None else None
