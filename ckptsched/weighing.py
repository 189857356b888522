"""Measures one kind of stage, and the loss: exact bytes and seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from .context import now
from .errors import ProfileError
from .memory import Meter, storage_bytes
from .stages import StageLedger, backward_variant
from .survey import Kind, Loss, LossWeight


@final
@dataclass(frozen=True, slots=True)
class _Weight:
    """What one run and one backward of a stage have shown, in bytes."""

    taped_peak: int
    tape: int
    input_saved: bool
    output_saved: bool
    backward_peak: int


def weigh(kind: Kind, meter: Meter) -> StageLedger:
    """Measure the exact bytes of a kind of stage.

    Args:
        kind: The stage, with a gradient that comes back to it.
        meter: What counts bytes.
    """
    state_bytes = storage_bytes([kind.output])
    is_view = _shares_storage(kind.output, kind.x)
    with meter.window() as window, torch.no_grad():
        output = kind.call(kind.x)
        window.mark()
        del output
    forward_peak = window.phases[0].peak_bytes
    lone = _weigh_backward(kind, meter, input_held=False, output_held=False, first=True)
    peaks = {}
    for input_held in (False, True) if lone.input_saved else (False,):
        for output_held in (False, True) if lone.output_saved and kind.is_last else (False,):
            # Later backwards add to gradients that are there; a stage that runs once has none.
            for first in (True, False) if kind.count > 1 and kind.gradient_bytes else (True,):
                same = not (input_held or output_held) and first
                weight = (
                    lone
                    if same
                    else _weigh_backward(
                        kind, meter, input_held=input_held, output_held=output_held, first=first
                    )
                )
                peaks[input_held, output_held, first] = weight.backward_peak
    return StageLedger(
        state_bytes=state_bytes,
        output_is_view=is_view,
        tape_bytes=lone.tape,
        input_saved=lone.input_saved,
        output_saved=lone.output_saved,
        forward_peak_bytes=forward_peak,
        taped_peak_bytes=lone.taped_peak,
        backward_peak_bytes=_all_variants(peaks, state_bytes if lone.output_saved else 0),
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


def _weigh_backward(
    kind: Kind, meter: Meter, *, input_held: bool, output_held: bool, first: bool
) -> _Weight:
    """Run a stage with tape and go back, with its input born inside the window."""
    kind.set_gradients(first=first)
    with meter.window() as window:
        x: Tensor | None = _copy(kind.x)
        input_bytes = storage_bytes([x])  # type: ignore[list-item]
        window.mark()
        tape, made = kind.record(x)  # type: ignore[arg-type]
        output: Tensor | None = made
        output_bytes = storage_bytes([made])
        is_view = _shares_storage(made, x)  # type: ignore[arg-type]
        del made
        window.mark()
        if not output_held:
            output = None
        window.mark()
        if not input_held:
            x = None
        window.mark()
        gradient = tape.backward(kind.gradient)
        window.mark()
        del gradient, output, x
    _, forward, without_output, without_input, backward, _ = window.phases
    kind.set_gradients(first=True)
    output_saved = not is_view and forward.final_bytes == without_output.final_bytes
    input_saved = without_output.final_bytes == without_input.final_bytes
    kept = without_input.final_bytes
    return _Weight(
        taped_peak=forward.peak_bytes - forward.start_bytes,
        tape=kept - input_bytes * input_saved - output_bytes * output_saved,
        input_saved=input_saved,
        output_saved=output_saved,
        backward_peak=backward.peak_bytes - backward.start_bytes,
    )


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _copy(x: Tensor) -> Tensor:
    """A copy with a storage of its own and the same layout, gaps included."""
    size = x.untyped_storage().nbytes() // x.element_size()
    whole = x.as_strided((size,), (1,), 0).clone()
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def time_once(kind: Kind) -> None:
    """Time a stage forward without tape, forward with tape, and backward."""
    if kind.count > 1:
        # Equal steps run one after the other, and find caches and memory as the last left them.
        with torch.no_grad():
            kind.call(kind.x)
    start = now(kind.x.device)
    with torch.no_grad():
        kind.call(kind.x)
    plain = now(kind.x.device)
    tape, _ = kind.record(kind.x)
    taped = now(kind.x.device)
    tape.backward(kind.gradient)
    end = now(kind.x.device)
    kind.forward_seconds.append(plain - start)
    # Every schedule runs each stage with tape once, so what that takes longer is a constant.
    kind.backward_seconds.append(end - taped + max(0.0, (taped - plain) - (plain - start)))


def weigh_loss(loss: Loss, output: Tensor, meter: Meter) -> LossWeight:
    """Measure a loss on one output of the model.

    Raises:
        ProfileError: The output is no floating point tensor, or the loss no function of it.
    """
    _, gradient = go_back(loss, output)
    start = now(output.device)
    go_back(loss, output)
    seconds = now(output.device) - start
    size = storage_bytes([gradient])
    with meter.window() as window:
        value, again = go_back(loss, output, arrived=window.mark)
        rest = 2 * storage_bytes([value])
        del value, again
    before = window.phases[0]
    return LossWeight(
        gradient=gradient,
        seconds=seconds,
        overhead_bytes=max(0, before.peak_bytes - size),
        # At least the value and the number 1 that going back begins with, whose storage the
        # gradient may share.
        rest_bytes=max(before.final_bytes - size, rest),
    )


class _Arrival(torch.autograd.Function):
    """Catches the gradient of the loss as it arrives at the model's output.

    A leaf would not do: what it accumulates may be a copy in another layout.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, arrived: Callable[[], None], box: list[Tensor]) -> Tensor:
        ctx.arrived, ctx.box = arrived, box
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.arrived()
        ctx.box.append(grads[0])
        return None, None, None


def go_back(
    loss: Loss, output: Tensor, arrived: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Run a loss and go back through it.

    Args:
        loss: From the output to a scalar.
        output: The model's output.
        arrived: Called as the gradient arrives at the output.

    Returns:
        The value of the loss, and the gradient that it sends back.

    Raises:
        ProfileError: The output is no floating point tensor, or the loss no function of it.
    """
    if not output.is_floating_point():
        raise ProfileError(
            f"the model's output has dtype {output.dtype}; a loss needs a floating point one"
        )
    box: list[Tensor] = []
    value = loss(_Arrival.apply(output.detach().requires_grad_(), arrived, box))
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ProfileError(f"the loss must return one number, found {found}")
    if not value.requires_grad:
        raise ProfileError("the loss does not depend on the output: no gradient comes back")
    value.backward()  # type: ignore[no-untyped-call]
    if not box:
        raise ProfileError("the loss does not depend on the output: no gradient comes back")
    return value.detach(), box.pop()
