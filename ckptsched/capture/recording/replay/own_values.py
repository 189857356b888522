"""Stages of a recorded model that are given what they read, instead of all that is alive."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from ...stage_discovery import FusedStage, StageCall
from ..stages import CapturedStage


class Value(NamedTuple):
    """A value by where it was made."""

    maker: int
    """The stage that has made it, counted from 1; 0 for the input."""
    place: int
    """Its place among the values that this stage has made."""


@final
@dataclass(frozen=True, slots=True)
class OwnStage:
    """A stage that reads values of its own choice."""

    call: StageCall
    """Takes the values that it reads as a tuple, and gives those that it makes or passes on."""
    reads: tuple[Value, ...]
    """What it takes."""
    entered_at: tuple[int, ...]
    """For each of these the place in the live set before."""
    alive: tuple[int, int]
    """How many values are alive before it, and after it."""
    of_input: tuple[int, ...]
    """Places in the live set before of what the caller has given."""
    gives: tuple[int, ...]
    """For each value that it gives the place in the live set after."""
    passes: tuple[int, ...]
    """For each value that it gives which of the reads it is, or -1 for one that it has made. What
    later stages read, too, is passed on so that its gradients are summed in autograd's order."""
    given: tuple[Value, ...]
    """What these values are."""

    @property
    def makes(self) -> tuple[int, ...]:
        """Places of what it makes in the live set after."""
        pairs = zip(self.gives, self.passes, strict=True)
        return tuple([place for place, source in pairs if source < 0])


@final
@dataclass(frozen=True, slots=True)
class OwnStretch:
    """Stages that follow each other and share one tape, by what goes in and what comes out."""

    reads: tuple[Value, ...]
    """What they read of stages before them, in the order in which it is first read."""
    entered_at: tuple[tuple[int, int], ...]
    """For each of these the stage that reads it first, and its place in the live set before."""
    gives: tuple[Value, ...]
    """What later stages read: of what they have made, and after it of what they have read."""
    spent: tuple[tuple[Value, ...], ...]
    """For each stage what it is the last to read or to make, and that is not given."""

    @classmethod
    def of(cls, own: Sequence[OwnStage], first: int, last: int) -> OwnStretch:
        """Look what some stages read and give.

        Args:
            own: All stages, in order.
            first: The first of them, counted from 1.
            last: The last of them.
        """
        entered: dict[Value, tuple[int, int]] = {}
        made: list[Value] = []
        ends: dict[Value, int] = {}
        for i, stage in enumerate(own[first - 1 : last], first):
            for value, place in zip(stage.reads, stage.entered_at, strict=True):
                if value.maker < first:
                    entered.setdefault(value, (i, place))
            mine = [Value(i, k) for k in range(len(stage.makes))]
            made += mine
            ends |= dict.fromkeys((*stage.reads, *mine), i)
        later = {value for stage in own[last:] for value in stage.reads}
        # The caller reads what the last stage of all makes.
        later |= {value for value in made if value.maker == len(own)}
        gives = [value for value in (*made, *entered) if value in later]
        spent: dict[int, list[Value]] = {}
        for value in ends.keys() - {*gives}:
            spent.setdefault(ends[value], []).append(value)
        return cls(
            reads=tuple(entered),
            entered_at=tuple(entered.values()),
            gives=tuple(gives),
            spent=tuple([tuple(spent.get(i, ())) for i in range(first, last + 1)]),
        )


def own_stages(stages: Sequence[StageCall]) -> tuple[OwnStage, ...]:
    """The stages of a recorded model by what they read themselves.

    Args:
        stages: In order, the first possibly fused of several.

    Returns:
        One for each; none at all where some stage takes and gives the live set as a whole.
    """
    found: list[OwnStage] = []
    made: dict[int, Value] = {}
    for i, stage in enumerate(stages, 1):
        ends = _ends(stage)
        if ends is None:
            return ()
        enters, leaves = ends
        if i == 1:
            made.update((n, Value(0, k)) for k, n in enumerate(enters))
        wanted = stage.reads if isinstance(stage, CapturedStage) else frozenset(enters)
        if i == len(stages):
            wanted |= frozenset(leaves)
        reads = [n for n in enters if n in wanted] or list(enters[:1])
        new = [n for n in leaves if n not in enters]
        if not new and not any(n in leaves for n in reads):
            # Its calls make nothing that lasts, as checks of a mask do: it hands on what it reads.
            reads = [n for n in enters if n in reads or n == leaves[0]]
        gives = [n for n in leaves if n in reads or n in new]
        # The caller takes the last ones from the last stage, whoever has made them.
        passed = reads if i < len(stages) else ()
        whole = list(enters) == reads and list(leaves) == gives
        if isinstance(stage, CapturedStage) and not whole:
            stage = stage.between(tuple(reads), tuple(gives))
        passes = [reads.index(n) if n in passed else -1 for n in gives]
        mine = itertools.count()
        found.append(
            OwnStage(
                call=stage,
                reads=tuple([made[n] for n in reads]),
                entered_at=tuple([enters.index(n) for n in reads]),
                alive=(len(enters), len(leaves)),
                of_input=tuple([k for k, n in enumerate(enters) if made[n].maker == 0]),
                gives=tuple([leaves.index(n) for n in gives]),
                passes=tuple(passes),
                given=tuple([Value(i, next(mine)) if k < 0 else made[reads[k]] for k in passes]),
            )
        )
        made.update((n, Value(i, k)) for k, n in enumerate(new))
    return tuple(found)


def _ends(stage: StageCall) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Numbers of the values before and after a stage; None where they are not known."""
    if isinstance(stage, CapturedStage):
        return stage.enters, stage.leaves
    parts = stage.stages if isinstance(stage, FusedStage) else ()
    if parts and all(isinstance(part, CapturedStage) for part in parts):
        first, last = parts[0], parts[-1]
        assert isinstance(first, CapturedStage)
        assert isinstance(last, CapturedStage)
        return first.enters, last.leaves
    return None
