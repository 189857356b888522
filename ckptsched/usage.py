"""Which parameters each kind of stage uses, learned from the first tape of each.

Sums of gradients are made in the order of one graph over all stages (see `tape`): a tape is
given the gradients so far of what it uses more than once, or of what stages after it have used.
A walk of the tape tells; stages that compute the same are walked once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import final

from .tracing import StageCall


@final
@dataclass(frozen=True, slots=True)
class Uses:
    """Which of the aliases that collect gradients a stage uses, by their numbers."""

    all: tuple[int, ...]
    repeated: tuple[int, ...]
    """Those that one run uses more than once."""

    @classmethod
    def counted(cls, counts: Sequence[int]) -> Uses:
        """Of how often each alias is used."""
        return cls(
            all=tuple([k for k, count in enumerate(counts) if count]),
            repeated=tuple([k for k, count in enumerate(counts) if count > 1]),
        )


@final
class Usage:
    """What is known of the stages of a chain so far; it fills while they run."""

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
        self._uses: dict[Hashable, Uses] = {}
        self._fed: dict[tuple[Hashable, int], tuple[int, ...]] = {}
        self._sums: dict[tuple[frozenset[int], int], tuple[int, ...]] = {}

    def __getstate__(self) -> dict[str, object]:
        """What does not depend on the identity of parameters, which a copy does not share."""
        return {**self.__dict__, "_uses": {}, "_fed": {}, "_sums": {}}

    def __bool__(self) -> bool:
        """Whether anything is known."""
        return bool(self._uses)

    def key(self, i: int, wanted: tuple[int, ...] | None = None) -> Hashable:
        """What stages have in common that use the same.

        Args:
            i: The stage, counted from 1.
            wanted: Of which tensors of its input a gradient is wanted, where those are others
                than the plan says.
        """
        kind = self._kinds[i - 1]
        return kind if wanted is None else (kind, wanted)

    def get(self, key: Hashable) -> Uses | None:
        """What is known of a kind of stage."""
        return self._uses.get(key)

    def learn(self, key: Hashable, uses: Uses) -> Uses:
        """Note what a kind of stage uses, and return it."""
        self._uses[key] = uses
        self._fed.clear()
        self._sums.clear()  # they were made without knowing these
        return uses

    def knows(self, first: int, last: int) -> bool:
        """Whether all stages from one to another have been seen."""
        return set(self._kinds[first - 1 : last]) <= self._uses.keys()

    def fed(self, key: Hashable, uses: Uses, i: int) -> tuple[int, ...]:
        """The aliases whose sums so far one stage is given: used again in it, or after it.

        Outside of a graph a sum is added to in place, even where the gradient that it began with
        is a view of another one, of another alias or of a state.

        Args:
            key: What `key` returned for the stage.
            uses: What is known of it.
            i: The stage, counted from 1.
        """
        ended = bisect_left(self._ends, i)
        found = self._fed.get((key, ended))
        if found is None:
            after = [self._uses.get(kind) for kind, last in self._last.items() if last >= i]
            used = {k for later in after for k in (uses if later is None else later).all}
            used = set(uses.all) & used | set(uses.repeated)
            found = self._fed[key, ended] = tuple(sorted(used))
        return found

    def sums(self, first: int, last: int) -> tuple[int, ...]:
        """The aliases that some stages use, and to which stages after them may have added.

        Args:
            first: The first of the stages, which are known.
            last: The last of them.
        """
        kinds = frozenset(self._kinds[first - 1 : last])
        # As many kinds have ended before: the same are to come.
        ended = bisect_left(self._ends, last)
        found = self._sums.get((kinds, ended))
        if found is None:
            used = {k for kind in kinds for k in self._uses[kind].all}
            after = [self._uses.get(kind) for kind, i in self._last.items() if i >= last]
            if None not in after:
                used &= {k for uses in after if uses is not None for k in uses.all}
            found = self._sums[kinds, ended] = tuple(sorted(used))
        return found
