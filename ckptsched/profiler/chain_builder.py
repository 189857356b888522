"""Assembles a chain from the measured figures of the distinct stages of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast, final

import torch
from torch import Tensor

from ..base.json_files import printable
from ..memory.meters import storage_bytes
from ..recompute.parameter_swap import Slots
from ..recompute.stateful_buffers import HiddenBuffers, changeable
from ..simulator.liveness import snapshot_bytes
from ..tensors.pytree import State, storages
from ..torch_state.replay_context import AnyGenerator, RandomState
from ..workload.chain import Chain
from ..workload.stage import Block, Stage, StageLedger, TapeOption, backward_variant
from .own_storages import values_of
from .stage_kind import LossWeight, StageKind
from .survey import Survey

_MOST_TENSORS = 4  # of a state, whose layout is told


def assemble(
    survey: Survey,
    lost: LossWeight,
    device: torch.device,
    inputs: Sequence[Tensor] = (),
    generators: Sequence[AnyGenerator] = (),
) -> Chain:
    """Make a chain of stages that have been weighed and timed.

    Args:
        survey: The stages of the model, with their ledgers and seconds.
        lost: What the loss takes.
        device: Where the model is to run; decides whether a random state takes bytes.
        inputs: The input's tensors, as the caller holds them.
        generators: What stages may draw from besides torch's own.

    Returns:
        The chain, without a signature.
    """
    order = survey.order
    spans = _spans(survey)
    draws = any(kind.draws for kind in order)
    random_bytes = RandomState.take(device, generators).counted_bytes
    random = random_bytes if draws else 0
    snapshots = snapshot_bytes(spans, len(order), random).tolist()
    # While a block runs again its buffers are cloned, and a random state or two is kept.
    extra = sum(span.buffer_bytes for span in spans) + 2 * random
    kept = snapshots[0] - random + _left(order)
    # Where nothing should draw random numbers, a look at their state at Turn says whether it did.
    look = 0 if draws else max(0, random_bytes - _bytes(lost.gradients))
    # What the output shares with the input or a parameter is there anyway.
    theirs = storages(inputs).keys() | order[-1].standing.fixed
    output_bytes = storage_bytes(
        y
        for storage, leaves in storages(order[-1].output.leaves).items()
        for y in leaves
        if storage not in theirs
    )
    return Chain(
        stages=_stages(order, lost, spans, snapshots, extra, inputs),
        input_gradient_bytes=_sent_bytes(order[0]),
        loss_seconds=lost.seconds,
        loss_overhead_bytes=max(lost.overhead_bytes, look),
        held_bytes=output_bytes + lost.rest_bytes + kept,
        draws=draws,
        random_state_bytes=random,
        kept_bytes=kept,
        blocks=spans,
        values=values_of(survey),
        layouts=tuple(map(_layout, (order[0].x, *[kind.output for kind in order]))),
    )


def _layout(state: State) -> str:
    """Dtype and shape of a state's tensors, for people."""
    shown = [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in state.leaves]
    rest = [f"and {len(shown) - _MOST_TENSORS} more"] if len(shown) > _MOST_TENSORS else []
    return ", ".join([*shown[:_MOST_TENSORS], *rest])


@final
@dataclass(frozen=True, slots=True)
class _Setting:
    """What decides the figures of a stage besides its kind, in bytes."""

    fresh: int
    """Of gradients of parameters that no later stage has made."""
    gradient: int
    """Of the gradient that comes back to it."""
    snapshot: int
    """Of the snapshot that is kept with its output."""
    buffers: int
    """Of buffers that are cloned while its block runs again."""
    extra: int
    """Of all that may be cloned or kept while any stage runs."""
    is_last: bool


def _stages(
    order: Sequence[StageKind],
    lost: LossWeight,
    spans: Sequence[Block],
    snapshots: Sequence[int],
    extra: int,
    inputs: Sequence[Tensor],
) -> tuple[Stage, ...]:
    """The stages of the planning model, from the last to the first; equal ones are one object."""
    made: dict[tuple[int, _Setting], Stage] = {}
    stages: list[Stage] = []
    seen: set[int] = set()
    gradient = _bytes(lost.gradients)
    for i in range(len(order), 0, -1):
        kind = order[i - 1]
        fresh = sum(size for alias, size in kind.gradient_bytes.items() if alias not in seen)
        seen.update(kind.gradient_bytes)
        if i == 1:
            own, lean = (
                x and _with_copies(x, kind, inputs, fresh) for x in (kind.ledger, kind.lean)
            )
            kind = replace(kind, ledger=own, lean=lean)
        buffers = next(span.buffer_bytes for span in spans if span.last >= i)
        setting = _Setting(fresh, gradient, snapshots[i], buffers, extra, i == len(order))
        key = id(kind), setting
        if key not in made:
            made[key] = _stage(kind, setting)
        stages.append(made[key])
        gradient = _sent_bytes(kind)
    return tuple(reversed(stages))


def _left(order: Iterable[StageKind]) -> int:
    """Bytes that all modules keep from their last run."""
    found: dict[int, int] = {}
    for kind in order:
        key, before = id(kind.call.module), found.get(id(kind.call.module), 0)
        size = kind.left_bytes
        found[key] = before + size if kind.piles_up else max(before, size)
    return sum(found.values())


def _with_copies(
    ledger: StageLedger, kind: StageKind, inputs: Sequence[Tensor], fresh: int
) -> StageLedger:
    """Charge the copies that autograd makes where leaves want gradients in another layout."""
    copies = max(
        sum(
            leaf.nbytes
            for leaf, gradient in zip(inputs, sent, strict=bool(inputs))
            if leaf.is_leaf and gradient is not None and gradient.stride() != leaf.stride()
        )
        for sent in kind.sends_back
    )
    if not copies:
        return ledger
    peak = fresh + _sent_bytes(kind) + copies
    peaks = tuple(max(value, peak) for value in ledger.backward_peak_bytes)
    ledger = replace(ledger, backward_peak_bytes=peaks)
    if ledger.parts is None:
        return ledger
    exact = tuple(max(value, peak) for value in ledger.parts.backward_peak_bytes)
    return replace(ledger, parts=replace(ledger.parts, backward_peak_bytes=exact))


def _sent_bytes(kind: StageKind) -> int:
    """The most bytes of gradients that a stage sends back."""
    return max(map(_bytes, kind.sends_back))


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return storage_bytes(tensor for tensor in tensors if tensor is not None)


def _spans(survey: Survey) -> tuple[Block, ...]:
    """The blocks of the chain, with the bytes of their buffers."""
    blocks = survey.blocks
    slots = [Slots([block.module]) for block in blocks]
    hidden = HiddenBuffers(slots, survey.hidden()).bytes_by_block()
    may_change = changeable(slots, survey.hidden())
    spans, first = [], 1
    for block, own, size, may in zip(blocks, slots, hidden, may_change, strict=True):
        last = first + len(block.stages) - 1
        # Those that there are clones of while stages run again.
        pairs = zip(own.buffers_in_place(), may, strict=True)
        moving = {id(b): b for b, moves in pairs if moves and b is not None}
        buffers = sum(buffer.nbytes for buffer in moving.values())
        spans.append(
            Block(
                name=printable(block.name),
                first=first,
                last=last,
                buffer_bytes=buffers,
                hidden_bytes=size,
            )
        )
        first = last + 1
    return tuple(spans)


def _stage(kind: StageKind, setting: _Setting) -> Stage:
    """A stage of the planning model: upper bounds of the bytes that its ledger charges."""
    partly = 0 < setting.fresh < sum(kind.gradient_bytes.values())
    ledger = replace(cast(StageLedger, kind.ledger), shares_parameters_partly=partly)
    parts = ledger.parts
    whole = ledger.state_bytes if parts is None else sum(parts.output_bytes)
    state = 0 if setting.is_last else whole + setting.snapshot  # the caller holds the output
    own = _tape(kind, setting, ledger, state, kind.backward_seconds)
    lean: tuple[TapeOption, ...] = ()
    if kind.lean is not None:
        other = replace(kind.lean, shares_parameters_partly=partly)
        tape = _tape(kind, setting, other, state, kind.lean_backward_seconds)
        again = kind.call.lean.names_of(kind.made_again) if kind.call.lean else ()
        lean = (replace(tape, name="lean", again=tuple(map(printable, again))),)
    return Stage(
        name=printable(kind.name),
        forward_seconds=kind.forward_seconds,
        backward_seconds=own.backward_seconds,
        state_bytes=state,
        tape_bytes=own.tape_bytes,
        gradient_bytes=setting.gradient,
        forward_overhead_bytes=own.forward_overhead_bytes,
        backward_overhead_bytes=own.backward_overhead_bytes,
        parameter_gradient_bytes=setting.fresh,
        ledger=ledger,
        other_tapes=lean,
        once=kind.call.once,
    )


def _tape(
    kind: StageKind, setting: _Setting, ledger: StageLedger, state: int, seconds: float
) -> TapeOption:
    """A tape of a stage in the planning model.

    Args:
        kind: The stage.
        setting: What decides its figures besides.
        ledger: Its exact bytes with this tape.
        state: Bytes of its state as the planning model has them.
        seconds: Of the backward.
    """
    fresh, snapshot, parts = setting.fresh, setting.snapshot, ledger.parts
    tape = ledger.tape_bytes + state + setting.buffers + snapshot * setting.is_last
    forward = max(ledger.forward_peak_bytes - state, ledger.taped_peak_bytes - tape, 0)
    if parts is None:
        highest = max(
            ledger.backward_peak_bytes[
                backward_variant(input_held=held, output_held=out, first=bool(fresh))
            ]
            for held in (False, True)
            for out in (False, True)
        )
    else:
        half = len(parts.backward_peak_bytes) // 2
        highest = max(parts.backward_peak_bytes[half:] if fresh else parts.backward_peak_bytes)
    backward = max(0, highest - _sent_bytes(kind) - fresh)
    return TapeOption(
        tape_bytes=tape,
        forward_seconds=kind.forward_seconds,
        backward_seconds=seconds,
        forward_overhead_bytes=forward + setting.extra,
        backward_overhead_bytes=backward + setting.extra,
        ledger=ledger,
    )
