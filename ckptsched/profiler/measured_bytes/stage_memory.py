"""Measures the exact bytes of one kind of stage, and of the loss."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import ProfileError
from ...memory.meters import Meter, storage_bytes
from ...recompute.side_outputs import attributes_kept
from ...tensors.pytree import State, copied, storages
from ...tensors.wrapper_tensors import all_parts
from ...torch_state.locks import Lent
from ...torch_state.replay_context import Autocast
from ...workload.ledger_bound import Variant, bound
from ...workload.stage import StageLedger, StageParts, TapeBounds, backward_variant
from ..stage_kind import Loss, LossWeight, StageKind

_MOST_STORAGES = 4  # whose combinations are measured one by one


@final
@dataclass(frozen=True, slots=True)
class _Weight:
    """Bytes measured in one run and one backward of a stage."""

    taped_peak: int
    tape: int
    saved_inputs: tuple[int, ...]
    """Storages of the input that the tape keeps."""
    saved_outputs: tuple[int, ...]
    """New storages of the output that the tape keeps, by number among all of the output."""
    backward_peak: int


@final
@dataclass(frozen=True, slots=True)
class _Held:
    """Storages of input and output that outlive the tape, by number."""

    inputs: Container[int] = ()
    outputs: Container[int] = ()


def weigh(kind: StageKind, meter: Meter) -> StageLedger:
    """Measure the exact bytes of a kind of stage, or what bounds them on all of its paths.

    Args:
        kind: The stage, with a gradient that comes back to it.
        meter: What counts bytes.
    """
    paths = (kind, *kind.others)
    variants = [_variant(path, _weigh_path(path, meter)) for path in paths]
    ledger = bound(variants, _inputs(kind), reserve=kind.varies)
    kind.left_bytes = max(path.left_bytes for path in paths)
    bounds = TapeBounds(
        saved_bytes=max(path.saved_bytes for path in paths),
        largest_bytes=max(path.largest_bytes for path in paths),
        used_bytes=max(path.used_bytes for path in paths),
        varies=kind.varies,
    )
    return replace(ledger, bounds=bounds)


def bytes_left_for_good(kind: StageKind, meter: Meter) -> int:
    """Bytes that each run of a stage and its backward leave behind, beside those of the run before.

    Modes that keep tensors do so. What the stage itself keeps, in lists of its modules, is put
    back, as it is no matter of the modes.

    Args:
        kind: The stage, weighed.
        meter: What counts bytes.
    """
    kind.set_gradients(first=False)
    with attributes_kept(kind.call.module.modules()), meter.window() as window:
        for _ in range(3):  # a first one may set up what is replaced from then on
            kind.begin()
            tape, _ = kind.record(kind.x)
            kind.go_back(tape)
            del tape
            window.mark()
    kind.clear_gradients()
    last = window.phases[2]
    return max(0, last.final_bytes - last.start_bytes)


def _inputs(kind: StageKind) -> int:
    return len(storages(kind.x.leaves))


def _variant(kind: StageKind, ledger: StageLedger) -> Variant:
    outputs = storages(kind.output.leaves)
    places = list(outputs)
    return Variant(
        ledger=ledger,
        homes=tuple(
            [places.index(y.untyped_storage()._cdata) for y in all_parts(kind.output.leaves)]
        ),
        sizes=tuple([kind.standing.bytes_of(leaves) for leaves in outputs.values()]),
        sources=_sources(kind),
    )


def _weigh_path(kind: StageKind, meter: Meter) -> StageLedger:
    kind.begin()
    with meter.window() as window:
        output = kind.run()
        window.mark()
        del output
    forward_peak = window.phases[0].peak_bytes
    left = window.phases[1].final_bytes
    kind.left_bytes += left
    lone = _weigh_backward(kind, meter, _Held(), first=True)
    simple = _inputs(kind) == len(storages(kind.output.leaves)) == 1
    ledger = StageLedger(
        state_bytes=kind.standing.bytes_of(kind.output.leaves),
        output_is_view=simple and _sources(kind) == (0,),
        # What the modules hold on to anyway is theirs, where no other tape of them is kept, and
        # no side output of the first run stays beside that of a later one.
        tape_bytes=(max(0, lone.tape - left) if kind.count == 1 and not kind.looks else lone.tape),
        input_saved=bool(lone.saved_inputs),
        output_saved=bool(lone.saved_outputs),
        forward_peak_bytes=forward_peak,
        taped_peak_bytes=lone.taped_peak,
        backward_peak_bytes=(lone.backward_peak,) * 8,
    )
    if simple:
        return replace(ledger, backward_peak_bytes=_simple_peaks(kind, meter, lone))
    return _with_parts(kind, meter, lone, ledger)


def _sources(kind: StageKind) -> tuple[int, ...]:
    """For each storage of the output the storage of the input that it is; -1 for a new one."""
    inputs = list(storages(kind.x.leaves))
    return tuple(
        inputs.index(storage) if storage in inputs else -1
        for storage in storages(kind.output.leaves)
    )


def _firsts(kind: StageKind) -> tuple[bool, ...]:
    # Later backwards add to gradients that are there; a stage that runs once has none.
    return (False, True) if kind.count > 1 and kind.gradient_bytes else (True,)


def _simple_peaks(kind: StageKind, meter: Meter, lone: _Weight) -> tuple[int, ...]:
    """Peaks of the backward of a stage from one storage to one."""
    peaks = {}
    for input_held in (False, True) if lone.saved_inputs else (False,):
        for output_held in (False, True) if lone.saved_outputs and kind.is_last else (False,):
            held = _Held((0,) * input_held, (0,) * output_held)
            for first in _firsts(kind):
                if not (input_held or output_held) and first:
                    peaks[False, False, True] = lone.backward_peak
                else:
                    weight = _weigh_backward(kind, meter, held, first=first)
                    peaks[input_held, output_held, first] = weight.backward_peak
    return _all_variants(peaks, storage_bytes(kind.output.leaves) if lone.saved_outputs else 0)


def _with_parts(kind: StageKind, meter: Meter, lone: _Weight, ledger: StageLedger) -> StageLedger:
    """Add the storages one by one; the figures beside them become lower bounds."""
    outputs = storages(kind.output.leaves)
    sources = _sources(kind)
    saved = [(True, k) for k in lone.saved_inputs] + [(False, k) for k in lone.saved_outputs]
    masks = range(1 << len(saved)) if len(saved) <= _MOST_STORAGES else (0, (1 << len(saved)) - 1)
    peaks: dict[bool, list[int]] = {}
    for first in _firsts(kind):
        for mask in masks:
            chosen = [part for k, part in enumerate(saved) if mask >> k & 1]
            held = _Held(
                [k for is_input, k in chosen if is_input],
                [k for is_input, k in chosen if not is_input],
            )
            same = not mask and first
            weight = lone if same else _weigh_backward(kind, meter, held, first=first)
            peaks.setdefault(first, []).append(weight.backward_peak)
    parts = StageParts(
        inputs=_inputs(kind),
        output_bytes=tuple(kind.standing.bytes_of(leaves) for leaves in outputs.values()),
        output_sources=sources,
        saved_inputs=lone.saved_inputs,
        saved_outputs=lone.saved_outputs,
        backward_peak_bytes=(*peaks.get(False, peaks[True]), *peaks[True]),
    )
    new = tuple(k for k, source in enumerate(sources) if source < 0)
    lowest = {first: min(peaks.get(first, peaks[True])) for first in (False, True)}
    return replace(
        ledger,
        state_bytes=parts.new_bytes,
        input_saved=len(lone.saved_inputs) == parts.inputs,
        output_saved=bool(new) and lone.saved_outputs == new,
        backward_peak_bytes=(lowest[False], lowest[True]) * 4,
        parts=parts,
    )


def _all_variants(peaks: dict[tuple[bool, bool, bool], int], output_bytes: int) -> tuple[int, ...]:
    """Fill in variants that make no difference, and bound the one that is hardly ever met."""
    filled = [0] * 8
    for input_held in (False, True):
        for output_held in (False, True):
            for first in (False, True):
                held = input_held if (True, False, True) in peaks else False
                again = first if (False, False, False) in peaks else True
                peak = peaks.get((held, output_held, again))
                if peak is None:
                    # An output that something else holds is not freed on the way.
                    peak = peaks[held, False, again] + output_bytes * output_held
                variant = backward_variant(
                    input_held=input_held, output_held=output_held, first=first
                )
                filled[variant] = peak
    return tuple(filled)


def _weigh_backward(kind: StageKind, meter: Meter, held: _Held, *, first: bool) -> _Weight:
    """Run a stage with tape and go back, with its input born inside the window."""
    kind.set_gradients(first=first)
    kind.begin()
    sources = _sources(kind)
    with meter.window() as window:
        x = copied(kind.x, kind.standing.fixed)
        window.mark()
        tape, made = kind.record(x)
        inputs: list[Any] = list(storages(x.leaves).values())
        outputs: list[Any] = list(storages(made.leaves).values())
        sizes = [storage_bytes(leaves) for leaves in (*inputs, *outputs)]
        del x, made
        window.mark()
        _drop(outputs, [k for k, source in enumerate(sources) if source >= 0])
        for k in range(len(outputs)):
            _drop(outputs, () if k in held.outputs else (k,))
            window.mark()
        for k in range(len(inputs)):
            _drop(inputs, () if k in held.inputs else (k,))
            window.mark()
        gradients = kind.go_back(tape)
        window.mark()
        del gradients, outputs, inputs
    kind.clear_gradients()
    forward, drops, backward = window.phases[1], window.phases[2:-2], window.phases[-2]
    n = len(sizes) - len(sources)
    kept = [drop.final_bytes == drop.start_bytes for drop in drops]
    # What was there before is not freed with the tape, so it does not show whether it is saved.
    fixed, standing = kind.standing.fixed, kind.standing.fixed | kind.standing.buffers
    saved_outputs = [
        k
        for k, home in enumerate(storages(kind.output.leaves))
        if sources[k] < 0 and kept[k] and home not in standing
    ]
    saved_inputs = [
        k
        for k, home in enumerate(storages(kind.x.leaves))
        if kept[len(sources) + k] and home not in fixed
    ]
    saved_bytes = sum(sizes[k] for k in saved_inputs) + sum(sizes[n + k] for k in saved_outputs)
    return _Weight(
        taped_peak=forward.peak_bytes - forward.start_bytes,
        tape=drops[-1].final_bytes - saved_bytes,
        saved_inputs=tuple(saved_inputs),
        saved_outputs=tuple(saved_outputs),
        backward_peak=backward.peak_bytes - backward.start_bytes,
    )


def _drop(groups: list[Any], which: Iterable[int]) -> None:
    for k in which:
        groups[k] = None


def weigh_loss(
    loss: Loss,
    output: State,
    carries: tuple[int, ...],
    meter: Meter,
    sides: Sequence[Tensor] = (),
) -> LossWeight:
    """Measure the bytes of a loss on one output of the model.

    Args:
        loss: From the output to a scalar.
        output: The model's output.
        carries: Which of its tensors carry a gradient.
        meter: What counts bytes.
        sides: The side outputs of all stages, as leaves; the loss of a step may use them even if
            this one does not.

    Raises:
        ProfileError: The output is no floating point tensor, or the loss no function of it.
    """
    _, gradients = go_back(loss, output, carries)
    for tensor in sides:
        tensor.grad = None
    size = storage_bytes(g for g in gradients if g is not None)
    with meter.window() as window:
        value, again = go_back(loss, output, carries, arrived=window.mark)
        rest = 2 * storage_bytes([value])
        del value, again
    before = window.phases[0]
    # For each a gradient, and what comes before it.
    unused = sum(tensor.nbytes for tensor in sides if tensor.grad is None)
    for tensor in sides:
        tensor.grad = None
    return LossWeight(
        gradients=gradients,
        overhead_bytes=max(0, before.peak_bytes - size) + 2 * unused,
        # At least the value and the number 1 that going back begins with, whose storage the
        # gradient may share.
        rest_bytes=max(before.final_bytes - size, rest) + unused,
    )


class _Arrival(torch.autograd.Function):
    """Catches the gradient of the loss as it arrives at the model's output.

    A leaf would not do: what it accumulates may be a copy in another layout.
    """

    @staticmethod
    def forward(ctx: Any, arrived: Callable[[], None], box: list[Any], *leaves: Tensor) -> Any:
        ctx.arrived, ctx.box = arrived, box
        ctx.set_materialize_grads(False)
        views = tuple([leaf.view_as(leaf) for leaf in leaves])
        return views if len(views) > 1 else views[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.arrived()
        ctx.box.append(grads)
        return None, None, *[None for _ in grads]


def go_back(
    loss: Loss,
    output: State,
    carries: tuple[int, ...],
    arrived: Callable[[], None] = lambda: None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Run a loss and go back through it.

    Args:
        loss: From the output to a scalar.
        output: The model's output.
        carries: Which of its tensors carry a gradient.
        arrived: Called as the gradient arrives at the output.

    Returns:
        The value of the loss, and the gradients that it sends back, by tensor of the output.

    Raises:
        ProfileError: The output has no floating point tensor, or the loss no function of it.
    """
    if not any(carries):
        dtypes = ", ".join(str(leaf.dtype) for leaf in output.leaves)
        if any(leaf.is_floating_point() or leaf.is_complex() for leaf in output.leaves):
            raise ProfileError(
                "there is nothing to train: no parameter that the output depends on requires a "
                "gradient, and the sample does not either; unfreeze what is to be trained "
                "(requires_grad_()) before the model is profiled, or give a sample that requires "
                "a gradient; where parameters do require one, a stage cuts the graph: by detach(), "
                "torch.no_grad(), or torch.utils.checkpoint on an input without gradient "
                "(give that use_reentrant=False)"
            )
        raise ProfileError(
            f"the model's output has dtype {dtypes}; a loss needs a floating point one that "
            "depends on what is trained"
        )
    box: list[tuple[Tensor | None, ...]] = []
    leaves = [
        leaf.detach().requires_grad_() if carried else leaf.detach()
        for leaf, carried in zip(output.leaves, carries, strict=True)
    ]
    caught = _Arrival.apply(arrived, box, *[leaf for leaf in leaves if leaf.requires_grad])
    views = iter(caught if isinstance(caught, tuple) else (caught,))
    given = output.replaced(next(views) if leaf.requires_grad else leaf for leaf in leaves)
    value = loss(given.value())
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ProfileError(f"the loss must return one number, found {found}")
    if not value.requires_grad:
        raise ProfileError("the loss does not depend on the output: no gradient comes back")
    with Autocast.off(value.device).again(), Lent():
        value.backward()  # type: ignore[no-untyped-call]
    if not box:
        raise ProfileError("the loss does not depend on the output: no gradient comes back")
    sent = iter(box.pop())
    gradients = tuple([next(sent) if carried else None for carried in carries])
    return value.detach(), gradients
