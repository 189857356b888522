"""Learns which parameters each kind of stage uses, so that gradients are summed in order.

Sums of gradients are made in the order of one graph over all stages (see `tape`): a tape is
given the gradients so far of what it uses more than once, or of what stages after it have used.
A walk of the tape tells. Tapes are walked once a path: stages that compute the same, make as many
nodes and return the same shapes have taken the same path. What is known of one path says nothing
of another, as where data, a draw or an attribute decides which parameters a stage uses.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import nn

from ..capture.stage_discovery import StageCall

Path: TypeAlias = tuple[int, tuple[torch.Size, ...]]
"""How many nodes a run with tape has made, and the shapes of its output."""

_MOST_PATHS = 256  # of a kind that are remembered; tapes of others are walked each time
_LOOK_AGAIN = 64  # after so many tapes of a kind on known paths one is walked again


@final
@dataclass(frozen=True, slots=True, eq=False)
class Uses:
    """Which of the aliases that collect gradients a stage uses, by their numbers.

    By identity: `Usage` makes one for all tapes that use the same.
    """

    all: tuple[int, ...]
    repeated: tuple[int, ...]
    """Those that one run uses more than once."""


@final
class Usage:
    """Parameters that the stages of a chain have been seen to use so far, by kind and path."""

    def __init__(self, stages: Sequence[StageCall], carries: Sequence[tuple[int, ...]]) -> None:
        """Tell the kinds of stages apart, and know nothing of them yet.

        Args:
            stages: In order.
            carries: For each stage, which tensors of its input carry a gradient.
        """
        known: dict[object, int] = {}
        keys = [(stage.key, flags) for stage, flags in zip(stages, carries, strict=True)]
        self._kinds = array("i", [known.setdefault(key, len(known)) for key in keys])
        # The last stage of each kind, as an index.
        self._last = {kind: i for i, kind in enumerate(self._kinds)}
        self._ends = sorted(self._last.values())
        self._roots = {kind: stages[i].module for kind, i in self._last.items()}
        self._run_by: dict[int, set[int]] = {}  # the kinds that run a module, by its id
        self.version = 0
        """Grows when a kind turns out to use what it was not known to use."""
        self._forget()

    def _forget(self) -> None:
        self._paths: dict[Hashable, dict[Path, Uses]] = {}
        self._made: dict[tuple[tuple[int, ...], tuple[int, ...]], Uses] = {}
        self._used: dict[Hashable, frozenset[int]] = {}
        self._tapes: dict[Hashable, int] = {}
        self._fed: dict[tuple[Uses, int], tuple[int, ...]] = {}
        self._joined: dict[tuple[bytes, Hashable], Uses] = {}

    def __getstate__(self) -> dict[str, object]:
        """What does not depend on the identity of parameters, which a copy does not share."""
        names = ("_paths", "_made", "_used", "_tapes", "_fed", "_joined", "_run_by")
        return self.__dict__ | {name: {} for name in names}

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self._used)

    def key(self, i: int, wanted: tuple[int, ...] | None = None) -> Hashable:
        """A key that is equal for stages that use the same parameters.

        Args:
            i: The stage, counted from 1.
            wanted: Of which tensors of its input a gradient is wanted, where those are others
                than the plan says.
        """
        kind = self._kinds[i - 1]
        return kind if wanted is None else (kind, wanted)

    def get(self, key: Hashable, path: Path) -> Uses | None:
        """The known uses of a kind of stage on a path; None now and then, to look again."""
        found = self._paths.get(key)
        if found is None:
            return None
        uses = found.get(path)
        if uses is not None:
            count = self._tapes[key] = self._tapes[key] + 1
            if not count % _LOOK_AGAIN:
                return None
        return uses

    def learn(self, key: Hashable, path: Path, counts: Sequence[int]) -> Uses:
        """Record the parameters that a kind of stage uses on a path.

        Args:
            key: What `key` returned for the stage.
            path: The path.
            counts: How often each alias is used.
        """
        every = tuple([k for k, count in enumerate(counts) if count])
        repeated = tuple([k for k, count in enumerate(counts) if count > 1])
        uses = self._made.setdefault((every, repeated), Uses(every, repeated))
        known = self._paths.setdefault(key, {})
        self._tapes.setdefault(key, 0)
        if len(known) < _MOST_PATHS or path in known:
            known[path] = uses
        before = self._used.get(key)
        if before is None or not before.issuperset(every):
            self._used[key] = frozenset(every).union(before or ())
            self.version += 1
            self._fed.clear()  # they were made without knowing these
        return uses

    def look_again(self, modules: Iterable[nn.Module]) -> None:
        """Forget the paths of stages that run some modules, so that their next tapes are walked.

        Args:
            modules: Modules that have changed.
        """
        kinds: set[int] = set()
        for module in modules:
            mine = self._run_by.get(id(module))
            if mine is None:
                mine = {k for k, root in self._roots.items() if module in {*root.modules()}}
                self._run_by[id(module)] = mine
            kinds |= mine
        self._clear(kinds)

    def _clear(self, kinds: AbstractSet[int]) -> None:
        """Forget the paths of some kinds, but not what they have been seen to use."""
        for key, known in self._paths.items():
            if (key[0] if isinstance(key, tuple) else key) in kinds:
                known.clear()
        self._joined.clear()

    def knows(self, first: int, last: int) -> bool:
        """Whether all stages from one to another have been seen."""
        return set(self._kinds[first - 1 : last]) <= self._used.keys()

    def of_tape(self, first: int, last: int, path: Hashable) -> Uses | None:
        """The known uses of stages that share one tape; None if the tape must be walked.

        Args:
            first: The first of them.
            last: The last of them.
            path: Equal for tapes of such stages that have taken the same path.
        """
        kinds = self._kinds[first - 1 : last]
        key = kinds.tobytes(), path
        uses = self._joined.get(key)
        if uses is not None:
            count = self._tapes[key] = self._tapes.get(key, 0) + 1
            if not count % _LOOK_AGAIN:
                self._clear({*kinds})
                return None
        return uses

    def join(self, first: int, last: int, path: Hashable, uses: Iterable[Uses]) -> Uses:
        """Record the joint uses of stages that share one tape, for `of_tape`.

        What one of them uses more than once is told apart no more: where no stage after them uses
        it there is no sum so far that could come first.
        """
        every = tuple(sorted({k for each in {*uses} for k in each.all}))
        found = self._made.setdefault((every, ()), Uses(every, ()))
        if len(self._joined) < _MOST_PATHS:
            self._joined[self._kinds[first - 1 : last].tobytes(), path] = found
        return found

    def fed(self, uses: Uses, last: int) -> tuple[int, ...]:
        """The aliases whose gradients so far are fed to a tape: used again in it, or after it.

        Outside of a graph a sum is added to in place, even where the gradient that it began with
        is a view of another one, of another alias or of a state.

        Args:
            uses: What the tape uses.
            last: The last of its stages, counted from 1.
        """
        # As many kinds have ended before: the same are to come.
        ended = bisect_left(self._ends, last)
        found = self._fed.get((uses, ended))
        if found is None:
            after = [self._used.get(kind) for kind, i in self._last.items() if i >= last]
            used = set(uses.all)
            if None not in after:
                used &= {k for later in after for k in later or ()}
            found = self._fed[uses, ended] = tuple(sorted(used | set(uses.repeated)))
        return found
