"""Every argument of torchdiffeq's functions: it works, or is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import odeint, solve_adaptive
from ckptsched.base.errors import (
    CkptschedError,
    IntegrationError,
    WorkloadError,
)
from tests.ode.problems import (
    DOUBLE,
    ENDS,
    TIMES,
    decay,
    equal,
    loss_of,
)

# ---------------------------------------------------------------------------- events


def test_events_are_refused_and_what_to_do_instead_has_the_gradient() -> None:
    """y' = -rate: y is 1 at time (y0 - 1) / rate, whichever way the gradient goes there."""
    rate = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    y0 = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)

    def fall(t: Tensor, y: Tensor) -> Tensor:
        return -rate + 0 * y

    with pytest.raises(WorkloadError, match=r"looks for no events.*torch\.stack\(\[t0, t_event\]"):
        odeint(fall, y0, ENDS, event_fn=lambda t, y: y - 1)
    for how in ({"method": "rk4"}, {"method": "dopri5"}):
        t = torch.stack([torch.zeros((), dtype=DOUBLE), (y0 - 1) / rate])
        end = odeint(fall, y0, t, **how)[-1]
        found = torch.autograd.grad(end, [y0, rate])
        # At the event y is 1, whatever y0 and the rate are.
        torch.testing.assert_close(found, (torch.zeros_like(y0),) * 2, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------- times


@given(
    exponent=st.integers(4, 20),
    method=st.sampled_from(["euler", "rk4"]),
    sign=st.sampled_from([1, -1]),
)
def test_times_too_coarse_for_the_steps_are_refused_with_their_resolution(
    exponent: int, method: str, sign: int
) -> None:
    """Between 2^e and 2^(e + 1) numbers of 24 bits are 2^(e - 23) apart."""
    start, spacing = 2.0**exponent, 2.0 ** (exponent - 23)
    t = torch.tensor([start, start + 64 * spacing]) * sign
    # Of steps of whole spacings each comes to another time; of quarters some come to the same.
    odeint(decay, torch.ones(1), t, method=method, options={"step_size": 4 * spacing})
    told = rf"Times of torch\.float32 near .* are {spacing:.3g} apart: .* torch\.float64"
    with pytest.raises(WorkloadError, match=told.replace("+", r"\+")):
        odeint(decay, torch.ones(1), t, method=method, options={"step_size": spacing / 4})
    found = odeint(decay, torch.ones(1), t.double(), method=method, options={"step_size": spacing})
    assert found.shape == (2, 1)


def test_times_that_one_dtype_cannot_tell_apart() -> None:
    t = torch.tensor([1000.0, 1000.00001])
    with pytest.raises(WorkloadError, match=r"near 1000 are 6\.1e-05 apart"):
        odeint(decay, torch.ones(1), t)
    with pytest.raises(IntegrationError, match=r"near 1000 are 6\.1e-05 apart"):
        solve_adaptive(decay, torch.ones(1), t)
    with pytest.raises(WorkloadError) as caught:  # which no dtype mends
        odeint(decay, torch.ones(1), torch.tensor([0.0, 1.0, 0.5]))
    assert "apart" not in str(caught.value)


# ---------------------------------------------------------------------------- unused modules


class WithUnused(nn.Module):
    """What is registered, and read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(3, 3).double(), nn.Linear(2, 5).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.used(y))


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_euler"])
def test_unused_modules_have_the_gradients_that_torchdiffeq_gives_them(method: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0 = torch.linspace(-1, 1, 6, dtype=DOUBLE).reshape(2, 3)

    def unused(solve: Callable, **how: Any) -> list[Tensor | None]:
        f = WithUnused()
        loss_of(solve(f, y0, TIMES, method=method, **how)).backward()
        assert f.used.weight.grad is not None
        return [p.grad for p in f.unused.parameters()]

    theirs = "rk4" if method == "implicit_euler" else method  # whose Newton takes its own Jacobian
    exact, adjoint = ([None, None], [torch.zeros_like(p) for p in WithUnused().unused.parameters()])
    for how in ({}, {"budget": "1MiB"}):
        assert unused(odeint, **how) == exact
    assert equal(unused(odeint, gradient="backsolve"), adjoint)
    method = theirs
    assert unused(torchdiffeq.odeint) == exact
    assert equal(unused(torchdiffeq.odeint_adjoint), adjoint)


# ---------------------------------------------------------------------------- anything

ODD: list[Any] = [
    None, -1, 0, 1e-3, math.nan, math.inf, 1j, "x", b"x", (), [], [1, 2], (1e-3,) * 3, object(),
    int, len, torch.ones(2), torch.ones(3), torch.tensor(1e-3), torch.tensor(1j),
    torch.ones(2, requires_grad=True), {"a": 1}, {1: 2}, {"norm": "seminorm"}, {"step_size": -1},
    {"step_size": torch.ones(2)}, {"first_step": 1j}, {"max_num_steps": None}, {"beta": None},
    {"norm": lambda errors: "large"}, {"dtype": "x"}, {"grid_constructor": 3},
]  # fmt: skip
ARGUMENTS = (
    *("rtol", "atol", "method", "options", "event_fn", "params", "gradient", "granularity"),
    *(f"adjoint_{name}" for name in ("rtol", "atol", "method", "options", "params")),
    *("budget", "loss", "solver"),
)


@settings(deadline=None)
@given(
    odd=st.dictionaries(st.sampled_from(ARGUMENTS), st.sampled_from(ODD), min_size=1, max_size=2),
    method=st.sampled_from(["dopri5", "rk4", "implicit_euler"]),
    bounded=st.sampled_from([{}, {}, {"budget": "1MiB"}, {"gradient": "backsolve"}]),
    parts=st.booleans(),
)
def test_whatever_is_given_works_or_is_refused_by_name(
    odd: dict[str, Any], method: str, bounded: dict[str, Any], parts: bool
) -> None:
    y0 = torch.ones(2, requires_grad=True)
    # Functions as methods, norms and losses are the user's, and so is what they raise.
    ours = {"method", "loss"}
    odd = {k: v for k, v in odd.items() if not (k in ours and callable(v))}
    arguments = {"method": method, **bounded, **odd}
    try:
        found = odeint(decay, (y0, torch.ones(3)) if parts else y0, ENDS.float(), **arguments)
        loss_of(found).backward()
    except CkptschedError:
        return
    assert y0.grad is not None
