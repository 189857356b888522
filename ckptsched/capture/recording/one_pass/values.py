"""The numbers of a recording's tensors, and what is known of their values and sizes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Container, Iterable, Sequence
from typing import final

from torch import Tensor

from ..calls import Numbered, Source


@final
class Numbers:
    """Numbers of tensors, known by identity while they live; none is kept alive."""

    def __init__(self) -> None:
        """There are none yet."""
        self._by_id: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def of(self, tensor: Tensor) -> int | None:
        """The number of a tensor that has one."""
        found = self._by_id.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def add(self, tensor: Tensor) -> int:
        """The number of a tensor, a new one where it has none."""
        number = self.of(tensor)
        if number is None:
            number = self._count
            self._count += 1
            self._by_id[id(tensor)] = weakref.ref(tensor), number
        return number

    def held(self, others: Container[int]) -> list[int]:
        """Numbers of the tensors that something in Python holds.

        Args:
            others: Those that are not asked for.
        """
        asked = [(ref, number) for ref, number in self._by_id.values() if number not in others]
        if all(ref() is None for ref, _ in asked):
            return []
        gc.collect()
        # The collector does not search what a program has frozen, as before it forks: then what is
        # held in C++ counts, too.
        blind = gc.get_freeze_count() > 0
        return [n for ref, n in asked if ref() is not None and (blind or gc.get_referrers(ref()))]


@final
class Origins:
    """What values hang on, as far as a guard must know: it can ask again for data alone."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._drawn: set[int] = set()
        self._computed: set[int] = set()
        self._sized: set[int] = set()

    def is_of_data(self, reads: Iterable[Source]) -> bool:
        """Whether all these follow from the arguments and buffers, without modules or draws."""
        return not _any_in(reads, self._drawn) and not _any_in(reads, self._computed)

    def is_sized_by_data(self, reads: Iterable[Source]) -> bool:
        """Whether the sizes of one of these hang on data."""
        return _any_in(reads, self._sized)

    def note(
        self, reads: Sequence[Source], numbers: Iterable[int], *, drew: bool, computed: bool
    ) -> None:
        """A call has made or changed values.

        Args:
            reads: What it was given.
            numbers: The values.
            drew: Whether it has drawn random numbers.
            computed: Whether it computes with parameters, or may.
        """
        numbers = [*numbers]
        if drew or _any_in(reads, self._drawn):
            self._drawn.update(numbers)
        if computed or _any_in(reads, self._computed):
            self._computed.update(numbers)

    def note_sizes(
        self,
        reads: Sequence[Source],
        given: Sequence[Tensor],
        made: Iterable[tuple[int, Tensor]],
        *,
        by_data: bool,
    ) -> None:
        """Note which results have sizes that hang on data: not those of an argument that has none.

        Args:
            reads: What a call was given.
            given: The same as tensors.
            made: What it has made, by number.
            by_data: Whether one of its operators makes sizes of data, as `nonzero` does.
        """
        if not by_data and not self.is_sized_by_data(reads):
            return
        pairs = zip(given, reads, strict=True)
        sure = {
            t.shape for t, source in pairs if not by_data and not _any_in([source], self._sized)
        }
        self._sized.update(number for number, t in made if t.dim() and t.shape not in sure)


def _any_in(reads: Iterable[Source], values: set[int]) -> bool:
    return any(isinstance(source, Numbered) and source.number in values for source in reads)
