"""The storages that each stage of a recorded model reads and makes itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..capture.recording.replay.own_values import OwnStage, own_stages
from ..tensors.pytree import storages
from ..tensors.wrapper_tensors import all_parts
from ..workload.stage import StageLedger
from ..workload.values import Read, StageValues
from .stage_kind import StageKind
from .survey import Survey


def values_of(survey: Survey) -> tuple[StageValues, ...]:
    """What each stage reads and makes, by storages.

    Args:
        survey: The stages of the model, weighed.

    Returns:
        One for each stage. None at all for a model that is not recorded, that is several blocks, or
        of which a stage takes several paths: then it is not sure which storages there are. Nor for
        one with buffers that stages read and change: tapes may have saved a buffer that would be
        put back to an earlier value for another stage.
    """
    if len(survey.blocks) != 1 or survey.hidden():
        return ()
    order, own = survey.order, own_stages(survey.blocks[0].stages)
    if not own or not all(map(_is_plain, order, own)):
        return ()
    inputs = _homes(order[0].x.leaves)
    homes = {(0, k): home for k, home in enumerate(inputs)}
    found = []
    for i, (kind, stage) in enumerate(zip(order, own, strict=True), 1):
        before, after = _homes(kind.x.leaves), _homes(kind.output.leaves)
        made = sorted({after[place] for place in stage.makes})
        homes.update(((i, k), made.index(after[place])) for k, place in enumerate(stage.makes))
        reads = {
            Read(value.maker, homes[value], before[place])
            for value, place in zip(stage.reads, stage.entered_at, strict=True)
        }
        each = StageValues(
            reads=tuple(sorted(reads)),
            made=tuple(made),
            inputs=tuple(dict.fromkeys([before[place] for place in stage.entered_at])),
            outputs=tuple(dict.fromkeys([after[place] for place in stage.gives])),
        )
        if not _covers(each, kind, {before[place] for place in stage.of_input}):
            return ()
        found.append(each)
    return tuple(found)


def _covers(values: StageValues, kind: StageKind, of_input: set[int]) -> bool:
    """Whether all that a stage's tapes keep, and its own values lie in, is what it reads or makes.

    It is, but for what a call takes from elsewhere by a way that no recording shows. A leaf that
    the caller has given is kept by whatever hands it on, and is the caller's anyway.

    Args:
        values: What it reads and makes.
        kind: The stage.
        of_input: Storages of its input that the caller holds.
    """
    read = {each.input for each in values.reads} | of_input
    for ledger in filter(None, (kind.ledger, kind.lean)):
        parts = ledger.parts
        if parts is None:
            if ledger.input_saved and not read:
                return False
            continue
        sources = {parts.output_sources[k] for k in values.made} - {-1}
        new = {k for k, source in enumerate(parts.output_sources) if source < 0}
        if not read.issuperset(sources.union(parts.saved_inputs)) or not new <= {*values.made}:
            return False
    return True


def _is_plain(kind: StageKind, stage: OwnStage) -> bool:
    """Whether the storages of a stage are those of one run of it, one for each tensor."""
    leaves = *kind.x.leaves, *kind.output.leaves
    if kind.others or len(list(all_parts(leaves))) != len(leaves):
        return False
    if stage.alive != (len(kind.x.leaves), len(kind.output.leaves)):
        return False
    ledger = kind.ledger
    return ledger is not None and _outputs(ledger) == len(storages(kind.output.leaves))


def _outputs(ledger: StageLedger) -> int:
    return len(ledger.parts.output_bytes) if ledger.parts else 1


def _homes(leaves: Sequence[Tensor]) -> list[int]:
    """For each tensor the number of its storage, in the order in which they come up."""
    places = list(storages(leaves))
    return [places.index(part.untyped_storage()._cdata) for part in all_parts(leaves)]
