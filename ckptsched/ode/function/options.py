"""The options of `odeint`: read into what they are, or refused by name with what to do instead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
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
"""What does for an option of torchdiffeq's that is none here."""
_BESIDE_CONTROL = ("norm", "meet_times", "step_size", "grid_constructor")
"""What an adaptive method takes besides; the last two name a grid where they are not None."""
_FIXED = ("step_size", "grid_constructor", "interp", "perturb", "norm")
"""What a fixed grid takes. A norm is of errors, which it does not tell; as torchdiffeq does, it
takes one, so that the options of both kinds of methods may be the same."""


def unknown_options(unknown: Iterable[str], kind: str, takes: Iterable[str]) -> WorkloadError:
    """The error for options that a method does not take.

    Args:
        unknown: Their names.
        kind: Of method, such as "a fixed grid".
        takes: Names of those that it takes.
    """
    names = sorted(map(str, unknown))
    hints = "".join(f"; {name}: {_ELSEWHERE[name]}" for name in names if name in _ELSEWHERE)
    return WorkloadError(f"unknown options {names} for {kind}; it takes {', '.join(takes)}{hints}")


def read_options(name: str, given: Any) -> dict[str, Any]:
    """Options as a dict of one's own.

    Args:
        name: What the argument is called.
        given: A mapping, or None for none.

    Raises:
        WorkloadError: It is something else.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise WorkloadError(
            f"{name} is {given!r:.80}; give a dict of options, such as {{'step_size': 0.1}}"
        )
    return dict(given)


def read_tensors(name: str, given: Any) -> tuple[torch.Tensor, ...] | None:
    """Tensors whose gradients are wanted.

    Args:
        name: What the argument is called.
        given: Several tensors, or None where nothing is said.

    Raises:
        WorkloadError: It is something else; one tensor would be taken for its rows.
    """
    if given is None:
        return None
    if isinstance(given, torch.Tensor) or not isinstance(given, Iterable):
        told = "one tensor" if isinstance(given, torch.Tensor) else f"{given!r:.80}"
        raise WorkloadError(f"{name} is {told}; give a tuple of tensors, () for none")
    found = tuple(given)
    wrong = [k for k, x in enumerate(found) if not isinstance(x, torch.Tensor)]
    if wrong:
        told = type(found[wrong[0]]).__name__
        raise WorkloadError(f"{name}[{wrong[0]}] is a {told}; give a tuple of tensors, () for none")
    return found


def read_control(given: Mapping[str, Any]) -> StepControl:
    """The control of adaptive steps.

    Args:
        given: All options, numbers or tensors of one; those of other kinds are let be.

    Raises:
        WorkloadError: One that is unknown, or is no such number.
    """
    given = {name: value for name, value in given.items() if name not in _BESIDE_CONTROL}
    if given.get("dtype") in (None, torch.float64):
        given.pop("dtype", None)
    unknown = set(given) - set(_CONTROL)
    if unknown:
        takes = (*_BESIDE_CONTROL[:2], *_CONTROL, "or, for a fixed grid", *_BESIDE_CONTROL[2:])
        raise unknown_options(unknown, "an adaptive method", takes)
    return StepControl(**{name: _number(name, value) for name, value in given.items()})


def check_fixed_options(options: Mapping[str, Any]) -> None:
    """Refuse what a fixed grid does not take.

    Args:
        options: All options.

    Raises:
        WorkloadError: One that is unknown, is not what it is to be, or asks for what is not done.
    """
    unknown = set(options) - set(_FIXED)
    if unknown:
        raise unknown_options(unknown, "a fixed grid", _FIXED[:3])
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


def _number(name: str, value: Any) -> Any:
    if value is None and name == "first_step":
        return None
    try:
        return int(value) if name == "max_num_steps" else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise WorkloadError(f"option {name} is {value!r:.80}; give a number") from error


def read_function(options: Mapping[str, Any], name: str) -> Callable[..., Any] | None:
    """An option that is a function.

    Args:
        options: All options.
        name: Which.

    Raises:
        WorkloadError: It is none.
    """
    value = options.get(name)
    if value is not None and not callable(value):
        raise WorkloadError(f"option {name} is {value!r:.80}; give a function")
    found: Callable[..., Any] | None = value
    return found


def read_step_size(value: Any) -> float:
    """The size of a fixed grid's steps.

    Args:
        value: What the user gave.

    Raises:
        WorkloadError: It is no positive number.
    """
    try:
        size = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WorkloadError(f"step_size is {value!r:.80}; give a positive number") from error
    if not 0 < size < math.inf:
        raise WorkloadError(
            f"step_size is {value!r:.80}; give a positive number, whichever way time runs"
        )
    return size


def refuse_events(event_fn: Any) -> None:
    """Refuse to look for an event.

    Args:
        event_fn: None, or what torchdiffeq would end the solve by.

    Raises:
        WorkloadError: It was given.
    """
    if event_fn is not None:
        raise WorkloadError(
            "event_fn is given, and odeint solves to times that are given: it looks for no events. "
            "Find the time first (torchdiffeq.odeint_event, or a search on the states at many "
            "times), then solve to it: with t = torch.stack([t0, t_event]) the gradient of the "
            "state goes on to t_event"
        )
