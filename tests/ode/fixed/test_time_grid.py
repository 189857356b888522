"""The times of fixed grids: laid out a few at once, they are those of one tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ckptsched import odeint
from ckptsched.memory.meters import default_meter
from ckptsched.ode.fixed.time_grid import make_grid


@given(
    dtype=st.sampled_from([torch.float64, torch.float32]),
    start=st.floats(-100, 100, width=32),
    length=st.floats(0.25, 50, width=32),
    falls=st.booleans(),
    steps=st.floats(0.3, 700),
)
def test_times_do_not_depend_on_whether_their_gradient_is_wanted(
    dtype: torch.dtype, start: float, length: float, falls: bool, steps: float
) -> None:
    end = start - length if falls else start + length
    t = torch.tensor([start, (start + end) / 2, end], dtype=dtype)
    step_size = length / steps
    few, whole = (
        make_grid(torch.add, t, t, {"step_size": step_size}, timed=timed) for timed in (False, True)
    )
    assert few.times == whole.times
    assert few.outputs == whole.outputs
    assert few.clock is None
    assert whole.clock is not None


@pytest.mark.parametrize("steps", [1000, 2000])
def test_a_budget_is_kept_that_is_less_than_all_times_together(steps: int) -> None:
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    budget_bytes = 8 * steps

    def decay(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y

    def step() -> None:
        options = {"step_size": 1 / steps}
        odeint(decay, y0, t, method="euler", options=options, budget=budget_bytes)[
            -1
        ].sum().backward()

    step()  # measures and plans
    rate.grad = None
    _, measured = default_meter(torch.device("cpu")).measure(step)
    assert measured.peak_bytes <= budget_bytes
