"""Measures a model as a chain: seconds and bytes of every stage, each run alone.

Stages that repeat, such as the steps of an ODE block, are measured once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from .aliases import Slots, make_alias
from .assembly import assemble
from .context import Autocast, RandomState, one_kernel
from .errors import ProfileError
from .estimate import estimate
from .memory import Meter, default_meter
from .structure import sign
from .survey import Kind, Loss, survey_backward, survey_forward
from .tracing import trace
from .weighing import time_once, weigh, weigh_loss
from .workload import Chain

# Rounds of timing: a median needs three; more where they are cheap.
_MIN_ROUNDS, _MAX_ROUNDS, _ENOUGH_SECONDS = 3, 15, 2.0
_PATIENCE_SECONDS = 1.0  # before a progress bar is shown


def default_loss(output: Tensor) -> Tensor:
    """A loss that takes at least the bytes of a cross-entropy, where the user names none.

    Args:
        output: The model's output, any shape, floating point.

    Returns:
        A scalar.
    """
    return torch.log_softmax(output, dim=-1).square().mean()


def profile(
    model: nn.Module,
    *sample: Tensor,
    loss: Loss | None = None,
    meter: Meter | None = None,
    progress: bool | None = None,
    fake: bool = False,
) -> Chain:
    """Measure a model as a chain of stages.

    The model is left as it was: its buffers, gradients and modes, and the random state.

    Args:
        model: An `nn.Sequential`, an `ODEBlock`, or any module of one tensor, which then is
            one stage. It is measured in the mode (train or eval) that it is in.
        sample: One batch, on the model's device, of the shape to train with; with
            `requires_grad` where the gradient with respect to the input is wanted.
        loss: From the output to a scalar; its seconds and bytes are measured, too. Without
            it, bytes are provided for as for a cross-entropy (`default_loss`).
        meter: What counts bytes; the best that works on the device where none is given.
        progress: Whether to show a progress bar on stderr where measuring takes more than a
            second; None shows it if stderr is a terminal.
        fake: Whether to estimate instead: nothing is run on data, seconds are guesses, and what
            operations need while they run is left out (see `estimate.estimate`). The chain is
            for planning; `checkpointed` refuses its plans.

    Returns:
        The chain, with a ledger of exact bytes (none if fake), and the input's bytes reserved.

    Raises:
        ProfileError: A stage that cannot be measured, or not be run again with the same
            result; the message names it.
    """
    if not isinstance(model, nn.Module):
        raise ProfileError(f"profile needs an nn.Module, found a {type(model).__name__}")
    if len(sample) != 1 or not isinstance(sample[0], Tensor):
        found = ", ".join(type(part).__name__ for part in sample) or "nothing"
        raise ProfileError(f"profile needs one tensor as the sample, found {found}")
    x = sample[0]
    if fake:
        return estimate(model, x, loss or default_loss)
    meter = meter or default_meter(x.device)
    blocks = trace(model)
    with _left_as_it_was(model, x.device), Autocast.take(x.device).again(), one_kernel():
        order = survey_forward(blocks, x)
        lost = weigh_loss(loss or default_loss, order[-1].output, meter)
        kinds = survey_backward(order, lost.gradient)
        _measure(kinds, meter, progress)
        chain = assemble(
            blocks, order, lost, x.device, x if x.requires_grad and x.is_leaf else None
        )
    return replace(chain, signature=sign(model, blocks, x))


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let aliases and clones take what profiling does to parameters, buffers and random state."""
    slots = Slots([model])
    aliases = {id(p): make_alias(p) for p in slots.parameters()}
    clones = {id(buffer): buffer.clone() for buffer in slots.buffers()}
    random = RandomState.take(device)
    try:
        bound = slots.bind(aliases)
        with slots.parameters_replaced(bound), slots.buffers_replaced(clones), torch.enable_grad():
            yield
    finally:
        random.restore()


def _measure(kinds: list[Kind], meter: Meter, progress: bool | None) -> None:
    """Measure bytes, then seconds in rounds over all kinds, so that drift hits all alike."""
    with _bar(len(kinds) * (1 + _MIN_ROUNDS), progress) as advance:
        for kind in kinds:
            kind.ledger = weigh(kind, meter)
            advance()
        begun = time.perf_counter()
        for turn in range(_MAX_ROUNDS):
            if turn >= _MIN_ROUNDS and time.perf_counter() - begun > _ENOUGH_SECONDS:
                break
            for kind in kinds:
                time_once(kind)
                if turn < _MIN_ROUNDS:
                    advance()


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr that appears after a second; gives what moves it on."""
    console = Console(stderr=True)
    shown = console.file.isatty() if progress is None else progress
    # In a file nothing can be taken away again: there the last state alone is written.
    bar = Progress(console=console, transient=console.is_terminal)
    task = bar.add_task("profiling", total=total)
    begun = time.perf_counter()

    def advance() -> None:
        bar.advance(task)
        if shown and time.perf_counter() - begun > _PATIENCE_SECONDS:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
