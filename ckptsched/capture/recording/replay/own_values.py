"""Stages of a recorded model that are given what they read, instead of all that is alive."""

from __future__ import annotations

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

    @property
    def makes(self) -> tuple[int, ...]:
        """Places of what it makes in the live set after."""
        pairs = zip(self.gives, self.passes, strict=True)
        return tuple([place for place, source in pairs if source < 0])


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
        found.append(
            OwnStage(
                call=stage,
                reads=tuple([made[n] for n in reads]),
                entered_at=tuple([enters.index(n) for n in reads]),
                alive=(len(enters), len(leaves)),
                of_input=tuple([k for k, n in enumerate(enters) if made[n].maker == 0]),
                gives=tuple([leaves.index(n) for n in gives]),
                passes=tuple([reads.index(n) if n in passed else -1 for n in gives]),
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
