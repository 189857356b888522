"""Finds which aliases the tapes of a step use, and checks that no tape exceeds its projection.

What is known of a tape's path is taken; a tape on another path is walked. The walk shows what the
tape uses, whether it would lose a gradient, and whether it takes more than was projected.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from ...base.errors import ExecutionError
from ...recompute.budget_watch import storage_sizes
from ...recompute.tape import Tape, are_leaves
from ...recompute.tape_contents import Contents
from ...tensors.pytree import State, storages
from ..parameter_usage import Path, Uses
from .forward_snapshot import ForwardSnapshot

_UNUSED = None, 0

JointPath: TypeAlias = tuple[tuple[int, ...], tuple[torch.Size, ...]]
"""How many nodes there were before each of some runs, and at the end; the output's shapes."""


class TapedRun(NamedTuple):
    """A run with tape of one stage."""

    i: int
    """The stage, counted from 1."""
    key: Hashable
    """Of its kind, as `Usage.key` gives it."""
    path: Path


@final
class TapeUses:
    """Finds the aliases that the tapes of one step use, by their paths or by a walk."""

    def __init__(self, seen: ForwardSnapshot) -> None:
        self._prepared, self._seen = seen.prepared, seen

    def of_stage(self, tape: Tape, run: TapedRun, x: State, output: State) -> Uses:
        """The aliases that the tape of one stage uses.

        Args:
            tape: The tape.
            run: The run that has made it.
            x: The stage's input.
            output: Its output.

        Raises:
            ExecutionError: The tape would lose a gradient.
        """
        if not self._prepared.varies[run.i - 1]:
            uses = self._prepared.usage.get(run.key, run.path)
            if uses is not None:
                return uses
        (uses,) = self._look(tape, [run], (0,), storage_sizes(x.leaves), output.leaves)
        return uses

    def known(self, first: int, last: int, path: JointPath) -> Uses | None:
        """The known uses of stages that share one tape; None if the tape must be walked."""
        usage = self._prepared.usage
        if any(self._prepared.varies[first - 1 : last]):
            return None
        uses = usage.of_tape(first, last, path)
        if uses is not None:
            return uses
        found = []
        for i, (before, after) in enumerate(itertools.pairwise(path[0]), first):
            uses = usage.get(usage.key(i), (after - before, ()))
            if uses is None:
                return None
            found.append(uses)
        return usage.join(first, last, path, found)

    def look_together(
        self,
        tape: Tape,
        first: int,
        marks: Sequence[int],
        path: JointPath,
        inputs: Mapping[int, int],
        outputs: Sequence[Tensor],
    ) -> Uses:
        """Walk a tape that several stages share.

        Args:
            tape: The tape.
            first: The first of the stages.
            marks: How many nodes there were before each of them, and at the end.
            path: The same from 0 on, and the shapes of the output.
            inputs: The storages of what they are given.
            outputs: What they hand on.
        """
        usage = self._prepared.usage
        counts = enumerate(itertools.pairwise(marks), first)
        runs = [TapedRun(i, usage.key(i), (after - before, ())) for i, (before, after) in counts]
        found = self._look(tape, runs, marks[:-1], inputs, outputs)
        return usage.join(first, runs[-1].i, path, found)

    def _look(
        self,
        tape: Tape,
        runs: Sequence[TapedRun],
        marks: Sequence[int],
        inputs: Mapping[int, int],
        output: Sequence[Tensor],
    ) -> list[Uses]:
        """What each stage of a tape uses, and whether the tape takes more than was projected.

        Args:
            tape: The tape.
            runs: The runs that have made it.
            marks: How many nodes there were before each.
            inputs: The storages of the first one's input.
            output: The tensors of the last one's output.
        """
        prepared, aliases = self._prepared, self._seen.aliases
        found = tape.contents(marks)
        theirs = set(storages(self._seen.given.leaves))
        for block in {int(prepared.script.owner[run.i]) for run in runs}:
            slots = prepared.slots[block]
            theirs |= storages([*slots.parameters(), *slots.buffers()]).keys()
        for run, contents in zip(runs, found, strict=True):
            self._check_leaves(run.i, contents)
        prepared.overruns.look([run.i for run in runs], found, inputs, output, theirs, aliases)
        return [
            prepared.usage.learn(
                run.key, run.path, [c.leaves.get(id(a), _UNUSED)[1] for a in aliases]
            )
            for run, c in zip(runs, found, strict=True)
        ]

    def _check_leaves(self, i: int, contents: Contents) -> None:
        """Refuse a stage whose tape would lose a gradient."""
        leaves = contents.leaves
        known = {id(alias) for alias in self._seen.aliases}
        unknown = [leaves[key][0] for key in leaves.keys() - known]
        # Those that a stage makes itself come with each run; nothing is known of their ids.
        if unknown and not (self._prepared.facts.own_leaves[i - 1] and are_leaves(unknown)):
            name = self._prepared.stages[i - 1].name
            raise ExecutionError(
                f"stage {name!r} uses a tensor that requires a gradient "
                "and is neither a parameter of the model nor an argument of the call that "
                "ckptsched sees, so its gradient would be lost; register it, or give it to the "
                "model as an argument by itself; if the stage makes it anew in every run, profile "
                "and plan again"
            )
