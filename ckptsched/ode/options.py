"""The options of `odeint`: read into what they are, or refused by name with what to do instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..errors import WorkloadError
from .control import StepControl

_CONTROL = {field.name: field.name for field in dataclasses.fields(StepControl)}
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
_OF_TORCHDIFFEQ = frozenset(_ELSEWHERE)


def unknown_options(unknown: Iterable[str], kind: str, takes: Iterable[str]) -> WorkloadError:
    """The error for options that a method does not take.

    Args:
        unknown: Their names.
        kind: Of method, such as "a fixed grid".
        takes: Names of those that it takes.
    """
    names = sorted(map(str, unknown))
    hints = "".join(f"; {name}: {_ELSEWHERE[name]}" for name in names if name in _OF_TORCHDIFFEQ)
    return WorkloadError(f"unknown options {names} for {kind}; it takes {', '.join(takes)}{hints}")


def read_control(given: Mapping[str, Any]) -> StepControl:
    """The control of adaptive steps.

    Args:
        given: The options that are left, numbers or tensors of one.

    Raises:
        WorkloadError: One that is unknown, or is no such number.
    """
    given = dict(given)
    if given.get("dtype") in (None, torch.float64):
        given.pop("dtype", None)
    unknown = set(given) - set(_CONTROL)
    if unknown:
        kind = "an adaptive method"
        takes = ["norm", "meet_times", *_CONTROL]
        raise unknown_options(
            unknown, kind, [*takes[:-1], f"{takes[-1]}, or step_size and grid_constructor for a "
                            "fixed grid"]
        )  # fmt: skip
    return StepControl(**{name: _number(name, value) for name, value in given.items()})


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

    Raises:
        WorkloadError: It is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WorkloadError(f"step_size is {value!r:.80}; give a positive number") from error


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
