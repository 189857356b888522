"""Measures a model as a chain: seconds and bytes of every stage, each run alone.

Stages that repeat, such as the steps of an ODE block, are measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..base.errors import CkptschedError, ProfileError
from ..base.json_files import printable
from ..base.progress_bar import progress_bar
from ..capture.inspection import Inspection, inspect_model
from ..capture.model_state import ModelState, left_as_it_was
from ..capture.policies.policy import NO_POLICY, Named, Policy
from ..capture.recording.opening import Opened, is_to_be_recorded, open_model
from ..capture.recording.stages import Captured
from ..capture.signature import sign
from ..memory.meters import Meter, default_meter
from ..recompute.parameter_swap import Slots, make_alias, take_out_what_was_left
from ..recompute.tape import Carries, as_asked
from ..tensors.pytree import NO_EXTRAS, Extras, State
from ..torch_state.locks import Locked
from ..torch_state.replay_context import Autocast, Generators, OneWay, RandomState, Recomputing
from ..torch_state.surroundings import Ambient
from ..workload.chain import Chain
from ..workload.stage import Stage
from .alike.twins import Alike
from .chain_builder import assemble
from .measured_bytes.lean_tapes import weigh_leanly
from .measured_bytes.stage_memory import bytes_left_for_good, go_back, weigh, weigh_loss
from .refusals import call_of, refuse_unmeasurable
from .stage_kind import Loss, LossWeight, StageKind
from .stage_paths import Variations
from .stage_time import ROUNDS, time_stages
from .survey import (
    Survey,
    note_gradients_there,
    sides_held,
    survey_backward,
    survey_model,
)
from .without_data.estimate import estimate, without_data
from .without_data.work import NOMINAL, Rates

_MOST_SAID = 3  # parts that are called whole, in a message


def default_loss(output: Any) -> Tensor:
    """A loss that takes at least the bytes of a cross-entropy, where the user names none.

    Where the output has its loss itself, as `.loss` or under that key, it is that one. The other
    computes in no less than float32, as losses do whose model runs under autocast, and of complex
    numbers takes the real and imaginary parts.

    Args:
        output: The model's output: a tensor of floating point or complex numbers of any shape, or
            a value of several, of which those count that carry a gradient.

    Returns:
        A scalar.
    """
    own = _own_loss(output)
    if own is not None:
        return own
    if isinstance(output, Tensor):
        if output.is_complex():
            output = torch.view_as_real(output.resolve_conj())
        half = output.dtype in (torch.float16, torch.bfloat16)
        return torch.log_softmax(output.float() if half else output, dim=-1).square().mean()
    losses = [default_loss(leaf) for leaf in State.of(output).leaves if leaf.requires_grad]
    return torch.stack(losses).sum()


def _own_loss(output: Any) -> Tensor | None:
    """The loss that a model gives itself: a number that carries a gradient."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    is_loss = isinstance(found, Tensor) and found.numel() == 1 and found.requires_grad
    return found if is_loss else None


def loss_of_tensors(captured: Captured, loss: Loss | None) -> Loss:
    """The loss of what a recorded model gives, from the tensors that its last stage makes.

    Args:
        captured: The recorded model.
        loss: Of the model's output, or None for the default.
    """

    def of_tensors(tensors: tuple[Tensor, ...]) -> Tensor:
        output = captured.give(tensors, keep=False)
        if loss is not None:
            return loss(output)
        own = _own_loss(output)
        return default_loss(tensors) if own is None else own

    return of_tensors


def _default_loss_with(sides: Sequence[Tensor]) -> Loss:
    """The same, and a term for each side output: an auxiliary loss, or features for one."""

    def loss(output: Any) -> Tensor:
        further = [default_loss(t) for t in sides]
        return torch.stack([default_loss(output).to(further[0].dtype), *further]).sum()

    return loss


def profile(
    model: nn.Module,
    *sample: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    meter: Meter | None = None,
    progress: bool | None = None,
    fake: bool = False,
    capture: bool | None = None,
    never_recompute: Named | Iterable[Named] = (),
    always_recompute: Named | Iterable[Named] = (),
) -> Chain:
    """Measure a model as a chain of stages.

    The model is left as it was, however this ends: its parameters, buffers, other tensors,
    gradients, modes, hooks and counters, and the random state.

    Args:
        model: Any module. An `nn.Sequential`, an `ODEBlock` and a `StagedModule` are chains of
            stages as they are; another is recorded, and cut into stages between its calls. It is
            measured in the mode (train or eval) that it is in.
        sample: What the model is called with: one batch, on the model's device, of the shape to
            train with; with `requires_grad` where the gradient with respect to it is wanted. It
            is a tensor, or tuples, lists, dicts and dataclasses of them. What follows is given to
            every stage of a model that is a chain as it is.
        kwargs: Arguments of the call by name; those are given to every stage, too.
        loss: From the output to a scalar; its seconds and bytes are measured, too. Without
            it, the loss is what the output has as `.loss` or under that key; without that, bytes
            are provided for as for a cross-entropy (`default_loss`).
        meter: What counts bytes; the best that works on the device where none is given.
        progress: Whether to show a progress bar on stderr where measuring takes more than a
            second; None shows it if stderr is a terminal.
        fake: Whether to estimate instead: nothing is run on data, seconds are guesses, and what
            operations need for themselves while they run is left out (see `without_data.estimate`).
            The chain is for planning; `checkpointed` refuses its plans.
        capture: None to record a model that would be one stage, and to leave it one stage where it
            cannot be recorded (`chain.signature.whole` says why); True to record in any case,
            False not to.
        never_recompute: Calls that a step makes once, see `captured`; the model is recorded.
        always_recompute: Calls that lean tapes may make again whatever they cost, see `captured`.

    Returns:
        The chain, with a ledger of exact bytes, and the input's bytes reserved.

    Raises:
        ProfileError: A stage that cannot be measured, or not be run again with the same
            result; the message names it. Or a policy that is not for the model's calls.
    """
    policy = Policy.of(never_recompute, always_recompute)
    inspection = inspect_model(model, "profile", ProfileError)
    if fake:
        return estimated(inspection, sample, kwargs, loss, capture=capture, policy=policy)[0]
    opened = open_for_measuring(inspection, sample, kwargs, loss, capture, policy)
    return measure_opened(opened, inspection, sample, kwargs, loss, meter, progress=progress)


def estimated(
    inspection: Inspection,
    sample: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    loss: Loss | None = None,
    *,
    capture: bool | None = None,
    policy: Policy = NO_POLICY,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    rates: Rates = NOMINAL,
    anywhere: bool = False,
) -> tuple[Chain, str]:
    """Estimate a model on tensors without data; it is recorded where `profile` would.

    Args:
        inspection: The model.
        sample: What it is called with.
        kwargs: The same by name.
        loss: From the output to a scalar.
        capture: Whether to record the model, see `profile`.
        policy: What calls are never or always made again.
        device: Whose kernels are meant; None for where the sample lies.
        dtype: Of all that is of floating point; None for what it is.
        rates: How fast it is.
        anywhere: Whether one of model and sample may have data and the other none.

    Returns:
        The chain; and what of the model is one stage though it could be several, and why.

    Raises:
        ProfileError: See `profile`.
    """
    _refuse_loss(loss)
    take_out_what_was_left()
    inputs = State.of((sample, dict(kwargs or {})), opaque=True)
    if not inputs.leaves:  # says what is missing
        call_of(inspection, sample, kwargs or {})
    seen = _beside(inspection, inputs) if anywhere else inputs
    refuse_unmeasurable(inspection, seen, NO_EXTRAS.apart(), fake=True)
    with without_data(inspection, sample, kwargs or {}, device, dtype) as there:
        opened = open_for_measuring(
            *(there.inspection, there.sample, there.kwargs, loss, capture, policy), fake=True
        )
        captured, found = opened.captured, there.inspection
        if captured is None:
            taken, given = call_of(found, there.sample, there.kwargs)
            ending = loss or default_loss
        else:
            state = State.of((there.sample, dict(there.kwargs)), opaque=True)
            tensors = captured.recording.tensors(captured.model, state)
            ending, found = loss_of_tensors(captured, loss), Inspection.of(captured)
            taken, given = call_of(found, (tensors,), {})
        with _said_why_whole(opened.whole):
            chain = estimate(found, taken, given, ending, there.device, rates)
        return chain, printable(opened.whole) or _of_recording(found).get("whole", "")


def _beside(inspection: Inspection, inputs: State) -> State:
    """The inputs as if they lay where the model does, where one of them has no data."""
    homes = {tensor.device for _, _, tensor in inspection.named_tensors()}
    if len(homes) != 1:
        return inputs
    [home] = homes
    return inputs.replaced(
        torch.empty_like(leaf, device=home) if (leaf.is_meta or home.type == "meta") else leaf
        for leaf in inputs.leaves
    )


def _refuse_loss(loss: Loss | None) -> None:
    if loss is not None and not callable(loss):
        raise ProfileError(
            f"loss is {loss!r}; give a function from the model's output to a number, such as "
            "loss=lambda y: criterion(y, targets)"
        )


def open_for_measuring(
    inspection: Inspection,
    sample: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    loss: Loss | None,
    capture: bool | None,
    policy: Policy = NO_POLICY,
    *,
    fake: bool = False,
) -> Opened:
    """Record a model that is not a chain, after a look whether it can be measured at all.

    Arguments and errors are those of `profile`; `policy` is what calls are never or always made
    again.
    """
    _refuse_loss(loss)
    take_out_what_was_left()
    if not is_to_be_recorded(inspection, capture, policy):
        return Opened(None)
    inputs = State.of((sample, dict(kwargs or {})), opaque=True)
    if not inputs.leaves:
        return Opened(None)  # what measures it says what is missing
    refuse_unmeasurable(inspection, inputs, NO_EXTRAS.apart(), fake=fake)
    return open_model(inspection, inputs, must=bool(capture), policy=policy)


def measure_opened(
    opened: Opened,
    inspection: Inspection,
    sample: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    meter: Meter | None = None,
    *,
    progress: bool | None = None,
    like: Chain | None = None,
    alike: Alike | None = None,
) -> Chain:
    """Measure a model by its recording, if it has one; arguments and errors as of `measure`."""
    captured = opened.captured
    if captured is None:
        with _said_why_whole(opened.whole):
            chain = measure(inspection, sample, kwargs, loss, meter, progress=progress)
        assert chain.signature is not None
        signature = replace(chain.signature, whole=printable(opened.whole))
        return replace(chain, signature=signature) if opened.whole else chain
    inputs = State.of((sample, dict(kwargs or {})), opaque=True)
    tensors = captured.recording.tensors(captured.model, inputs)
    of_tensors = loss_of_tensors(captured, loss)
    recorded = Inspection.of(captured)
    return measure(
        *(recorded, (tensors,), None, of_tensors, meter),
        progress=progress,
        like=like,
        alike=alike,
    )


@contextmanager
def _said_why_whole(why: str) -> Iterator[None]:
    """Say of a model that is measured as one stage why, where that fails."""
    try:
        yield
    except ProfileError as error:
        if not why:
            raise
        raise ProfileError(
            f"{error}. The model is measured as one stage, as it could not be recorded: {why}"
        ) from error


def measure(
    inspection: Inspection,
    sample: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    meter: Meter | None = None,
    *,
    progress: bool | None = None,
    like: Chain | None = None,
    alike: Alike | None = None,
) -> Chain:
    """Measure a model that has been looked at; arguments and errors are those of `profile`.

    Args:
        inspection: The model.
        sample: What it is called with.
        kwargs: The same by name.
        loss: From the output to a scalar.
        meter: What counts bytes.
        progress: Whether to show a progress bar.
        like: A chain of as many stages whose seconds are taken; bytes alone are measured then.
        alike: What was found out about stages of other chains, and takes what is found out here.
    """
    _refuse_loss(loss)
    take_out_what_was_left()
    inputs, given = call_of(inspection, sample, kwargs or {})
    refuse_unmeasurable(inspection, inputs, given, fake=False)
    meter = meter or default_meter(inputs.leaves[0].device, own_thread=True)
    return _measured(inspection, inputs, given, loss, meter, alike or Alike(), progress, like)


def _measured(
    inspection: Inspection,
    inputs: State,
    given: State,
    loss: Loss | None,
    meter: Meter,
    alike: Alike,
    progress: bool | None,
    like: Chain | None,
) -> Chain:
    """Survey, weigh and time all stages, and leave the model as it was."""
    device, generators = inputs.leaves[0].device, inspection.generators(given.constants())
    with (
        torch.inference_mode(False),
        Locked((Generators.lock,)),  # one thread at a time: measuring draws, and counts bytes
        left_as_it_was(inspection, RandomState.take(device, generators)) as (state, _),
        _reason_first(state),
        _aliased(inspection.slots),
        Autocast.take(device).again(),
        OneWay(),
    ):
        extras = Extras.of(
            given.replaced(make_alias(t) if t.requires_grad else t.detach() for t in given.leaves)
        )
        survey, ending, lost = _surveyed(inspection, inputs, extras, state, loss, meter, alike)
        facts = survey.facts()
        kinds = survey_backward(survey.order, lost.gradients)
        note_gradients_there(survey.order)
        among = Ambient.take(device).costly_modes()
        timed = like is None
        seconds, spread = _weigh_and_time(
            kinds, lambda: go_back(*ending), meter, alike, progress, timed
        )
        left = [kind.count * bytes_left_for_good(kind, meter) for kind in kinds] if among else []
        state.note_unfit(state, "a stage that has run several times")
        lost = replace(lost, seconds=seconds)
        chain = assemble(survey, lost, device, inputs.leaves, generators)
    signature = sign(
        inspection,
        survey.blocks,
        as_asked(inputs, facts.carries[0]),
        given,
        facts,
        hidden=survey.hidden(),
        frozen=survey.frozen,
        unfit=printable(state.unfit),
        foreign=any(kind.foreign for kind in survey.order),
    )
    signature = replace(signature, mode_bytes=sum(left), **_of_recording(inspection))
    chain = replace(chain, signature=signature, seconds_spread=spread)
    return chain if like is None else _with_seconds_of(like, chain)


def _with_seconds_of(like: Chain, chain: Chain) -> Chain:
    """A chain with the seconds of another with as many stages.

    Raises:
        ProfileError: It has another number.
    """
    if len(like) != len(chain):
        raise ProfileError(f"the batch leads to {len(chain)} stages, and {len(like)} were measured")
    stages = [_timed_as(x, y) for x, y in zip(chain.stages, like.stages, strict=True)]
    spread = like.seconds_spread
    return replace(
        chain, stages=tuple(stages), loss_seconds=like.loss_seconds, seconds_spread=spread
    )


def _timed_as(stage: Stage, like: Stage) -> Stage:
    """A stage with the seconds of another, and the tapes that the other offers, too."""
    tapes = tuple(
        [
            replace(x, forward_seconds=y.forward_seconds, backward_seconds=y.backward_seconds)
            for x, y in zip(stage.other_tapes, like.other_tapes, strict=False)
        ]
    )
    return replace(
        stage,
        forward_seconds=like.forward_seconds,
        backward_seconds=like.backward_seconds,
        other_tapes=tapes,
    )


def _of_recording(inspection: Inspection) -> dict[str, Any]:
    """The fields of a signature that tell how a recorded model was cut."""
    model = inspection.model
    if not isinstance(model, Captured):
        return {}
    recording = model.recording
    said = [f"{path!r}, as {why}" for path, why in recording.whole.items()]
    whole = "; ".join(said[:_MOST_SAID])
    ruled = model.ruled
    return {
        "recorded": len(recording.calls),
        "cuts": model.cuts,
        "whole": printable(whole),
        "never": tuple(sorted(ruled.never)),
        "always": tuple(sorted(ruled.always)),
        "policy": printable(ruled.words),
    }


@contextmanager
def _failure_of_loss(loss: Loss | None) -> Iterator[None]:
    """Say which loss failed, where the caller named none, and how one is called.

    Other errors of the caller's own loss are left as they are, with a note.
    """
    try:
        yield
    except CkptschedError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and loss is not None:
            raise ProfileError(
                f"the loss failed on the model's output ({error}); it is given the output alone, "
                "so let it have its targets: loss=lambda y: criterion(y, targets)"
            ) from error
        if loss is not None:
            error.add_note("this arose in the loss, while ckptsched.profile measured the model")
            raise
        raise ProfileError(
            f"the default loss failed on the model's output ({type(error).__name__}: {error}); "
            "give profile a loss that takes it"
        ) from error


@contextmanager
def _reason_first(state: ModelState) -> Iterator[None]:
    """Turn a failure into an error that names the stage that changes what it must not."""
    try:
        yield
    except ProfileError as error:
        if state.unfit:
            raise ProfileError(state.unfit) from error
        raise


@contextmanager
def _aliased(slots: Slots) -> Iterator[None]:
    """Replace parameters by aliases and buffers by clones while the model is profiled."""
    aliases = {id(p): make_alias(p) for p in slots.parameters()}
    clones = {id(buffer): buffer.clone() for buffer in slots.buffers()}
    bound = slots.bind(aliases)
    with (
        slots.parameters_replaced(bound),
        slots.buffers_replaced(clones),
        torch.enable_grad(),
        Recomputing(),
    ):
        yield


_Surveyed: TypeAlias = tuple[
    Survey,
    tuple[Loss, State, tuple[Carries, ...]],
    LossWeight,
]


def _surveyed(
    inspection: Inspection,
    inputs: State,
    extras: Extras,
    state: ModelState,
    loss: Loss | None,
    meter: Meter,
    alike: Alike,
) -> _Surveyed:
    """Survey the model forward, and measure the loss on its output."""

    def surveyed(variations: Variations) -> _Surveyed:
        found = survey_model(inspection, inputs, extras, state, variations, alike)
        order = found.order
        last = order[-1]
        ending = loss or default_loss, last.hands_on or last.output, last.carries
        with sides_held(order) as held:
            provided = _default_loss_with(held) if loss is None and held else ending[0]
            with _failure_of_loss(loss):
                return found, ending, weigh_loss(provided, *ending[1:], meter, held)

    variations = Variations()
    try:
        return surveyed(variations)
    except Exception:
        if not variations.grown:
            raise
    # A loss that has targets for the sample alone: what comes after takes what the sample asks for.
    return surveyed(Variations(grow=False))


def _weigh_and_time(
    kinds: list[StageKind],
    loss: Callable[[], object],
    meter: Meter,
    alike: Alike,
    progress: bool | None,
    timed: bool,
) -> tuple[float, float]:
    """Measure bytes, then seconds if asked to; returns those of the loss, and the spread of all."""
    total, done = len(kinds) * (1 + ROUNDS), 0
    with progress_bar(progress) as tell:

        def told() -> None:
            nonlocal done
            done += 1
            tell("profiling", done / total)

        for kind in kinds:
            kind.ledger = alike.ledger(kind)
            if kind.ledger is None:
                kind.ledger = weigh(kind, meter)
                kind.lean = weigh_leanly(kind, kind.ledger, meter, always=not timed)
                alike.note_ledger(kind, kind.ledger)
            told()
        return time_stages(kinds, loss, kinds[0].x.leaves[0].device, told) if timed else (0.0, 0.0)
