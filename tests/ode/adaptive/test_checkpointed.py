"""Adaptive solves within bounds: tapes and states that are kept, and what f carries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import (
    BudgetWarning,
    IntegrationError,
)
from ckptsched.memory.meters import AllocatorMeter, ProfilerMeter, default_meter
from ckptsched.ode.adaptive.solve import AdaptiveSolution, solve_adaptive
from ckptsched.ode.adaptive.step_memory import Footprint, Room
from ckptsched.ode.adaptive.step_size import StepControl
from ckptsched.ode.methods.embedded import Step, run_step
from ckptsched.ode.methods.table import DOPRI8, find_tableau
from tests.ode.adaptive.problems import (
    ADAPTIVE,
    DOUBLE,
    Dropping,
    Field,
    Normed,
    assert_near,
    equal,
    gradients,
    least_budget,
    mean_square,
    start,
)

# -- tapes and states


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1.15),
    method=st.sampled_from(ADAPTIVE),
    outputs=st.integers(1, 12),
    timed=st.booleans(),
    tolerance=st.sampled_from([1e-2, 1e-4]),
)
def test_within_any_budget_the_gradient_is_plain_autograds(
    seed: int, share: float, method: str, outputs: int, timed: bool, tolerance: float
) -> None:
    torch.manual_seed(seed)
    f, y0 = Field(), start()
    t = torch.linspace(0, 3, outputs + 1, dtype=DOUBLE).requires_grad_(timed)
    tensors = [y0, *f.parameters(), *([t] if timed else [])]

    def solve(**options: Any) -> AdaptiveSolution:
        tolerances = {"rtol": tolerance, "atol": tolerance}
        return solve_adaptive(f, y0, t, method, loss=mean_square, **tolerances, **options)

    def step(**options: Any) -> tuple[AdaptiveSolution, tuple[Tensor, ...]]:
        solution = solve(**options)
        return solution, gradients(solution.states, tensors)

    meter = default_meter("cpu")
    (plain, expected), stored = meter.measure(step)
    least = least_budget(solve)
    budget = max(least, int(least + share * (stored.peak_bytes - least)))
    solve(budget=budget)  # may have room to measure tapes
    calls = f.calls
    (solution, found), measured = meter.measure(lambda: step(budget=budget))
    done, tableau = solution.statistics, find_tableau(method)
    assert measured.peak_bytes <= budget
    assert torch.equal(solution.states, plain.states)
    assert_near(found, expected)
    assert done.measuring_evaluations == 0
    assert f.calls - calls == done.evaluations + done.backward_evaluations
    if done.tapes == done.accepted:
        assert equal(found, expected)
        assert done.backward_evaluations == done.advances == len(done.positions) == 0
    else:
        again = done.accepted - done.tapes
        assert done.positions[0] == done.tapes
        assert len(done.positions) <= (done.checkpoints or 0)
        if again <= len(done.positions):
            assert done.advances == 0  # no step runs again more than once
            assert done.positions == tuple(range(done.tapes, done.accepted))
        least_again = (again + done.advances) * tableau.evaluations
        inside = (1 + timed) * outputs * (tableau.slopes + 1)
        assert least_again <= done.backward_evaluations <= least_again + inside
    assert done.footprint is not None
    if share >= 1.12 and budget >= done.footprint.probe_bytes:
        assert done.tapes == done.accepted


def test_what_all_tapes_take_is_enough_for_all_tapes_and_less_for_fewer() -> None:
    torch.manual_seed(1)
    f, y0 = Field(32, 96), start(64, 32)
    t = torch.tensor([0.0, 4.0], dtype=DOUBLE)
    control = StepControl(max_step=0.2)

    def solve(**options: Any) -> AdaptiveSolution:
        options |= {"control": control, "loss": mean_square}
        return solve_adaptive(f, y0, t, rtol=1e-2, atol=1e-2, **options)

    least, meter = least_budget(solve), default_meter("cpu")

    def step(**options: Any) -> AdaptiveSolution:
        solution = solve(**options)
        solution.states.square().mean().backward()
        return solution

    _, stored = meter.measure(step)
    sizes = solve(budget="1GB").statistics.footprint
    assert sizes is not None
    assert sizes.tape_bytes is not None
    before, tape = 0, sizes.tape_bytes
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 1.02):
        budget = int(least + share * (stored.peak_bytes - least))
        f.zero_grad()
        y0.grad = None
        solution, measured = meter.measure(lambda budget=budget: step(budget=budget))
        done = solution.statistics
        assert measured.peak_bytes <= budget
        if budget < sizes.probe_bytes:
            continue
        assert budget - 2 * tape <= measured.peak_bytes <= budget or done.tapes == done.accepted
        assert done.tapes >= before
        assert done.tapes + 2 >= (budget - least) // tape or done.tapes == done.accepted
        before = done.tapes
    assert before == done.accepted


@given(
    sizes=st.lists(st.integers(0, 300), min_size=7, max_size=7),
    spare=st.integers(0, 3000),
    outputs=st.integers(2, 5),
)
def test_no_tapes_and_states_that_room_is_promised_for_exceed_the_budget(
    sizes: list[int], spare: int, outputs: int
) -> None:
    z, forward, backward, parameters, start_bytes, tape, back = sizes
    footprint = Footprint(
        state_bytes=z + 1, forward_bytes=forward, backward_bytes=backward,
        gradient_bytes=parameters, start_bytes=start_bytes, tape_bytes=z + 1 + tape,
        attempt_bytes=forward + tape, return_bytes=back, output_bytes=z + 1, outputs=outputs,
    )  # fmt: skip
    budget = footprint.least_bytes + spare
    room = footprint.room(budget)
    if budget < footprint.probe_bytes:
        assert not room.another(0)
        return
    assert footprint.tape_bytes is not None
    assert room.states(0) == room.slots == 1 + spare // (z + 1)
    for tapes in range(1, 9):
        taken = start_bytes + tapes * footprint.tape_bytes
        states = room.states(tapes)
        assert states < room.slots
        if states > 0:
            assert taken + (states - 1) * (z + 1) + footprint.least_bytes <= budget
        if room.another(tapes - 1):
            before = taken - footprint.tape_bytes
            assert before + (outputs + 1) * (z + 1) + footprint.attempt_bytes <= budget
            assert taken + 2 * outputs * (z + 1) + back <= budget
        else:
            assert not room.another(tapes)


def test_without_bytes_only_states_are_kept() -> None:
    assert not Room(slots=3).another(0)
    assert Room(slots=3).states(0) == 3


# -- differentiating again


@pytest.mark.parametrize("share", [0.0, 0.4, 1.2])
@pytest.mark.parametrize("timed", [False, True])
def test_gradients_can_be_differentiated_as_in_plain_autograd(share: float, timed: bool) -> None:
    torch.manual_seed(7)
    f, y0 = Field(), start()
    t = torch.tensor([0.0, 0.4, 1.1, 3.0], dtype=DOUBLE, requires_grad=timed)
    tensors = [y0, *f.parameters(), *([t] if timed else [])]

    def solve(**options: Any) -> AdaptiveSolution:
        return solve_adaptive(f, y0, t, "heun", rtol=1e-4, atol=1e-4, **options)

    def twice(**options: Any) -> tuple[AdaptiveSolution, tuple[Tensor, ...], tuple[Tensor, ...]]:
        solution = solve(**options)
        total = solution.states.square().mean()
        first = torch.autograd.grad(total, tensors, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        assert isinstance(penalty, Tensor)
        return solution, first, torch.autograd.grad(penalty, [y0, *f.parameters()])

    plain, first, second = twice()
    least = least_budget(solve)
    footprint = solve(budget="1GB").statistics.footprint
    assert footprint is not None
    assert footprint.tape_bytes is not None
    tapes = int(share * plain.statistics.accepted)
    budget = least + footprint.start_bytes + tapes * footprint.tape_bytes
    if share > 1:
        solution, *found = twice(budget=budget)
        assert solution.statistics.tapes == solution.statistics.accepted
    else:
        with pytest.warns(BudgetWarning, match="create_graph=True"):
            solution, *found = twice(budget=budget)
        assert solution.statistics.tapes < solution.statistics.accepted
        assert share == 0 or solution.statistics.tapes > 0
    assert_near(found[0], first)
    assert_near(found[1], second)


def test_hooks_of_parameters_fire_once_whatever_is_kept() -> None:
    torch.manual_seed(8)
    f, y0, fired = Field(), start(), list[int]()
    t = torch.tensor([0.0, 3.0], dtype=DOUBLE)
    f.inner.weight.register_hook(lambda g: fired.append(1))

    def solve(**options: Any) -> AdaptiveSolution:
        return solve_adaptive(f, y0, t, rtol=1e-4, **options)

    least = least_budget(solve)
    for budget in (least, 2 * least, 100 * least):
        fired.clear()
        solve(budget=budget).states.sum().backward()
        assert fired == [1]


def test_casts_of_autocast_do_not_lose_the_graph_of_the_weights() -> None:
    torch.manual_seed(9)
    linear = nn.Linear(6, 6)
    y0 = torch.randn(4, 6, requires_grad=True)
    t = torch.tensor([0.0, 1.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve_adaptive(
            lambda t, z: torch.tanh(linear(z)).float(), y0, t, rtol=1e-1, atol=1e-1, checkpoints=2
        )
        after = linear(y0.detach())
    (found,) = torch.autograd.grad(after.float().sum(), [linear.weight])
    assert found.abs().sum() > 0
    solution.states.sum().backward()


# -- torchdiffeq


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_dopri8_is_torchdiffeqs_on_its_accepted_steps(tolerance: float) -> None:
    """By itself it chooses others: the error of its steps is rounding, near the first time."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    torch.manual_seed(10)
    f, y0 = Field(), start().detach()
    accepted: list[tuple[float, float]] = []

    class Recorded(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return f(t, y)

        def callback_accept_step(self, t0: Tensor, y: Tensor, dt: Tensor) -> None:
            accepted.append((float(t0), float(dt)))

    t = torch.tensor([0.0, 10.0], dtype=DOUBLE)
    with torch.no_grad():
        options = {"method": "dopri8", "rtol": tolerance, "atol": tolerance}
        expected = torchdiffeq.odeint(Recorded(), y0, t, **options)[-1]
        z = y0

        def slope(time: float | Tensor, state: Tensor) -> Tensor:
            return f(torch.as_tensor(time, dtype=DOUBLE), state)

        for t0, h in accepted[:-1]:
            z = run_step(slope, DOPRI8, Step(t0, t0 + h, h), z).z1
        # The last step goes beyond the end, where the solver reads the interpolant.
        t0, _ = accepted[-1]
        found = odeint(
            f, z, torch.tensor([t0, 10.0], dtype=DOUBLE), **options,
            options={"first_step": accepted[-1][1]},
        )[-1]  # fmt: skip
        alone = odeint(f, y0, t, **options)[-1]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(alone, expected, rtol=100 * tolerance, atol=100 * tolerance)


def test_tuples_are_solved_as_by_odeint() -> None:
    torch.manual_seed(11)
    f, y0, other = Field(), start(), torch.ones(3, dtype=DOUBLE, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)

    def func(time: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(time, y[0]), -y[1]

    expected = odeint(func, (y0, other), t, rtol=1e-3, atol=1e-3)
    for options in ({}, {"budget": "1MB"}, {"checkpoints": 2}):
        solution = solve_adaptive(func, (y0, other), t, rtol=1e-3, atol=1e-3, **options)  # type: ignore[arg-type]
        assert equal(solution.states, expected)
        total = solution.states[0].sum() + solution.states[1].sum()
        assert len(torch.autograd.grad(total, [y0, other, *f.parameters()])) == 6
        assert solution.statistics.accepted > 1
    assert [tuple(x.shape) for x in solution.states] == [(3, 16, 6), (3, 3)]
    for wrong in (lambda t, y: (y[1], y[0]), lambda t, y: y[0], lambda t, y: (y[0], None)):
        with pytest.raises(IntegrationError, match=r"at time 0 f returned .* of each part"):
            solve_adaptive(wrong, (y0, other), t)


@pytest.mark.skipif(not AllocatorMeter.available(), reason="one meter inside another")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.1])
@pytest.mark.parametrize("kind", [Field, Normed, Dropping])
def test_the_first_call_keeps_the_budget_while_it_measures(kind: Any, share: float) -> None:
    torch.manual_seed(13)
    y0, t = start(64), torch.tensor([0.0, 3.0], dtype=DOUBLE)
    control = StepControl(max_step=0.3, min_step=0.1)

    def step(f: nn.Module, **options: Any) -> None:
        solution = solve_adaptive(f, y0, t, rtol=1e-3, atol=1e-3, control=control, **options)
        gradients(solution.states, [y0, *f.parameters()])

    meter = default_meter("cpu")
    stored = meter.measure(lambda: step(kind()))[1].peak_bytes
    least = least_budget(lambda **options: step(kind(), **options))
    budget, fresh = int(least + share * (stored - least)), kind()
    with ProfilerMeter().window() as window:
        step(fresh, budget=budget)
    assert window.measurement.peak_bytes <= budget
