"""Which values each stage of a recorded model reads and makes, beside the state that is handed on.

The state between two stages of a recorded model is a live set: all that stages before have made and
later ones read. Most of it a stage only hands on. What it reads itself, and where that was made,
turns the chain into a graph, on which each stage needs no more than its own reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

from ..base.errors import WorkloadError
from .stage import StageLedger, StageParts


class Read(NamedTuple):
    """A storage that a stage reads."""

    maker: int
    """The stage that has made the value, counted from 1; 0 for the input."""
    made: int
    """Which of the storages of what that stage has made."""
    input: int
    """Which storage of the stage's input it is, the whole live set."""


@final
@dataclass(frozen=True, slots=True)
class StageValues:
    """What one stage reads and makes, by storages."""

    reads: tuple[Read, ...]
    """The storages in which the values lie that it reads. A storage that several stages have put
    values into, as where one made a view, is read from each of them."""
    made: tuple[int, ...]
    """The storages of its output in which the values lie that it makes, ascending."""
    inputs: tuple[int, ...]
    """The storages of its input that it reads, in the order in which its values come up."""
    outputs: tuple[int, ...]
    """The storages of its output that it makes, or reads and hands on, in that order."""

    @property
    def makers(self) -> tuple[int, ...]:
        """The stages whose values it reads, ascending; 0 for the input."""
        return tuple(sorted({read.maker for read in self.reads}))


def values_to_json(values: Sequence[StageValues]) -> list[list[Any]]:
    """Values as JSON data: for each stage its reads, and the storages it makes, takes and gives."""
    return [
        [[list(read) for read in each.reads], *map(list, (each.made, each.inputs, each.outputs))]
        for each in values
    ]


def values_from_json(data: Sequence[Sequence[Any]]) -> tuple[StageValues, ...]:
    """Read what `values_to_json` gives."""
    return tuple(
        StageValues(tuple(Read(*read) for read in reads), *map(tuple, places))
        for reads, *places in data
    )


def check_values(values: Sequence[StageValues], ledgers: Sequence[StageLedger | None]) -> None:
    """Refuse values that are not of a chain.

    Args:
        values: For each stage; none at all is fine.
        ledgers: The ledger of each stage, by which storages are counted.

    Raises:
        WorkloadError: Another number of stages, a stage without a ledger, reads of later stages, or
            storages that there are not.
    """
    if not values:
        return
    if len(values) != len(ledgers):
        raise WorkloadError(f"{len(ledgers)} stages need as many values, found {len(values)}")
    outputs = 1
    made: dict[int, int] = {}
    for i, (each, ledger) in enumerate(zip(values, ledgers, strict=True), 1):
        if ledger is None:
            raise WorkloadError(f"stage {i} has values and no ledger that counts their storages")
        inputs = ledger.parts.inputs if ledger.parts else outputs
        if ledger.parts or not ledger.output_is_view:
            outputs = len(ledger.parts.output_bytes) if ledger.parts else 1
        made.setdefault(0, inputs)
        made[i] = len(each.made)
        for read in each.reads:
            _check_read(i, read, made, inputs)
        if not (
            list(each.made) == sorted(set(each.made))
            and {*each.made} <= {*each.outputs} <= {*range(outputs)}
            and {*each.inputs} == {read.input for read in each.reads}
        ):
            raise WorkloadError(
                f"stage {i} makes the storages {each.made} and gives {each.outputs} of its output, "
                f"which has {outputs}, and takes {each.inputs}, which are to be those that it reads"
            )


def _check_read(i: int, read: Read, made: Mapping[int, int], inputs: int) -> None:
    if not (
        all(isinstance(x, int) and x >= 0 for x in read)
        and read.maker < i
        and read.made < made[read.maker]
        and read.input < inputs
    ):
        raise WorkloadError(
            f"stage {i} reads {tuple(read)}: a stage before it, one of the storages that this has "
            f"made, and one of the {inputs} of its input"
        )


def narrowed(ledger: StageLedger, values: StageValues, inputs: int) -> StageLedger:
    """The ledger of a stage that is given what it reads alone.

    Args:
        ledger: Of the stage between live sets.
        values: What it reads and makes.
        inputs: Storages of the live set before.
    """
    parts = ledger.parts or StageParts(
        inputs=inputs,
        output_bytes=(0 if ledger.output_is_view else ledger.state_bytes,),
        output_sources=(0 if ledger.output_is_view else -1,),
        saved_inputs=(0,) * ledger.input_saved,
        saved_outputs=(0,) * ledger.output_saved,
        backward_peak_bytes=(),
    )
    place = {home: k for k, home in enumerate(values.inputs)}
    # What else it is said to keep is the caller's, which no stage that does not read it hands on.
    kept = [k for k, home in enumerate(parts.saved_inputs) if home in place]
    found = replace(
        parts,
        inputs=len(values.inputs),
        output_bytes=tuple([parts.output_bytes[k] for k in values.outputs]),
        output_sources=tuple([place.get(parts.output_sources[k], -1) for k in values.outputs]),
        saved_inputs=tuple([place[parts.saved_inputs[k]] for k in kept]),
        saved_outputs=tuple([values.outputs.index(k) for k in parts.saved_outputs]),
        backward_peak_bytes=parts.backward_peak_bytes or _by_mask(ledger),
    )
    if len(kept) < len(parts.saved_inputs):
        found = replace(found, backward_peak_bytes=_with_others_held(parts, kept))
    return replace(ledger, parts=found)


def _with_others_held(parts: StageParts, kept: Sequence[int]) -> tuple[int, ...]:
    """Peaks of the backward by which of some saved inputs outlive the tape, the others held.

    Args:
        parts: All that is saved.
        kept: Which of the saved inputs the masks are to tell of.
    """
    count, outputs = len(parts.saved_inputs), len(parts.saved_outputs)
    told = [*kept, *range(count, count + outputs)]
    peaks = []
    for first in (False, True):
        for mask in range(1 << len(told)) if len(told) <= 4 else (0, 1):
            chosen = {k for bit, k in enumerate(told) if mask >> bit & 1}
            held = [k in chosen or (k < count and k not in kept) for k in range(count + outputs)]
            peaks.append(parts.backward_peak(tuple(held), first=first))
    return tuple(peaks)


def _by_mask(ledger: StageLedger) -> tuple[int, ...]:
    """Peaks of the backward of a stage from one storage to one, by which of the saved outlive."""
    saved = [4] * ledger.input_saved + [2] * ledger.output_saved
    masks = [sum(bit for k, bit in enumerate(saved) if m >> k & 1) for m in range(1 << len(saved))]
    return tuple([ledger.backward_peak_bytes[m + first] for first in (0, 1) for m in masks])
