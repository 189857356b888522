"""The memory of the caller's loss beside the outputs of a solve, for which a budget leaves room."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ..base.errors import ProfileError, WorkloadError
from ..torch_state.replay_context import Autocast, Generators
from .adaptive.step_memory_probe import measured
from .function.cache import FunctionCache
from .function.captures import find_closure, unknown_leaves
from .function.fingerprint import Identity, fingerprint, layout
from .function.replay_environment import Environment
from .function.rng_and_buffers import RngAndBuffers
from .function.tuple_state import Shapes, split

Loss = Callable[[Any], Tensor]
"""From the states, as `odeint` returns them, to one number without dimensions."""

_OUTPUTS_OF_ONE_TIME = 5
"""Room for a loss that was not named, in outputs of one time: a mean square, there and back."""


@final
class LossNeeds(NamedTuple):
    """Bytes of tensors of a loss and its backward."""

    peak_bytes: int
    """Peak beyond the outputs, up to the time when their gradient is there: that included."""
    held_bytes: int = 0
    """Bytes of the gradients of parameters that only the loss reads, which live on."""


def needs_of_loss(
    loss: Loss | None,
    y0: Tensor,
    count: int,
    shapes: Shapes,
    cache: FunctionCache,
) -> LossNeeds:
    """The memory of a loss of `count` outputs, measured once for each kind of outputs.

    None provides for a loss that reads a single output. The lock of the right-hand side's cache is
    held. A ProfileError where the loss is not one number that depends on the outputs, or there is
    no meter.
    """
    if loss is None:
        # The gradients of a tuple's parts are joined on the way back.
        outputs = (1 if shapes is None else 2) * count
        return LossNeeds((outputs + _OUTPUTS_OF_ONE_TIME) * y0.nbytes)
    modes = str(Autocast.take(y0.device)), torch.get_num_threads()
    key = ("loss", identity_of_loss(loss), layout(y0.detach()), shapes, count, *modes)
    found: LossNeeds | None = cache.find(key)
    if found is None:
        found = _measure(loss, y0, count, shapes)
        cache.add(key, found)
    return found


def identity_of_loss(loss: Loss | None) -> Hashable:
    """A key of a loss, the same where it is made anew for each solve; None without a loss."""
    if loss is not None and not callable(loss):
        raise WorkloadError(
            f"loss is {loss!r:.80}; give a function from what the solve returns to one number"
        )
    return None if loss is None else fingerprint(loss) or Identity(loss)


def _measure(loss: Loss, y0: Tensor, count: int, shapes: Shapes) -> LossNeeds:
    """Run the loss and its backward on outputs that are all the initial state; leaves no trace."""
    closure, device = find_closure(loss), y0.device
    carried = RngAndBuffers(closure, device)
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
