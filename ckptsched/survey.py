"""Finds the distinct stages of a model, and checks that each can be run again.

A stage is known by what it computes (`StageCall.key`) and by the layout of its input and of
the gradient that comes back to it, since these decide what PyTorch allocates.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from .aliases import Slots
from .context import RandomState
from .errors import CkptschedError, ProfileError
from .stages import StageLedger
from .structure import stage_label
from .tape import Tape, check_output, record
from .tracing import Block, StageCall

Loss: TypeAlias = Callable[[Tensor], Tensor]

WITHOUT_DATA = (
    "with fake=True tensors hold no data, and not every operation can do without: "
    "profile without fake"
)


@final
@dataclass(frozen=True, slots=True)
class LossWeight:
    """What a loss takes, and what it sends back."""

    gradient: Tensor
    """With respect to the output."""
    seconds: float
    """Seconds of its forward and backward."""
    overhead_bytes: int
    """Peak beyond the gradient."""
    rest_bytes: int
    """What is left of it while the backward goes on: its value and the gradient of that."""


@dataclass(eq=False)
class Kind:
    """A distinct stage: equal computation on an equal layout, forward and backward."""

    name: str
    """Name within its block, equal for all steps of an ODE."""
    call: StageCall
    x: Tensor
    """An input that it has seen, without a graph."""
    output: Tensor
    """What it made of it."""
    needs_gradient: bool
    """Whether the gradient with respect to its input is wanted."""
    aliases: list[Tensor]
    """The aliases of its trained parameters."""
    repeated: list[Tensor]
    """Those that one run uses more than once."""
    draws: bool
    """Whether it draws random numbers."""
    count: int = 0
    """How many stages of the chain run this computation."""
    is_last: bool = False
    """Whether the caller holds its output."""
    gradient: Tensor | None = None
    """What comes back to it."""
    input_gradient: Tensor | None = None
    """What it sends back."""
    gradient_bytes: dict[int, int] = field(default_factory=dict)
    """Bytes of the gradient of each alias that gets one, by the alias's id."""
    ledger: StageLedger | None = None
    """Its exact bytes, once weighed."""
    forward_seconds: list[float] = field(default_factory=list)
    """Seconds of each timed run without tape."""
    backward_seconds: list[float] = field(default_factory=list)
    """Seconds of each timed backward, and what its run with tape took longer."""

    def record(self, x: Tensor) -> tuple[Tape, Tensor]:
        """Run the stage with its tape, as the executor does."""
        tape, output = record(self.call, x, needs_gradient=self.needs_gradient)
        if self.repeated:
            tape.feed_back(self.repeated)
        return tape, output

    def set_gradients(self, *, first: bool) -> None:
        """Let the parameters have no gradients yet, or let them all have some already."""
        for alias in self.aliases:
            given = not first and id(alias) in self.gradient_bytes
            alias.grad = torch.zeros_like(alias) if given else None


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """What of a tensor decides the bytes that operations on it take."""
    size = tensor.untyped_storage().nbytes()
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.storage_offset(), size


def survey_forward(blocks: tuple[Block, ...], x: Tensor) -> list[Kind]:
    """Run every distinct stage on what the stage before it made.

    Args:
        blocks: The model, its parameters replaced by aliases.
        x: The sample; on the meta device there are no results to compare.

    Returns:
        The kind of each stage, in order; equal stages share one.

    Raises:
        ProfileError: A stage fails, or cannot be run again with the same result.
    """
    known: dict[Hashable, Kind] = {}
    order = []
    needs_gradient = x.requires_grad
    state = x.detach()
    for block in blocks:
        for call in block.stages:
            key = (call.key, layout(state), needs_gradient)
            kind = known.get(key)
            if kind is None:
                kind = known[key] = _examine(block, call, state, needs_gradient)
            kind.count += 1
            order.append(kind)
            state = kind.output
            needs_gradient = needs_gradient or bool(kind.aliases)
    order[-1].is_last = True
    return order


def survey_backward(order: list[Kind], gradient: Tensor | None) -> list[Kind]:
    """Send a gradient back through every distinct stage.

    Args:
        order: The kind of each stage; replaced where a gradient of another layout comes back.
        gradient: With respect to the model's output.

    Returns:
        The distinct kinds.
    """
    known: dict[Hashable, Kind] = {}
    for i in reversed(range(len(order))):
        found = order[i]
        key = (id(found), None if gradient is None else layout(gradient))
        kind = known.get(key)
        if kind is None:
            kind = known[key] = _for_gradient(found, gradient, is_last=i == len(order) - 1)
        order[i] = kind
        gradient = kind.input_gradient
    return list(known.values())


def _examine(block: Block, call: StageCall, x: Tensor, needs_gradient: bool) -> Kind:
    name = call.name or type(call.module).__name__
    with _failures_named(f"stage {name!r}", x):
        output, draws = _check_repeatable(name, call, x)
        tape, _ = record(call, x, needs_gradient=needs_gradient)
    leaves = tape.repeated_leaves()
    owned = {id(parameter) for parameter in Slots([call.module]).parameters()}
    if not tape.uses().keys() <= owned:
        raise ProfileError(
            f"stage {name!r} uses a parameter that its module does not own, so its gradient would "
            "be lost; register the parameter, or the module that owns it, in the stage"
        )
    aliases = [alias for alias in Slots([call.module]).parameters() if alias.requires_grad]
    return Kind(
        name=stage_label(block, call.name),
        call=call,
        x=x,
        output=output,
        needs_gradient=needs_gradient,
        aliases=aliases,
        repeated=[alias for alias in aliases if id(alias) in leaves],
        draws=draws,
    )


@contextmanager
def _failures_named(what: str, x: Tensor) -> Iterator[None]:
    """Turn what a stage raises on this input into an error that names it."""
    try:
        yield
    except ProfileError:
        raise
    except CkptschedError as error:
        raise ProfileError(str(error)) from error
    except Exception as error:
        advice = f"; {WITHOUT_DATA}" if x.is_meta else ""
        raise ProfileError(
            f"{what} failed on an input of shape {tuple(x.shape)}, {x.dtype}: "
            f"{type(error).__name__}: {error}{advice}"
        ) from error


def _check_repeatable(name: str, call: StageCall, x: Tensor) -> tuple[Tensor, bool]:
    """Run a stage twice from one random state; returns its output, and whether it draws."""
    before, others = RandomState.take(x.device), _other_generators()
    version = x._version
    with torch.no_grad():
        output = check_output(call, call(x)).detach()
        draws = RandomState.take(x.device) != before
        if x._version != version:
            raise ProfileError(
                f"stage {name!r} changes its input in place, so it cannot be run again; use an "
                "operation that is not in place, or make it one module with the stage before it"
            )
        if _other_generators() != others:
            raise ProfileError(
                f"stage {name!r} draws from the generator of Python or numpy, which is not put "
                "back when it runs again; draw from torch's"
            )
        before.restore()
        again = check_output(call, call(x))
    if (output.shape, output.dtype) != (again.shape, again.dtype):
        raise ProfileError(
            f"stage {name!r} returned shape {tuple(output.shape)}, {output.dtype} and, run again "
            f"on the same input, {tuple(again.shape)}, {again.dtype}; a stage must depend on its "
            "input and parameters only"
        )
    # CUDA kernels may add up in another order; on the CPU equal means equal.
    tolerance = 0.0 if x.device.type == "cpu" else 1e-3
    if not x.is_meta and not torch.allclose(
        output, again, rtol=tolerance, atol=tolerance, equal_nan=True
    ):
        raise ProfileError(
            f"stage {name!r} gives another result when it is run again on the same input with the "
            "same random state: it keeps a state of its own (a buffer that it reads and changes, "
            "or a generator of its own), and running it again would give wrong gradients"
        )
    return output, draws


def _other_generators() -> tuple[object, ...]:
    """State of the default generators of Python and numpy, to compare."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, np.asarray(keys).tobytes(), *rest


def _for_gradient(found: Kind, gradient: Tensor | None, *, is_last: bool) -> Kind:
    """The kind for a gradient of this layout, after going back once."""
    kind = Kind(
        name=found.name,
        call=found.call,
        x=found.x,
        output=found.output,
        needs_gradient=found.needs_gradient,
        aliases=found.aliases,
        repeated=found.repeated,
        draws=found.draws,
        count=found.count,
        is_last=is_last,
        gradient=gradient,
    )
    kind.set_gradients(first=True)
    name = kind.call.name or type(kind.call.module).__name__
    with _failures_named(f"the backward of stage {name!r}", kind.x):
        tape, _ = kind.record(kind.x)
        kind.input_gradient = tape.backward(gradient)
        for alias in kind.aliases:
            if alias.grad is not None and alias.grad.layout is not torch.strided:
                raise ProfileError(
                    f"stage {name!r} makes gradients of layout {alias.grad.layout}; ckptsched "
                    "counts dense ones: turn sparse gradients off (nn.Embedding(sparse=False))"
                )
    kind.gradient_bytes = {
        id(alias): alias.grad.untyped_storage().nbytes()
        for alias in kind.aliases
        if alias.grad is not None
    }
    kind.set_gradients(first=True)
    return kind
