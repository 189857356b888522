"""One ledger for a stage that takes other bytes on other paths: what each of them takes, or more.

A stage whose path hangs on its data or on a draw has a ledger a path. A plan needs one that no
path exceeds. Sums of bytes are the largest of all. Two facts need care:

- **The output may be the input itself on one path, and new on another**, as where a layer is
  dropped. It is then charged as new, with the bytes that it has on any path. That is enough: on
  the path where it is the input, what the ledger takes for two storages is one, which lives as
  long as either of them would.
- **A backward takes less where it may free what it has saved.** By the ledger a storage may be
  free to go that on another path is held, as it is another one's, too. Then the ledger has charged
  that other one as well, and it takes no less than what cannot be freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from .stage import StageLedger, StageParts

_RESERVE = 16  # the part of a peak that is charged besides
_MOST_STORAGES = 4  # for more than these `StageParts` knows two peaks only


@final
@dataclass(frozen=True, slots=True)
class Variant:
    """A stage on one path."""

    ledger: StageLedger
    homes: tuple[int, ...]
    """For each dense tensor of the output the storage of it in which that lies, from 0."""
    sizes: tuple[int, ...]
    """Bytes of each storage of the output, the input's among them."""
    sources: tuple[int, ...]
    """For each of them which storage of the input it is, counted from 0; -1 for a new one."""

    def saved(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Which storages of the input, and which new ones of the output, the tape keeps."""
        parts = self.ledger.parts
        if parts is not None:
            return parts.saved_inputs, parts.saved_outputs
        return (0,) * self.ledger.input_saved, (0,) * self.ledger.output_saved


def bound(variants: Sequence[Variant], inputs: int, *, reserve: bool = False) -> StageLedger:
    """A ledger that charges no path less than it takes; states are as the first variant has them.

    `inputs` is the number of storages of the input. With a `reserve`, where there may be more paths
    than these, the peaks of runs and backwards, which nothing shows while the stage runs, are
    charged with a sixteenth more.
    """
    first, *others = variants
    if all(other == first for other in others):
        return first.ledger
    ledgers = [variant.ledger for variant in variants]
    sizes, sources = _states(variants)
    saved_inputs = tuple(sorted({k for v in variants for k in v.saved()[0]}))
    saved_outputs = tuple(
        [
            b
            for b, source in enumerate(sources)
            if source < 0 and any(_storages(v, first, b) & {*v.saved()[1]} for v in variants)
        ]
    )
    simple = inputs == len(sizes) == 1

    def more(size: int) -> int:
        return size + reserve * -(-size // _RESERVE)

    joined = replace(
        first.ledger,
        state_bytes=sizes[0] if simple else sum(_new(sizes, sources)),
        output_is_view=simple and sources == (0,),
        tape_bytes=max(x.tape_bytes for x in ledgers),
        input_saved=len(saved_inputs) == inputs,
        output_saved=bool(saved_outputs) and len(saved_outputs) == len(_new(sizes, sources)),
        forward_peak_bytes=more(max(x.forward_peak_bytes for x in ledgers)),
        taped_peak_bytes=more(max(x.taped_peak_bytes for x in ledgers)),
        backward_peak_bytes=tuple(map(more, _peaks(ledgers, simple=simple))),
        parts=None,
    )
    if simple:
        return joined
    parts = StageParts(
        inputs=inputs,
        output_bytes=sizes,
        output_sources=sources,
        saved_inputs=saved_inputs,
        saved_outputs=saved_outputs,
        backward_peak_bytes=_by_storages(joined, len(saved_inputs) + len(saved_outputs)),
    )
    return replace(joined, parts=parts)


def _by_storages(joined: StageLedger, count: int) -> tuple[int, ...]:
    """Its two peaks of the backward, whichever of so many saved storages others hold."""
    masks = 1 << count if count <= _MOST_STORAGES else 2
    later, fresh = joined.backward_peak_bytes[:2]
    return (later,) * masks + (fresh,) * masks


def _storages(variant: Variant, first: Variant, b: int) -> set[int]:
    """Where a path has the tensors that the first path has in storage b."""
    pairs = zip(variant.homes, first.homes, strict=True)
    return {home for home, theirs in pairs if theirs == b}


def _states(variants: Sequence[Variant]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes and origin of each storage of the output, as the first path has them."""
    first = variants[0]
    sizes, sources = [], []
    for b in range(len(first.sizes)):
        found = [(v, home) for v in variants for home in _storages(v, first, b)]
        origins = {v.sources[home] for v, home in found}
        sources.append(origins.pop() if len(origins) == 1 else -1)
        sizes.append(max(sum(v.sizes[home] for home in _storages(v, first, b)) for v in variants))
    return tuple(sizes), tuple(sources)


def _new(sizes: Sequence[int], sources: Sequence[int]) -> list[int]:
    return [size for size, source in zip(sizes, sources, strict=True) if source < 0]


def _peaks(ledgers: Sequence[StageLedger], *, simple: bool) -> tuple[int, ...]:
    """Peaks of the backward by `backward_variant`."""
    if simple and all(ledger.parts is None for ledger in ledgers):
        rows = zip(*(x.backward_peak_bytes for x in ledgers), strict=True)
        return tuple([max(row) for row in rows])
    highest = [0, 0]
    for ledger in ledgers:
        if ledger.parts is None:
            halves = ledger.backward_peak_bytes[::2], ledger.backward_peak_bytes[1::2]
        else:
            peaks = ledger.parts.backward_peak_bytes
            halves = peaks[: len(peaks) // 2], peaks[len(peaks) // 2 :]
        highest = [max(now, *half) for now, half in zip(highest, halves, strict=True)]
    return tuple(highest) * 4
