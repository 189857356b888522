"""What the caller's loss takes beside the outputs of a solve: a budget has to leave room for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..base.errors import ProfileError, WorkloadError
from ..torch_state.replay_context import Autocast, Generators
from .adaptive.step_memory_probe import measured
from .function.cache import Kept
from .function.captures import find_closure, unknown_leaves
from .function.fingerprint import Identity, fingerprint
from .function.replay_environment import Environment
from .function.rng_and_buffers import Carried
from .methods.integrators import split

Loss = Callable[[Any], Tensor]
"""From what `odeint` returns to one number."""

_OUTPUTS_OF_ONE_TIME = 5
"""Room for a loss that was not named, in outputs of one time: a mean square, there and back."""


@final
@dataclass(frozen=True, slots=True)
class LossNeeds:
    """Bytes of tensors that a loss takes."""

    peak_bytes: int
    """Beyond the outputs, up to where their gradient is there: that included."""
    held_bytes: int = 0
    """Of the gradients of parameters of the loss's own, which live on."""


def needs_of_loss(
    loss: Loss | None, y0: Tensor, count: int, shapes: tuple[torch.Size, ...] | None, kept: Kept
) -> LossNeeds:
    """What a loss of all outputs takes, measured once for each kind of outputs.

    Args:
        loss: It; None provides for one that reads a single output.
        y0: Flat initial state.
        count: Number of output times.
        shapes: Of the parts of the state where it is a tuple.
        kept: Where what was measured before is found; its lock is held.

    Raises:
        ProfileError: It is no loss of the outputs, or there is no meter.
    """
    if loss is None:
        # The gradients of a tuple's parts are joined on the way back.
        outputs = (1 if shapes is None else 2) * count
        return LossNeeds((outputs + _OUTPUTS_OF_ONE_TIME) * y0.nbytes)
    layout = (tuple(y0.shape), y0.dtype, str(y0.device), shapes, count)
    modes = str(Autocast.take(y0.device)), torch.get_num_threads()
    key = ("loss", identity_of_loss(loss), *layout, *modes)
    found: LossNeeds | None = kept.find(key)
    if found is None:
        found = _measure(loss, y0, count, shapes)
        kept.add(key, found)
    return found


def identity_of_loss(loss: Loss | None) -> Hashable:
    """What tells a loss from others, also where it is made anew for each solve.

    Args:
        loss: It; None where none was named.

    Raises:
        WorkloadError: It is no function.
    """
    if loss is not None and not callable(loss):
        raise WorkloadError(
            f"loss is {loss!r:.80}; give a function from what the solve returns to one number"
        )
    return None if loss is None else fingerprint(loss) or Identity(loss)


def _measure(
    loss: Loss, y0: Tensor, count: int, shapes: tuple[torch.Size, ...] | None
) -> LossNeeds:
    """Run it, and go back, on outputs that are all the initial state; leaves no trace."""
    closure, device = find_closure(loss), y0.device
    carried = Carried(closure, device)
    random = Generators(device, carried.own)
    outputs = y0.detach().expand(count, *y0.shape).contiguous().requires_grad_()

    def run(mark: Callable[[], None]) -> int:
        value = loss(split(outputs, shapes, leading=1))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ProfileError(
                f"loss must return one number that depends on the outputs, found {found}"
            )
        own = unknown_leaves([value.grad_fn], [outputs])
        gradient, *others = torch.autograd.grad(value, [outputs, *own], allow_unused=True)
        if gradient is None:
            raise ProfileError("loss does not depend on the outputs: no gradient comes back")
        return sum(g.nbytes for g in others if g is not None)

    environment = Environment(closure, (), y0.detach())
    try:
        with environment.again(carried), torch.enable_grad():
            held, phases = measured(device, run)
    finally:
        random.restore()
    return LossNeeds(phases[0].peak_bytes, held)
