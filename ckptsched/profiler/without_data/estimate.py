"""Estimates a model as a chain without running it: a copy runs on tensors without data.

PyTorch's meta device knows shapes and no values. What a stage keeps for its backward, and the
bytes that operators make on the way, are read off there; its seconds are guessed from what it
computes and moves. What operations take for themselves while they run is not seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ...base.errors import ProfileError
from ...capture.inspection import Inspection
from ...capture.model_state import ModelState
from ...memory.shape_meter import ShapeMeter
from ...tensors.pytree import Extras, State
from ...torch_state.replay_context import Autocast, RandomState, Recomputing
from ...workload.chain import Chain
from ..alike.twins import Alike
from ..chain_builder import assemble
from ..measured_bytes.lean_tapes import weigh_leanly
from ..measured_bytes.stage_memory import go_back, weigh, weigh_loss
from ..refusals import failures_named, shape_text
from ..stage_kind import Loss, LossWeight, StageKind
from ..survey import note_gradients_there, survey_backward, survey_model
from .kernels import kernels_of
from .values import KnownValues
from .work import NOMINAL, Rates, Work


@final
@dataclass(frozen=True, slots=True)
class Bare:
    """A model and a call of it, as they are without data."""

    inspection: Inspection
    sample: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    device: torch.device
    """Where they are meant to lie."""


@contextmanager
def without_data(
    inspection: Inspection,
    sample: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Bare]:
    """A copy of a model and of a call on the meta device, and what they need to run there.

    Values of inputs of whole numbers or truth values, and of constants, are known as far as they
    are small (see `KnownValues`).

    Args:
        inspection: The model; it may lie on the meta device itself.
        sample: What it is called with; only shapes, layouts, dtypes, `requires_grad` and small
            whole numbers are used.
        kwargs: The same by name.
        device: Whose kernels are meant; None for where the sample lies.
        dtype: Of all that is of floating point; None for what it is.

    Raises:
        ProfileError: The model cannot be copied, or autocast is on, which the meta device does
            not know.
    """
    given = State.of((sample, dict(kwargs)), opaque=True)
    found = given.leaves[0].device if given.leaves else torch.device("cpu")
    if any(enabled for _, enabled, _ in Autocast.take(found).modes):
        raise ProfileError(
            "autocast is on, and tensors without data do not follow it; profile without fake"
        )
    device = device or found
    random = RandomState.take(found)
    known = KnownValues()
    try:
        with ExitStack() as stack:
            bare = Inspection.of(_bare_copy(inspection, known, dtype))
            taken, named = given.replaced(
                _fake(leaf, known, dtype) for leaf in given.leaves
            ).value()
            # What the model makes without naming a device must lie where its input lies.
            for mode in (kernels_of(device.type), known, torch.device("meta"), Recomputing()):
                stack.enter_context(mode)
            stack.enter_context(torch.enable_grad())
            yield Bare(bare, taken, named, device)
    finally:
        random.restore()


def estimate(
    inspection: Inspection,
    inputs: State,
    given: State,
    loss: Loss,
    device: torch.device,
    rates: Rates = NOMINAL,
) -> Chain:
    """Estimate a model as a chain of stages, for planning before a machine is at hand.

    States, tapes and gradients are as measured but where real devices have kernels of their own:
    the tapes of nn.LSTM, nn.GRU and nn.RNN come out too small. Workspaces of operations are taken
    to be 0. Seconds follow from rates and reach none of a machine's details: their ratios are
    meant. That a stage gives the same result twice is not checked.

    Args:
        inspection: The model, within `without_data`.
        inputs: One batch, taken apart.
        given: What every stage is given besides, taken apart.
        loss: From the output to a scalar; it is called with a tensor without data.
        device: Where the model is to run; decides whether a random state takes bytes.
        rates: How fast it computes and moves bytes.

    Returns:
        The chain, with a ledger and no signature: `checkpointed` refuses its plans, as no measured
        bytes stand behind them.

    Raises:
        ProfileError: A stage or the loss needs data.
    """
    state = ModelState(inspection.modules, inspection.paths)
    extras = Extras.of(given)
    meter, alike = ShapeMeter(), Alike()
    survey = survey_model(inspection, inputs, extras, state, alike=alike)
    for kind in {id(kind): kind for kind in survey.order}.values():
        with failures_named(f"stage {kind.call.title!r}", kind.x):
            _note_forward(kind, rates)
    lost = _assess_loss(loss, survey.order[-1], meter, rates)
    kinds = survey_backward(survey.order, lost.gradients)
    note_gradients_there(survey.order)
    for kind in kinds:
        with failures_named(f"stage {kind.call.title!r}", kind.x):
            _weigh(kind, meter, alike, rates)
    where = device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
    return assemble(survey, lost, where)


def _weigh(kind: StageKind, meter: ShapeMeter, alike: Alike, rates: Rates) -> None:
    """Give a kind of stage its exact bytes, and seconds of its backward."""
    kind.backward_seconds = _backward_seconds(kind, rates)
    kind.ledger = alike.ledger(kind)
    if kind.ledger is None:
        kind.ledger = weigh(kind, meter)
        kind.lean = weigh_leanly(kind, kind.ledger, meter)
        if kind.lean is not None:
            kind.lean_backward_seconds = _backward_seconds(kind.leanly() or kind, rates)
        alike.note_ledger(kind, kind.ledger)


def _fake(tensor: Tensor, known: KnownValues, dtype: torch.dtype | None) -> Tensor:
    """The same without data, which is known where it is not what a model computes with."""
    fake = tensor.detach().to("meta", _dtype_of(tensor, dtype)).requires_grad_(tensor.requires_grad)
    _note(tensor, fake, known)
    return fake


def _note(tensor: Tensor, fake: Tensor, known: KnownValues) -> None:
    if not (tensor.is_meta or tensor.is_floating_point() or tensor.is_complex()):
        known.know(fake, tensor.detach().to("cpu", copy=True))


def _dtype_of(tensor: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """That of a tensor where a model is turned to a dtype, as `nn.Module.to` does it."""
    return asked if asked is not None and tensor.is_floating_point() else tensor.dtype


def _bare_copy(inspection: Inspection, known: KnownValues, dtype: torch.dtype | None) -> nn.Module:
    """A copy whose parameters and buffers have shapes and no data; none is copied on the way."""
    slots = inspection.slots
    try:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(
                torch.empty_like(p, device="meta", dtype=_dtype_of(p, dtype)),
                requires_grad=p.requires_grad,
            )
            for p in slots.parameters()
        }
        for tensor in slots.buffers():
            fake = torch.empty_like(tensor, device="meta", dtype=_dtype_of(tensor, dtype))
            _note(tensor, fake, known)
            memo[id(tensor)] = fake
        for tensor in _constants(inspection.modules):  # as `nn.Module.to` leaves them
            fake = torch.empty_like(tensor, device="meta")
            _note(tensor, fake, known)
            memo[id(tensor)] = fake
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


def _note_forward(kind: StageKind, rates: Rates) -> None:
    """Guess the seconds of a run, and note whether it draws: no random state shows it here."""
    if kind.forward_seconds == 0:
        work = _counted(kind.run, rates)
        kind.forward_seconds, kind.draws = work.seconds, work.draws


def _backward_seconds(kind: StageKind, rates: Rates) -> float:
    """Seconds of a backward, what it makes again first included."""
    kind.set_gradients(first=True)
    tape, output = kind.record(kind.x)
    del output
    work = _counted(lambda: kind.go_back(tape), rates)
    kind.set_gradients(first=True)
    return work.seconds


def _assess_loss(loss: Loss, last: StageKind, meter: ShapeMeter, rates: Rates) -> LossWeight:
    """Estimate the bytes and seconds of a loss, and the gradient that it sends back."""
    output, carries = last.hands_on or last.output, last.carries
    try:
        lost = weigh_loss(loss, output, carries, meter)
        work = _counted(lambda: go_back(loss, output, carries), rates)
    except ProfileError:
        raise
    except Exception as error:
        raise ProfileError(
            f"the loss failed on an output of {output.describe(shape_text)}: "
            f"{type(error).__name__}: {error}; with fake=True the output lies on the meta device: "
            "let targets lie there, too, or leave the loss out"
        ) from error
    return LossWeight(
        gradients=lost.gradients,
        overhead_bytes=lost.overhead_bytes,
        rest_bytes=lost.rest_bytes,
        seconds=work.seconds,
    )


def _counted(run: Callable[[], object], rates: Rates) -> Work:
    """What is run, counted."""
    work = Work(rates)
    with work:
        run()
    return work
