"""Refuses models and samples that cannot be measured, with advice for the commonest mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..base.errors import CkptschedError, ProfileError
from ..capture.inspection import Inspection
from ..capture.signature import first_by_position, without_first
from ..recompute.fsdp import is_sharded
from ..tensors.devices import KNOWN, what_is_wrong
from ..tensors.pytree import Extras, State
from ..tensors.wrapper_tensors import cannot_be_followed

_WITHOUT_DATA = (
    "with fake=True tensors hold no data, and not every operation can do without: "
    "profile without fake"
)


def call_of(
    inspection: Inspection, sample: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[State, State]:
    """The arguments of a call, taken apart: the first, and what every stage is given besides.

    Raises:
        ProfileError: There is no tensor in the first.
    """
    sample, kwargs = first_by_position(inspection.model, sample, kwargs)
    if not sample:
        wrong = without_first(inspection.model, kwargs, "or as {!r} in kwargs")
        raise ProfileError(f"profile needs a sample to call the model with, {wrong}")
    value, advice = sample[0], _about_value(sample[0])
    try:
        inputs = State.of(value)
    except CkptschedError as error:
        named = advice and f"a {type(value).__name__} without tensors; {advice}"
        raise ProfileError(f"the sample is {named or error}") from error
    if not inputs.leaves:
        raise ProfileError(
            "the sample must be a tensor, or a tuple, list, dict or dataclass with some; found a "
            f"{type(value).__name__} without tensors{advice and f'; {advice}'}"
        )
    return inputs, Extras(sample[1:], kwargs).apart()


def refuse_unmeasurable(inspection: Inspection, inputs: State, given: State, *, fake: bool) -> None:
    """Refuse a model or a sample that cannot be measured, before anything runs.

    Args:
        inspection: The model.
        inputs: The first argument of its call, taken apart.
        given: The further ones.
        fake: Whether it is only to be estimated, on tensors without data.

    Raises:
        ProfileError: It cannot be; the message says why, and what would work.
    """
    for check in _CHECKS if fake else (*_CHECKS, *_CHECKS_OF_RUNS):
        reason = check(_Sample(inspection, inputs, given, fake))
        if reason:
            raise ProfileError(reason)


@final
@dataclass(frozen=True, slots=True)
class _Sample:
    """What is to be measured: a model and a call of it, as `refuse_unmeasurable` takes them."""

    inspection: Inspection
    inputs: State
    given: State
    fake: bool


def _sharded(sample: _Sample) -> str:
    for path, module in zip(sample.inspection.paths, sample.inspection.modules, strict=True):
        if is_sharded(module):
            return (
                f"{f'{path!r} of the model' if path else 'the model'} is sharded by fully_shard, "
                "so its parameters are there only while FSDP itself calls it; profile and plan the "
                "plain model before it is sharded, or a copy of it"
            )
    return ""


def _lazy(sample: _Sample) -> str:
    if not any(is_lazy(tensor) for _, _, tensor in sample.inspection.named_tensors()):
        return ""
    return (
        "the model has lazy modules whose parameters have no shape yet; run it once on a "
        "batch, under torch.no_grad(), before it is profiled"
    )


def _on_several_devices(sample: _Sample) -> str:
    owned = (
        (f"{kind} {name!r}", tensor) for kind, name, tensor in sample.inspection.named_tensors()
    )
    return what_is_wrong(owned, sample.inputs, sample.given)


def _strange_tensors(sample: _Sample) -> str:
    """Tensors whose storages cannot be asked for."""
    owned = list(sample.inspection.named_tensors())
    named = [
        *(("the sample", leaf) for leaf in sample.inputs.leaves),
        *(("a further argument", leaf) for leaf in sample.given.leaves),
        *((f"{kind} {name!r}", tensor) for kind, name, tensor in owned),
    ]
    for what, tensor in named:
        reason = cannot_be_followed(tensor, without_data=sample.fake)
        if reason:
            return f"{what} {reason}"
    for _, name, tensor in owned:
        if tensor.is_inference():
            return (
                f"{name!r} of the model was made under torch.inference_mode, so it cannot be "
                "trained; make the model outside of it"
            )
    return ""


def _on_an_unknown_device(sample: _Sample) -> str:
    device = sample.inputs.leaves[0].device
    if device.type in KNOWN:
        return ""
    return (
        f"the model is on {str(device)!r}, and the random state of such a device cannot be put "
        f"back when stages run again: it trains on {' and '.join(KNOWN)} (fake=True estimates "
        "for others)"
    )


def _given_more_than_it_takes(sample: _Sample) -> str:
    containers = sample.inspection.outline.containers
    sequential = any(isinstance(module, nn.Sequential) for module in containers)
    if not (sequential and Extras.of(sample.given)):
        return ""
    return (
        "an nn.Sequential takes one argument, so its parts cannot be given more; derive the "
        "model from ckptsched.StagedModule, and list its parts in stages()"
    )


_Check: TypeAlias = Callable[[_Sample], str]
# A tensor on another device than the rest is no matter of that device alone, so that comes first.
_CHECKS: tuple[_Check, ...] = (_sharded, _lazy, _on_several_devices, _strange_tensors)
_CHECKS_OF_RUNS: tuple[_Check, ...] = (_on_an_unknown_device, _given_more_than_it_takes)


def shape_text(tensor: Tensor) -> str:
    """Shape and dtype of a tensor, for a message."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}"


def _about_value(value: Any) -> str:
    """What to pass in place of a value that holds no tensors; empty where nothing is known."""
    if isinstance(value, np.ndarray):
        return "pass torch.from_numpy(sample), in the dtype of the model's parameters"
    if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) for x in value):
        return f"if this is a shape, pass torch.randn({', '.join(map(str, value))})"
    if isinstance(value, (list, tuple, dict)) and value:
        inside = list(value.values() if isinstance(value, dict) else value)
        if any(isinstance(x, np.ndarray) for x in inside):
            return "pass tensors (torch.from_numpy) in place of numpy arrays"
    return ""


def _about_state(x: State, error: Exception) -> str:
    """What may be the matter where a stage fails on a state; empty where nothing is known.

    Args:
        x: What the stage was given.
        error: What it raised.
    """
    value, first = x.value(), x.leaves[0]
    if "inference tensor" in str(error).lower():
        return "make the sample outside of torch.inference_mode, or give a clone made outside"
    if "leaf Variable that requires grad is being used in an in-place" in str(error):
        return (
            "it changes a parameter, or what a stage has left before, such as a sum of auxiliary "
            "losses: let each stage append its own to a list, and sum up the list when the model "
            "has returned"
        )
    if isinstance(value, dict) and isinstance(error, TypeError):
        return (
            "the stage was given the whole dict: if this is a batch as a data loader gives it, "
            f"pass what the model is called with alone, such as batch[{next(iter(value))!r}]"
        )
    if isinstance(value, (list, tuple)) and isinstance(error, TypeError):
        return (
            f"the stage was given the whole {type(value).__name__}: if this is a batch with its "
            "targets, as a data loader gives it, pass what the model is called with alone, such as "
            "batch[0]; profile(model, a, b) calls model(a, b)"
        )
    if (
        first.dtype == torch.float16
        and first.device.type == "cpu"
        and "not implemented" in str(error)
    ):
        return "float16 has few operations on the CPU: use bfloat16 or float32 there"
    return ""


@contextmanager
def failures_named(what: str, x: State) -> Iterator[None]:
    """Turn what a stage raises on this input into an error that names it."""
    try:
        yield
    except ProfileError:
        raise
    except CkptschedError as error:
        raise ProfileError(str(error)) from error
    except Exception as error:
        advice = _WITHOUT_DATA if x.leaves[0].is_meta else _about_state(x, error)
        raise ProfileError(
            f"{what} failed on an input of {x.describe(shape_text)}: "
            f"{type(error).__name__}: {error}{advice and f'; {advice}'}"
        ) from error


def refuse_tensors(what: str, tensors: Iterable[Tensor], *, without_data: bool) -> None:
    """Refuse tensors that cannot be followed.

    Args:
        what: They are, in words.
        tensors: Any.
        without_data: Whether all is on the meta device.

    Raises:
        ProfileError: One of them cannot be counted, or holds no data.
    """
    for tensor in tensors:
        reason = cannot_be_followed(tensor, without_data=without_data)
        if reason:
            raise ProfileError(f"{what} {reason}")
