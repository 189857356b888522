"""Measures a model as a chain: seconds and bytes of every stage, each run alone.

Stages that repeat, such as the steps of an ODE block, are measured once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from rich.progress import Progress
from torch import Tensor, nn

from .aliases import Slots, make_alias
from .context import RandomState
from .errors import ProfileError
from .memory import Meter, default_meter, storage_bytes
from .structure import sign
from .survey import Kind, Loss, survey_backward, survey_forward
from .tracing import Block as TracedBlock
from .tracing import trace
from .weighing import LossWeight, time_once, weigh, weigh_loss
from .workload import Block, Chain, Stage, StageLedger, backward_variant

# Rounds of timing: a median needs three; more where they are cheap.
_MIN_ROUNDS, _MAX_ROUNDS, _ENOUGH_SECONDS = 3, 15, 2.0


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
    progress: bool = False,
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
        progress: Whether to show a progress bar where measuring takes more than a second.

    Returns:
        The chain, with a ledger of exact bytes, and the input's bytes reserved.

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
    meter = meter or default_meter(x.device)
    blocks = trace(model)
    with _left_as_it_was(model, x.device):
        order = survey_forward(blocks, x)
        lost = weigh_loss(loss or default_loss, order[-1].output, meter)
        kinds = survey_backward(order, lost.gradient)
        _measure(kinds, meter, progress)
        chain = _assemble(blocks, order, lost)
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


def _measure(kinds: list[Kind], meter: Meter, progress: bool) -> None:
    """Measure bytes, then seconds in rounds over all kinds, so that drift hits all alike."""
    start = time.perf_counter()
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("profiling", total=len(kinds) * (1 + _MIN_ROUNDS), visible=False)

        def advance() -> None:
            bar.update(task, advance=1, visible=time.perf_counter() - start > 1.0)

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


def _assemble(blocks: tuple[TracedBlock, ...], order: list[Kind], lost: LossWeight) -> Chain:
    """Put the measured stages in order."""
    spans = _spans(blocks)
    snapshot = 0
    if any(kind.draws for kind in order):
        snapshot = RandomState.take(order[0].x.device).counted_bytes
    # While a block runs again its buffers are cloned, and a random state or two is kept.
    extra = sum(span.buffer_bytes for span in spans) + 2 * snapshot
    cache: dict[tuple[int, int, int, bool], Stage] = {}
    stages: list[Stage] = []
    seen: set[int] = set()
    gradient_bytes = storage_bytes([lost.gradient])
    for i in range(len(order), 0, -1):
        kind = order[i - 1]
        fresh = sum(size for alias, size in kind.gradient_bytes.items() if alias not in seen)
        partly = 0 < fresh < sum(kind.gradient_bytes.values())
        seen.update(kind.gradient_bytes)
        last = i == len(order)
        buffers = next(span.buffer_bytes for span in spans if span.last >= i)
        key = (id(kind), fresh, buffers, last)
        if key not in cache:
            cache[key] = _stage(kind, fresh, partly, gradient_bytes, snapshot, buffers, extra, last)
        stages.append(cache[key])
        gradient_bytes = _bytes(kind.input_gradient)
    output_bytes = cast(StageLedger, order[-1].ledger).state_bytes
    return Chain(
        stages=tuple(reversed(stages)),
        input_gradient_bytes=gradient_bytes,
        loss_seconds=lost.seconds,
        loss_overhead_bytes=lost.overhead_bytes,
        held_bytes=output_bytes + lost.rest_bytes,
        random_state_bytes=snapshot,
        blocks=spans,
    )


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else storage_bytes([tensor])


def _spans(blocks: tuple[TracedBlock, ...]) -> tuple[Block, ...]:
    spans, first = [], 1
    for block in blocks:
        last = first + len(block.stages) - 1
        size = sum(buffer.nbytes for buffer in Slots([block.module]).buffers())
        spans.append(Block(name=block.name, first=first, last=last, buffer_bytes=size))
        first = last + 1
    return tuple(spans)


def _stage(
    kind: Kind,
    fresh: int,
    partly: bool,
    gradient_bytes: int,
    snapshot: int,
    buffers: int,
    extra: int,
    last: bool,
) -> Stage:
    """The planning model's figures of a stage: upper bounds of what its ledger charges."""
    ledger = replace(cast(StageLedger, kind.ledger), shares_parameters_partly=partly)
    state = 0 if last else ledger.state_bytes + snapshot  # the caller holds the output
    tape = ledger.tape_bytes + state + buffers + (snapshot if last else 0)
    forward = max(ledger.forward_peak_bytes - state, ledger.taped_peak_bytes - tape, 0)
    highest = max(
        ledger.backward_peak_bytes[
            backward_variant(input_held=held, output_held=out, first=bool(fresh))
        ]
        for held in (False, True)
        for out in (False, True)
    )
    backward = max(0, highest - _bytes(kind.input_gradient) - fresh)
    return Stage(
        name=kind.name,
        forward_seconds=statistics.median(kind.forward_seconds),
        backward_seconds=statistics.median(kind.backward_seconds),
        state_bytes=state,
        tape_bytes=tape,
        gradient_bytes=gradient_bytes,
        forward_overhead_bytes=forward + extra,
        backward_overhead_bytes=backward + extra,
        parameter_gradient_bytes=fresh,
        ledger=ledger,
    )
