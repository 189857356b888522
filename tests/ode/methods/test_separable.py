"""Leapfrog: right-hand sides that it may solve, and those that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import (
    WorkloadError,
)
from tests.ode.problems import (
    DOUBLE,
    ENDS,
    TIMES,
    Pair,
    assert_within,
    loss_of,
    pair,
    problem,
)


@given(
    drag_q=st.sampled_from([0.0, 1e-6, 0.01, -0.5, 3.0]),
    drag_p=st.sampled_from([0.0, 1e-6, 0.01, -0.5, 3.0]),
    dtype=st.sampled_from([torch.complex128, DOUBLE]),
    budget=st.sampled_from([None, "1MiB"]),
)
def test_leapfrog_is_refused_exactly_where_a_part_depends_on_itself(
    drag_q: float, drag_p: float, dtype: torch.dtype, budget: str | None
) -> None:
    f = Pair(drag_q, drag_p)

    def solve() -> Any:
        return odeint(f, pair(dtype), TIMES, method="leapfrog", budget=budget)

    if drag_q == drag_p == 0.0:
        solve()
        return
    found = [f"d{x}/dt changes with {x}" for x, drag in (("q", drag_q), ("p", drag_p)) if drag]
    with pytest.raises(WorkloadError, match=f"({'|'.join(found)}),.* order one .*'rk4'"):
        solve()


def test_leapfrog_takes_no_evaluation_more_where_it_does() -> None:
    f = Pair()
    steps = 8
    odeint(f, pair(), ENDS, method="leapfrog", options={"step_size": 1 / steps})
    first = Pair()
    odeint(first, pair(), ENDS, method="leapfrog", options={"step_size": 1.0})
    # The second force of a step is at another time than the first, so one step is looked at again.
    assert f.calls - first.calls == 3 * (steps - 1)


def test_leapfrog_takes_what_changes_with_time_draws_or_counts() -> None:
    torch.manual_seed(3)
    noisy = nn.Dropout(0.5)
    generator = torch.get_rng_state()

    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return noisy(y[1]), -noisy(y[0]) * torch.exp(t)

    one = odeint(f, pair(), TIMES, method="leapfrog")
    state = torch.get_rng_state()
    torch.set_rng_state(generator)

    def by_hand(f: Any, t: Tensor, h: Tensor, y: Any) -> Any:
        (q, p), half = y, h / 2
        p = p + half * f(t, (q, p))[1]
        q = q + h * f(t + half, (q, p))[0]
        return q, p + half * f(t + h, (q, p))[1]

    other = odeint(f, pair(), TIMES, method=by_hand)
    assert torch.equal(state, torch.get_rng_state())  # the look has drawn nothing
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


def test_leapfrog_that_is_looked_at_keeps_its_budget_and_gradients() -> None:
    f, q = problem(batch=20)
    p = torch.randn_like(q).requires_grad_()

    def force(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], f(t, y[0])

    def call(budget: int | None) -> Any:
        how: Any = {"method": "leapfrog", "options": {"step_size": 0.05}, "loss": loss_of}
        return odeint(force, (q, p), TIMES, budget=budget, **how)

    for share in (0.3, 0.6, 1.0):
        assert_within(call, [q, p, *f.parameters()], share)


def test_leapfrog_that_is_refused_would_be_of_order_one() -> None:
    """What the message says is so; a step by hand is not looked at."""

    def by_hand(f: Any, t: Tensor, h: Tensor, y: Any) -> Any:
        q, p = y
        p = p + h / 2 * f(t, (q, p))[1]
        q = q + h * f(t + h / 2, (q, p))[0]
        return q, p + h / 2 * f(t + h, (q, p))[1]

    def error(f: Pair, steps: int) -> float:
        how: Any = {"method": by_hand, "options": {"step_size": 1 / steps}}
        exact = odeint(f, pair(), ENDS, method="rk4", options={"step_size": 1 / 512})
        found = odeint(f, pair(), ENDS, **how)
        return max(float((a - b)[-1].abs().max()) for a, b in zip(found, exact, strict=True))

    for f, order in ((Pair(), 2), (Pair(drag_p=0.5), 1)):
        with torch.no_grad():
            assert abs(math.log2(error(f, 32) / error(f, 64)) - order) < 0.1


def test_leapfrog_looks_until_both_parts_have_moved() -> None:
    """At rest nothing shows; the step in which the pair is pushed tells."""

    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], (t > 0.5) * 1.0 - 0.1 * y[1]

    at_rest = torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    how: Any = {"method": "leapfrog", "options": {"step_size": 0.1}}
    odeint(f, at_rest, torch.tensor([0.0, 0.4], dtype=DOUBLE), **how)
    with pytest.raises(WorkloadError, match=r"dp/dt changes with p, .* at time 0\.[67]"):
        odeint(f, at_rest, ENDS, **how)
