"""Measures a model as a chain: seconds and bytes of every stage, each run alone.

Stages that repeat, such as the steps of an ODE block, are measured once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..base.errors import CkptschedError, ProfileError
from ..base.json_files import printable
from ..base.progress_bar import progress_bar
from ..capture.model_state import ModelState, left_as_it_was
from ..capture.signature import first_by_position, sign, without_first
from ..capture.stage_discovery import Block, taken_apart
from ..capture.wrappers import plain_model
from ..memory.meters import Meter, default_meter
from ..recompute.fsdp import sharded_part
from ..recompute.parameter_swap import Slots, make_alias, take_out_what_was_left
from ..recompute.stateful_buffers import own_generators
from ..recompute.tape import Carries, as_asked
from ..tensors.devices import KNOWN, what_is_wrong
from ..tensors.pytree import Extras, State
from ..torch_state.locks import InTurn
from ..torch_state.replay_context import Autocast, Generators, OneWay, RandomState, Recomputing
from ..torch_state.surroundings import Ambient
from ..workload.chain import Chain
from .advice import about_value
from .chain_builder import assemble
from .meta_estimate import estimate
from .stage_memory import bytes_left_for_good, go_back, weigh, weigh_loss
from .stage_paths import Variations
from .stage_probe import (
    Kind,
    Loss,
    LossWeight,
    note_unfit,
    refuse_tensors,
    sides_held,
    survey_backward,
    survey_model,
)
from .stage_time import ROUNDS, time_stages


def default_loss(output: Any) -> Tensor:
    """A loss that takes at least the bytes of a cross-entropy, where the user names none.

    It computes in no less than float32, as losses do whose model runs under autocast.

    Args:
        output: The model's output: a floating point tensor of any shape, or a value of several,
            of which those count that carry a gradient.

    Returns:
        A scalar.
    """
    if isinstance(output, Tensor):
        half = output.dtype in (torch.float16, torch.bfloat16)
        return torch.log_softmax(output.float() if half else output, dim=-1).square().mean()
    losses = [default_loss(leaf) for leaf in State.of(output).leaves if leaf.requires_grad]
    return torch.stack(losses).sum()


def _default_loss_with(sides: Sequence[Tensor]) -> Loss:
    """The same for what stages leave besides: an auxiliary loss, or features for one."""

    def loss(output: Any) -> Tensor:
        further = [default_loss(t.abs() if t.is_complex() else t) for t in sides]
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
) -> Chain:
    """Measure a model as a chain of stages.

    The model is left as it was, however this ends: its parameters, buffers, other tensors,
    gradients, modes, hooks and counters, and the random state.

    Args:
        model: An `nn.Sequential`, an `ODEBlock`, a `StagedModule`, or any module, which then is
            one stage. It is measured in the mode (train or eval) that it is in.
        sample: What the model is called with: one batch, on the model's device, of the shape to
            train with; with `requires_grad` where the gradient with respect to it is wanted. It
            is a tensor, or tuples, lists, dicts and dataclasses of them. What follows is given to
            every stage.
        kwargs: Arguments of the call by name; they are given to every stage, too.
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
    model = plain_model(model, "profile", ProfileError)
    if loss is not None and not callable(loss):
        raise ProfileError(
            f"loss is {loss!r}; give a function from the model's output to a number, such as "
            "loss=lambda y: criterion(y, targets)"
        )
    take_out_what_was_left()
    sharded = sharded_part(model)
    if sharded is not None:
        raise ProfileError(
            f"{f'{sharded!r} of the model' if sharded else 'the model'} is sharded by fully_shard, "
            "so its parameters are there only while FSDP itself calls it; profile and plan the "
            "plain model before it is sharded, or a copy of it"
        )
    if any(map(is_lazy, itertools.chain(model.parameters(), model.buffers()))):
        raise ProfileError(
            "the model has lazy modules whose parameters have no shape yet; run it once on a "
            "batch, under torch.no_grad(), before it is profiled"
        )
    inputs, given = _apart(model, *first_by_position(model, sample, kwargs or {}))
    # First, as a tensor on another device than the rest is no matter of that device alone.
    wrong = what_is_wrong(model, inputs, given)
    if wrong:
        raise ProfileError(wrong)
    _refuse_tensors(model, inputs, given, fake=fake)
    if fake:
        with Recomputing():
            return estimate(model, inputs, given, loss or default_loss)
    device = inputs.leaves[0].device
    meter = meter or default_meter(device, own_thread=True)
    if device.type not in KNOWN:
        raise ProfileError(
            f"the model is on {str(device)!r}, and the random state of such a device cannot be put "
            f"back when stages run again: it trains on {' and '.join(KNOWN)} (fake=True estimates "
            "for others)"
        )
    if Extras.of(given) and any(isinstance(m, nn.Sequential) for m in taken_apart(model)):
        raise ProfileError(
            "an nn.Sequential takes one argument, so its parts cannot be given more; derive the "
            "model from ckptsched.StagedModule, and list its parts in stages()"
        )
    generators = own_generators(model.modules(), given.constants())
    with (
        torch.inference_mode(False),
        InTurn((Generators.turn,)),  # one thread at a time: measuring draws, and counts bytes
        left_as_it_was(model, RandomState.take(device, generators)) as (state, _),
        _reason_first(state),
        _aliased(model),
        Autocast.take(device).again(),
        OneWay(),
    ):
        extras = Extras.of(
            given.replaced(make_alias(t) if t.requires_grad else t.detach() for t in given.leaves)
        )
        surveyed = _surveyed(model, inputs, extras, state, loss, meter)
        (blocks, frozen, order), ending, lost = surveyed
        carries = [order[0].wanted, *(kind.carries for kind in order)]
        kinds = survey_backward(order, lost.gradients)
        among = Ambient.take(device).costly_modes()
        seconds, spread = _measure(kinds, lambda: go_back(*ending), meter, progress)
        left = [kind.count * bytes_left_for_good(kind, meter) for kind in kinds] if among else []
        note_unfit(state, state, "a stage that has run several times")
        lost = replace(lost, seconds=seconds)
        chain = assemble(blocks, order, lost, device, inputs.leaves, generators)
    alone, own_leaves = [kind.alone for kind in order], [kind.own_leaves for kind in order]
    hidden = {place for kind in order for place in kind.hidden}
    sides = [kind.looks for kind in order]
    asked = as_asked(inputs, carries[0])
    signature = sign(model, blocks, asked, given, carries, alone, own_leaves, sides, hidden, frozen)
    signature = replace(signature, unfit=printable(state.unfit), mode_bytes=sum(left))
    return replace(chain, signature=signature, seconds_spread=spread)


def _apart(
    model: nn.Module, sample: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[State, State]:
    """The arguments of a call, taken apart."""
    if not sample:
        wrong = without_first(model, kwargs, "or as {!r} in kwargs")
        raise ProfileError(f"profile needs a sample to call the model with, {wrong}")
    try:
        inputs = State.of(sample[0])
    except CkptschedError as error:
        raise ProfileError(f"the sample is {_named(sample[0]) or error}") from error
    if not inputs.leaves:
        advice = about_value(sample[0])
        raise ProfileError(
            "the sample must be a tensor, or a tuple, list, dict or dataclass with some; found a "
            f"{type(sample[0]).__name__} without tensors{advice and f'; {advice}'}"
        )
    return inputs, Extras(sample[1:], kwargs).apart()


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


def _named(value: Any) -> str:
    advice = about_value(value)
    return advice and f"a {type(value).__name__} without tensors; {advice}"


def _refuse_tensors(model: nn.Module, inputs: State, given: State, *, fake: bool) -> None:
    """Refuse tensors whose storages cannot be asked for, before anything does."""
    refuse_tensors("the sample", inputs.leaves, without_data=fake)
    refuse_tensors("a further argument", given.leaves, without_data=fake)
    for name, parameter in model.named_parameters():
        refuse_tensors(f"parameter {name!r}", [parameter], without_data=fake)
    for name, buffer in model.named_buffers():
        refuse_tensors(f"buffer {name!r}", [buffer], without_data=fake)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise ProfileError(
                f"{name!r} of the model was made under torch.inference_mode, so it cannot be "
                "trained; make the model outside of it"
            )


@contextmanager
def _reason_first(state: ModelState) -> Iterator[None]:
    """Where a stage changes what it must not, blame that for what fails then."""
    try:
        yield
    except ProfileError as error:
        if state.unfit:
            raise ProfileError(state.unfit) from error
        raise


@contextmanager
def _aliased(model: nn.Module) -> Iterator[None]:
    """Let aliases and clones take what profiling does to parameters and buffers."""
    slots = Slots([model])
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
    tuple[tuple[Block, ...], int, list[Kind]],
    tuple[Loss, State, tuple[Carries, ...]],
    LossWeight,
]


def _surveyed(
    model: nn.Module,
    inputs: State,
    extras: Extras,
    state: ModelState,
    loss: Loss | None,
    meter: Meter,
) -> _Surveyed:
    """What `survey_model` returns, what the loss is called with, and what it takes."""

    def surveyed(variations: Variations) -> _Surveyed:
        found = survey_model(model, inputs, extras, state, variations)
        order = found[2]
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


def _measure(
    kinds: list[Kind], loss: Callable[[], object], meter: Meter, progress: bool | None
) -> tuple[float, float]:
    """Measure bytes, then seconds; returns those of the loss, and the spread of all."""
    total, done = len(kinds) * (1 + ROUNDS), 0
    with progress_bar(progress) as tell:

        def told() -> None:
            nonlocal done
            done += 1
            tell("profiling", done / total)

        for kind in kinds:
            kind.ledger = weigh(kind, meter)
            told()
        return time_stages(kinds, loss, kinds[0].x.leaves[0].device, told)
