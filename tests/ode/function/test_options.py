"""Options that work are those that there are; others are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptsched import odeint
from ckptsched.base.errors import (
    WorkloadError,
)
from tests.ode.problems import (
    ADAPTIVE,
    DOUBLE,
    ENDS,
    FIXED,
    TIMES,
    decay,
    problem,
)


@given(
    name=st.text(min_size=1).filter(str.isidentifier) | st.integers() | st.none(),
    method=st.sampled_from([*ADAPTIVE, *FIXED, "dopri8", "trapezoid"]),
    budget=st.sampled_from([None, "1MiB"]),
)
def test_any_unknown_option_is_refused_with_those_that_there_are(
    name: Any, method: str, budget: str | None
) -> None:
    adaptive = method in (*ADAPTIVE, "dopri8")
    with pytest.raises(WorkloadError) as caught:
        odeint(decay, torch.ones(2), ENDS, method=method, options={name: 1}, budget=budget)
    told = str(caught.value)
    assert f"unknown options [{str(name)!r}] for " in told
    for known in ("step_size", "grid_constructor", *(("first_step", "norm") if adaptive else ())):
        assert known in told


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dopri5", {"step_t": ENDS}, "step_t: put its times into t and set meet_times=True"),
        ("dopri5", {"jump_t": ENDS}, "jump_t: solve from jump to jump"),
        ("dopri5", {"dtype": torch.float32}, "dtype: times of adaptive steps are kept in float64"),
        ("dopri5", {"interp": "cubic"}, "interp: .*a polynomial of their own"),
        ("rk4", {"perturb": True}, r"found options \{'perturb': True\}"),
        ("rk4", {"interp": "cubic", "step_size": 0.1}, r"found options \{'interp': 'cubic'\}"),
        ("rk4", {"max_iters": 4}, "max_iters: implicit steps are solved"),
        ("rk4", {"step_size": "small"}, "step_size is 'small'; give a positive number"),
        ("rk4", {"grid_constructor": 3}, "option grid_constructor is 3; give a function"),
        ("dopri5", {"first_step": "small"}, "option first_step is 'small'; give a number"),
        ("dopri5", {"first_step": torch.ones(2)}, "option first_step is .*; give a number"),
        ("dopri5", {"max_num_steps": math.inf}, "option max_num_steps is inf; give a number"),
        ("dopri5", {"safety": 2}, "safety=2"),
        ("dopri5", {"norm": "max"}, "option norm is 'max'; give a function"),
        ("dopri5", {"norm": lambda e: e}, r"norm of errors returned shape \(2,\)"),
        ("dopri5", {"norm": lambda e: None}, "norm of errors returned NoneType"),
        ("dopri5", 3, "options is 3; give a dict"),
        ("dopri5", ["first_step"], r"options is \['first_step'\]; give a dict"),
    ],
)
def test_options_that_make_no_sense_are_refused(method: str, options: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        odeint(decay, torch.ones(2), ENDS, method=method, options=options)


def test_options_are_tensors_or_numbers_and_stay_the_callers() -> None:
    f, y0 = problem()
    for method, number, tensor in (
        ("dopri5", {"first_step": 0.01}, {"first_step": torch.tensor(0.01, dtype=DOUBLE)}),
        ("rk4", {"step_size": 0.125}, {"step_size": torch.tensor(0.125)}),
        ("dopri5", {"dtype": DOUBLE, "step_size": None}, {}),
    ):
        before = dict(tensor)
        one, other = (
            odeint(f, y0, TIMES, method=method, options=given)  # type: ignore[arg-type]
            for given in (number, tensor)
        )
        assert torch.equal(one, other)
        assert tensor.keys() == before.keys()
