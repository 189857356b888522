"""The options of `odeint`, read or refused by name with an alternative."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from ...base.errors import WorkloadError
from ..adaptive.step_size import StepControl

_CONTROL = tuple(field.name for field in dataclasses.fields(StepControl))
_ELSEWHERE = {
    "step_t": "put its times into t and set meet_times=True: steps then end there",
    "jump_t": "solve from jump to jump, one call each, with func as it is on that side",
    "perturb": "solve from jump to jump, one call each, with func as it is on that side",
    "interp": "between the steps of a fixed grid lies a line, and adaptive steps have a polynomial "
    "of their own; let steps end at the times wanted",
    "dtype": "times of adaptive steps are kept in float64",
    "solver": "scipy's solvers have no gradient",
    "max_iters": "implicit steps are solved to the rounding of the dtype",
    "max_order": "there are no multistep methods here",
}
"""Alternatives to options of torchdiffeq's that are not supported."""
_BESIDE_CONTROL = ("norm", "meet_times", "step_size", "grid_constructor")
"""Other options of an adaptive method; the last two name a grid where they are not None."""
_FIXED = ("step_size", "grid_constructor", "interp", "perturb", "norm")
"""Options of a fixed grid. It estimates no error for a norm; as torchdiffeq does, it takes one, so
that the options of both kinds of methods may be the same."""


def read_number(
    name: str,
    value: Any,
    wanted: str,
    *,
    kind: Callable[[Any], float] = float,
    accepts: Callable[[float], bool] = lambda number: True,
) -> float:
    """An argument that is a number, or a tensor of one.

    A WorkloadError that asks for what is `wanted`, such as "a positive number", where it is none or
    out of the range that `accepts` tells. `kind` is `float` or `int`.
    """
    cause = None
    try:
        number = kind(value)
        if accepts(number):
            return number
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        cause = error
    raise WorkloadError(f"{name} is {value!r:.80}; give {wanted}") from cause


def read_options(name: str, given: Any) -> dict[str, Any]:
    """A copy of the options in argument `name`; empty where None is given."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise WorkloadError(
            f"{name} is {given!r:.80}; give a dict of options, such as {{'step_size': 0.1}}"
        )
    return dict(given)


def read_tensors(name: str, given: Any) -> tuple[torch.Tensor, ...] | None:
    """The tensors in argument `name`, whose gradients are wanted; None where None is given.

    One tensor would be taken for its rows, and is refused.
    """
    if given is None:
        return None
    if isinstance(given, torch.Tensor) or not isinstance(given, Iterable):
        told = "one tensor" if isinstance(given, torch.Tensor) else f"{given!r:.80}"
        raise WorkloadError(f"{name} is {told}; give a tuple of tensors, () for none")
    found = tuple(given)
    for k, x in enumerate(found):
        if not isinstance(x, torch.Tensor):
            told = type(x).__name__
            raise WorkloadError(f"{name}[{k}] is a {told}; give a tuple of tensors, () for none")
    return found


def read_control(given: Mapping[str, Any]) -> StepControl:
    """The step control that the options of an adaptive method ask for.

    Those of `StepControl` are numbers, or tensors of one; a WorkloadError for what else there is.
    """
    given = {name: value for name, value in given.items() if name not in _BESIDE_CONTROL}
    if given.get("dtype") in (None, torch.float64):
        given.pop("dtype", None)
    takes = (*_BESIDE_CONTROL[:2], *_CONTROL, "or, for a fixed grid", *_BESIDE_CONTROL[2:])
    _check_known(given, _CONTROL, "an adaptive method", takes)
    control: dict[str, Any] = {}
    for name, value in given.items():
        kind = int if name == "max_num_steps" else float
        found = value is None and name == "first_step"
        control[name] = (
            None if found else read_number(f"option {name}", value, "a number", kind=kind)
        )
    return StepControl(**control)


def check_fixed_options(options: Mapping[str, Any]) -> None:
    """Refuse options that a fixed grid does not take, or that have no value of their kind."""
    _check_known(options, _FIXED, "a fixed grid", _FIXED[:3])
    if options.get("interp", "linear") != "linear" or options.get("perturb"):
        given = {name: options[name] for name in ("interp", "perturb") if name in options}
        raise WorkloadError(
            "between the steps of a fixed grid a line is drawn (interp='linear', perturb=False); "
            f"found options {given!r}; for more, let the steps end at the times wanted"
        )
    size, constructor = options.get("step_size"), read_function(options, "grid_constructor")
    if size is not None and constructor is not None:
        raise WorkloadError("options step_size and grid_constructor exclude each other; give one")
    if size is not None:
        read_step_size(size)


def _check_known(
    given: Iterable[str], known: Collection[str], kind: str, takes: Iterable[str]
) -> None:
    """Refuse options that a kind of method does not take, with the ones that it takes."""
    names = sorted(map(str, set(given) - set(known)))
    if names:
        hints = "".join(f"; {name}: {_ELSEWHERE[name]}" for name in names if name in _ELSEWHERE)
        raise WorkloadError(
            f"unknown options {names} for {kind}; it takes {', '.join(takes)}{hints}"
        )


def read_function(options: Mapping[str, Any], name: str) -> Callable[..., Any] | None:
    """The option `name`, which is a function; None where it is not given."""
    value = options.get(name)
    if value is not None and not callable(value):
        raise WorkloadError(f"option {name} is {value!r:.80}; give a function")
    found: Callable[..., Any] | None = value
    return found


def read_step_size(value: Any) -> float:
    """The size of a fixed grid's steps, in units of time."""
    wanted = "a positive number, whichever way time runs"
    return read_number("step_size", value, wanted, accepts=lambda size: 0 < size < math.inf)


def refuse_events(event_fn: Any) -> None:
    """Refuse the argument `event_fn`, by which torchdiffeq ends a solve."""
    if event_fn is not None:
        raise WorkloadError(
            "event_fn is given, and odeint solves to times that are given: it looks for no events. "
            "Find the time first (torchdiffeq.odeint_event, or a search on the states at many "
            "times), then solve to it: with t = torch.stack([t0, t_event]) the gradient of the "
            "state goes on to t_event"
        )
