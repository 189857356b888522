"""Callbacks of a function are told what those of torchdiffeq are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckptsched import CallbackWarning, odeint, solve_adaptive
from ckptsched.base.errors import (
    WorkloadError,
)
from tests.ode.problems import (
    FIXED,
    TIMES,
    Told,
    loss_of,
    problem,
)

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def assert_told_alike(ours: Told, theirs: Told, *, first: bool = True) -> None:
    assert [row[0] for row in ours.told] == [row[0] for row in theirs.told]
    for one, other in zip(ours.told, theirs.told, strict=True):
        torch.testing.assert_close(one[1:3], other[1:3], rtol=1e-7, atol=1e-9)
        if first:  # theirs is the time's part, where it is the adjoint's
            torch.testing.assert_close(one[3], other[3], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("parts", [0, 2])
def test_callbacks_are_told_what_torchdiffeqs_are(method: str, backwards: bool, parts: int) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    _, y0 = problem()
    state: Any = (y0, y0[:1] / 9) if parts else y0
    t = TIMES.flip(0) if backwards else TIMES
    names = CALLBACKS if method not in FIXED else CALLBACKS[:1]
    options: Any = {"step_size": 0.25} if method in FIXED else {"first_step": 0.9}
    found = []
    for solve in (odeint, torchdiffeq.odeint):
        f = Told(*names, parts=parts)
        solve(f, state, t, method=method, rtol=1e-5, atol=1e-6, options=options)
        found.append(f)
    assert_told_alike(*found)
    count = {name: sum(row[0] == name for row in found[0].told) for name in CALLBACKS}
    assert count["callback_step"] > 1
    if method not in FIXED:
        assert count["callback_reject_step"] > 0
        assert sum(count.values()) == 2 * count["callback_step"]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_callbacks_of_the_adjoint_are_told_what_torchdiffeqs_are(method: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    _, y0 = problem()
    names = CALLBACKS[: 1 if method == "rk4" else 3]
    options: Any = {"step_size": 0.25} if method == "rk4" else {}
    how: Any = {"method": method, "rtol": 1e-5, "atol": 1e-6, "options": options}
    # Theirs integrates an adjoint of time, whose error is one more where func reads the time.
    ours, theirs = (Told(*(f"{name}_adjoint" for name in names), rate=0.0) for _ in range(2))
    loss_of(odeint(ours, y0, TIMES, gradient="backsolve", **how)).backward()
    loss_of(torchdiffeq.odeint_adjoint(theirs, y0, TIMES, **how)).backward()
    assert len(ours.told) > 3
    assert_told_alike(ours, theirs, first=False)


def test_callbacks_that_would_not_be_called_are_refused_or_warned_of() -> None:
    _, y0 = problem()
    for how in ({"method": "rk4"}, {"method": "dopri5"}):
        with pytest.raises(WorkloadError, match="callback_step, which a solve within a budget"):
            odeint(Told("callback_step"), y0, TIMES, budget="1MiB", **how)
        with pytest.raises(WorkloadError, match="callback_step_adjoint, and no adjoint equation"):
            odeint(Told("callback_step_adjoint"), y0, TIMES, **how)
    for bounds in ({"budget": "1MiB"}, {"checkpoints": 3}):
        with pytest.raises(WorkloadError, match="callback_accept_step, which a solve within"):
            solve_adaptive(Told("callback_accept_step"), y0, TIMES, **bounds)  # type: ignore[arg-type]
    with pytest.warns(CallbackWarning, match="callback_reject_step, which a fixed grid") as seen:
        odeint(Told("callback_reject_step"), y0, TIMES, method="rk4")
    assert seen[0].filename == __file__
