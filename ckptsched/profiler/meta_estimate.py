"""Estimates a model as a chain without running it: a copy runs on tensors without data.

PyTorch's meta device knows shapes and no values. What a stage keeps for its backward is read
off there, and its seconds are guessed from what it computes and moves. What operations take
while they run is not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..base.errors import ProfileError
from ..capture.inspection import Inspection
from ..capture.model_state import ModelState
from ..memory.meters import storage_bytes
from ..recompute.parameter_swap import Slots
from ..tensors.pytree import Extras, State
from ..tensors.wrapper_tensors import all_parts
from ..torch_state.replay_context import Autocast, RandomState
from ..workload.chain import Chain
from ..workload.stage import StageLedger
from .chain_builder import assemble
from .measured_bytes.stage_memory import go_back
from .refusals import shape_text
from .stage_kind import Loss, LossWeight, StageKind
from .survey import survey_backward, survey_model

# Only ratios matter to a plan: which stages are dear, and how dear. 10 operations a byte lies
# between CPUs and GPUs, so that convolutions count by their arithmetic, activations by memory.
_FLOPS_PER_SECOND = 1e11
_BYTES_PER_SECOND = 1e10

_DRAWING = (
    torch.ops.aten.bernoulli,
    torch.ops.aten.bernoulli_,
    torch.ops.aten.native_dropout,
    torch.ops.aten.rand,
    torch.ops.aten.rand_like,
    torch.ops.aten.randn,
    torch.ops.aten.randn_like,
    torch.ops.aten.randint,
    torch.ops.aten.randint_like,
    torch.ops.aten.randperm,
    torch.ops.aten.multinomial,
    torch.ops.aten.uniform_,
    torch.ops.aten.normal_,
    torch.ops.aten.exponential_,
    torch.ops.aten.random_,
    torch.ops.aten.rrelu_with_noise,
)


def estimate(inspection: Inspection, inputs: State, given: State, loss: Loss) -> Chain:
    """Estimate a model as a chain of stages, for planning before a machine is at hand.

    A copy of the model runs on the meta device. States, tapes and gradients are as measured for
    most stages, except where real devices have kernels of their own: the tape of attention without
    dropout comes out too large, as does that of dropout for CUDA, and those of nn.LSTM, nn.GRU and
    nn.RNN on the CPU too small. Workspaces of operations are taken to be 0. Seconds follow from
    nominal rates: their ratios are meant, not their size. That a stage gives the same result twice
    is not checked.

    Args:
        inspection: The model; it may lie on the meta device itself.
        inputs: One batch, taken apart; only shapes, layouts, dtypes and `requires_grad` are used.
        given: What every stage is given besides, taken apart.
        loss: From the output to a scalar; it is called with a tensor without data.

    Returns:
        The chain, with the input's bytes reserved. It has no ledger and no signature:
        `checkpointed` refuses its plans, as no measured bytes stand behind them.

    Raises:
        ProfileError: A stage or the loss needs data; or autocast is on, which the meta device
            does not know.
    """
    device = inputs.leaves[0].device
    if any(enabled for _, enabled, _ in Autocast.take(device).modes):
        raise ProfileError(
            "autocast is on, and tensors without data do not follow it; profile without fake"
        )
    random = RandomState.take(device)
    try:
        fake, extras = _fakes(inputs), Extras.of(_fakes(given))
        bare = Inspection.of(_without_data(inspection))
        # What stages make without naming a device must lie where their input lies.
        with torch.device("meta"), torch.enable_grad():
            state = ModelState(bare.modules, bare.paths)
            survey = survey_model(bare, fake, extras, state)
            lost = _assess_loss(loss, survey.order[-1])
            for kind in survey_backward(survey.order, lost.gradients):
                _assess(kind)
        chain = assemble(survey, lost, device)
    finally:
        random.restore()
    plain = {id(stage): replace(stage, ledger=None) for stage in chain.stages}
    return replace(chain, stages=tuple(plain[id(stage)] for stage in chain.stages))


def _fakes(state: State) -> State:
    """The same without data."""
    return state.replaced(
        leaf.detach().to("meta").requires_grad_(leaf.requires_grad) for leaf in state.leaves
    )


def _without_data(inspection: Inspection) -> nn.Module:
    """A copy whose parameters and buffers have shapes and no data; none is copied on the way."""
    slots = inspection.slots
    try:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in slots.parameters()
        }
        others = [*slots.buffers(), *_constants(inspection.modules)]
        memo |= {id(tensor): torch.empty_like(tensor, device="meta") for tensor in others}
        return copy.deepcopy(inspection.model, memo)
    except Exception as error:
        raise ProfileError(
            f"fake=True runs a copy of the model, and it cannot be copied "
            f"({type(error).__name__}: {error}); profile without fake"
        ) from error


def _constants(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Tensors that modules keep as plain attributes; single numbers may stay what they are."""
    kept = (value for module in modules for value in vars(module).values())
    return [value for value in kept if isinstance(value, Tensor) and value.dim()]


def _assess(kind: StageKind) -> None:
    """Give a kind of stage its seconds, and its ledger as far as it can be known."""
    flops, kind.draws = _count(kind.run)
    kind.set_gradients(first=True)
    with _saved() as saved:
        tape, output = kind.record(kind.x)
    back, _ = _count(lambda: tape.backward(list(kind.gradients)))
    kind.set_gradients(first=True)
    slots = Slots([kind.call.module])
    constants = _constants(slots.modules)
    given = kind.extras.apart().leaves
    own = _storages([*slots.parameters(), *slots.buffers(), *constants, *given])
    entered, made = _storages(kind.x.leaves), _storages(output.leaves)
    kept = _storages(saved)
    is_view = made.keys() == entered.keys()
    tape_bytes = _bytes(kept, besides=own.keys() | entered.keys() | made.keys())
    new = 0 if is_view else _bytes(made)
    kind.ledger = StageLedger(
        state_bytes=_bytes(made),
        output_is_view=is_view,
        tape_bytes=tape_bytes,
        input_saved=not entered.keys().isdisjoint(kept),
        output_saved=not is_view and not made.keys().isdisjoint(kept),
        forward_peak_bytes=new,
        taped_peak_bytes=new + tape_bytes,
        backward_peak_bytes=(0,) * 8,
    )
    # A view moves nothing, and sends its gradient on as a view.
    moved = tape_bytes if is_view else _bytes({**entered, **own, **made}) + tape_bytes
    kind.forward_seconds = _seconds(flops, moved)
    both = (*kind.gradients, *kind.input_gradients)
    ends = [g for g in both if g is not None and not is_view]
    sent = storage_bytes(ends) + sum(kind.gradient_bytes.values())
    kind.backward_seconds = _seconds(back, moved + sent)


def _assess_loss(loss: Loss, last: StageKind) -> LossWeight:
    """Estimate the bytes and seconds of a loss, and the gradient that it sends back."""
    output = last.output
    try:
        with _saved() as saved:
            value, gradients = go_back(loss, output, last.carries)
    except ProfileError:
        raise
    except Exception as error:
        raise ProfileError(
            f"the loss failed on an output of {output.describe(shape_text)}: "
            f"{type(error).__name__}: {error}; with fake=True the output lies on the meta device: "
            "let targets lie there, too, or leave the loss out"
        ) from error
    kept = _bytes(_storages(saved), besides=_storages(output.leaves))
    ends = storage_bytes([*output.leaves, *(g for g in gradients if g is not None)])
    return LossWeight(
        gradients=gradients,
        seconds=_seconds(0, 2 * (ends + kept)),
        overhead_bytes=kept,
        rest_bytes=2 * storage_bytes([value]),
    )


@contextmanager
def _saved() -> Iterator[list[Tensor]]:
    """Collect what autograd saves."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # Not the tensor itself: an output that its own node keeps would never be freed.
        saved.append(tensor.detach())
        return saved[-1]

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _count(run: Callable[[], object]) -> tuple[int, bool]:
    """Floating point operations of what is run, and whether it draws random numbers."""
    draws = False

    def note(*args: Any, **rest: Any) -> int:
        nonlocal draws
        draws = True
        return 0

    from torch.utils.flop_counter import FlopCounterMode  # when it is needed: it takes a while

    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_DRAWING, note)) as counter:
        run()
    return counter.get_total_flops(), draws


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The distinct storages behind tensors, by an identity that holds as long as the dict."""
    found = [tensor.untyped_storage() for tensor in all_parts(tensors)]
    return {id(storage): storage for storage in found}


def _bytes(storages: Mapping[int, torch.UntypedStorage], besides: Container[int] = ()) -> int:
    return sum(storage.nbytes() for key, storage in storages.items() if key not in besides)


def _seconds(flops: int, moved_bytes: int) -> float:
    return flops / _FLOPS_PER_SECOND + moved_bytes / _BYTES_PER_SECOND
