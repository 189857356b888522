"""Adaptive solves within bounds: tapes and states that are kept, and what f carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ckptsched import odeint
from ckptsched.base.errors import (
    BudgetWarning,
    ExecutionError,
    InfeasibleBudgetError,
    IntegrationError,
)
from ckptsched.memory.meters import AllocatorMeter, ProfilerMeter, default_meter
from ckptsched.ode.adaptive.solve import AdaptiveSolution, solve_adaptive
from ckptsched.ode.adaptive.step_memory import Footprint, Room
from ckptsched.ode.adaptive.step_size import StepControl
from ckptsched.ode.methods.embedded import Step, run_step
from ckptsched.ode.methods.table import DOPRI8, METHODS, find_tableau

ADAPTIVE = sorted(name for name, tableau in METHODS.items() if tableau.b_error is not None)
DOUBLE = torch.float64


class Field(nn.Module):
    """A right-hand side that depends on time and counts its evaluations."""

    def __init__(self, width: int = 6, hidden: int = 24) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.double()
        self.calls = 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        slope: Tensor = self.outer(torch.tanh(self.inner(z))) * torch.cos(t)
        return slope


def start(batch: int = 16, width: int = 6) -> Tensor:
    return torch.randn(batch, width, dtype=DOUBLE, requires_grad=True)


def mean_square(states: Tensor) -> Tensor:
    return states.square().mean()


def gradients(states: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(mean_square(states), tensors)


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], share: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(one - other) <= share * torch.linalg.vector_norm(other)


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def least_budget(solve: Callable[..., Any]) -> int:
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(budget=1)
    least = caught.value.least_budget_bytes
    assert least is not None
    return least


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


# -- what is kept with f


def test_a_step_is_measured_once_and_again_where_it_changes() -> None:
    torch.manual_seed(2)
    f, y0 = Field(), start()
    t = torch.linspace(0, 1, 3, dtype=DOUBLE)

    def measuring(y: Tensor = y0, **options: Any) -> tuple[int, int]:
        solution = solve_adaptive(f, y, t, rtol=1e-3, budget="1MB", **options)
        done = solution.statistics
        assert done.footprint is not None
        return done.measuring_evaluations, done.footprint.tape_bytes or 0

    first, tape = measuring()
    assert first > 0
    assert measuring() == (0, tape)
    # How many times there are, their values, tolerances and the budget change nothing.
    t = torch.linspace(0, 2, 9, dtype=DOUBLE)
    assert measuring() == (0, tape)
    f.inner.requires_grad_(False)
    frozen, smaller = measuring()
    assert frozen > 0
    f.inner.requires_grad_(True)
    assert measuring() == (0, tape)
    f.float()
    halved, half = measuring(y0.detach().float().requires_grad_())
    assert halved > 0
    assert 0.4 * tape <= half <= 0.6 * tape
    f.double()
    assert measuring() == (0, tape)
    for changed in (
        lambda: measuring(start(32)),
        lambda: measuring(method="heun"),
        lambda: measuring(meet_times=True),
        lambda: (f.eval(), measuring())[1],
    ):
        assert changed()[0] > 0
    assert smaller <= tape


def test_odeint_keeps_what_a_step_takes_with_the_function_it_is_given() -> None:
    torch.manual_seed(3)
    f, y0 = Field(), start()
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)

    def func(time: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(time, y[0]), -y[1]

    counts = []
    for _ in range(3):
        before = f.calls
        odeint(func, (y0, torch.ones(3, dtype=DOUBLE)), t, rtol=1e-3, budget="1MB")
        counts.append(f.calls - before)
    assert counts[0] > counts[1] == counts[2]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.1])
def test_the_budget_is_kept_when_a_parameter_is_freed_after_a_first_call(share: float) -> None:
    torch.manual_seed(4)
    f, y0 = Field(16, 64), start(32, 16)
    t = torch.tensor([0.0, 2.0], dtype=DOUBLE)

    def step(**options: Any) -> AdaptiveSolution:
        solution = solve_adaptive(f, y0, t, rtol=1e-4, atol=1e-4, **options)
        solution.states.square().mean().backward()
        f.zero_grad()
        y0.grad = None
        return solution

    f.inner.requires_grad_(False)
    step(budget="1GB")
    f.inner.requires_grad_(True)
    meter = default_meter("cpu")
    _, stored = meter.measure(step)
    least = least_budget(step)
    budget = int(least + share * (stored.peak_bytes - least))
    _, measured = meter.measure(lambda: step(budget=budget))
    assert measured.peak_bytes <= budget


# -- what f carries


class Counting(nn.Module):
    """Its slope depends on a buffer that each evaluation moves."""

    def __init__(self, *, replacing: bool = False, size: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6).double()
        self.register_buffer("count", torch.zeros(size, dtype=DOUBLE))
        self.replacing = replacing

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            if self.replacing:
                self.count = self.count + 1
            else:
                self.count += 1
        slope: Tensor = torch.tanh(self.linear(z)) * (1 + 0.01 * torch.sin(self.count.mean()))
        return slope


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = spectral_norm(nn.Linear(6, 6, bias=False).double())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(z)) - z


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False).double()
        self.norm = nn.BatchNorm1d(6).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(z)))


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6).double()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        noise = torch.randn(z.shape, generator=self.generator, dtype=DOUBLE)
        return torch.tanh(self.linear(z)) * (1 + 0.01 * noise)


def noisy_function() -> Callable[[Tensor, Tensor], Tensor]:
    linear, generator = nn.Linear(6, 6).double(), torch.Generator().manual_seed(5)

    def func(t: Tensor, z: Tensor) -> Tensor:
        noise = torch.randn(z.shape, generator=generator, dtype=DOUBLE)
        return torch.tanh(linear(z)) * (1 + 0.01 * noise)

    func.linear = linear  # type: ignore[attr-defined]
    return func


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(6, 6).double(), nn.Dropout(0.05)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.linear(z)))


CARRYING: dict[str, Callable[[], Any]] = {
    "counter": Counting,
    "counter replaced": lambda: Counting(replacing=True),
    "large counter": lambda: Counting(size=500),
    "spectral norm": Spectral,
    "batch norm": Normed,
    "own generator": Noisy,
    "generator of a closure": noisy_function,
    "dropout": Dropping,
}


@pytest.mark.parametrize("kind", CARRYING)
@pytest.mark.parametrize("method", ["dopri5", "heun"])
def test_what_f_carries_is_found_again_and_moves_as_without_a_budget(
    kind: str, method: str
) -> None:
    t = torch.tensor([0.0, 0.7, 0.8, 1.9, 2.5, 3.0], dtype=DOUBLE)

    def solved(**options: Any) -> tuple[AdaptiveSolution, tuple[Tensor, ...], list[Tensor]]:
        torch.manual_seed(6)
        f, y0 = CARRYING[kind](), start()
        owner = f if isinstance(f, nn.Module) else f.linear
        control = StepControl(max_step=1.5, min_step=0.15, first_step=1.5)
        solution = solve_adaptive(
            f, y0, t, method, rtol=1e-6, atol=1e-6, control=control, **options
        )
        moved = [b.clone() for b in owner.buffers()]
        random = torch.get_rng_state()
        found = gradients(solution.states, [y0, *owner.parameters()])
        moved += [torch.get_rng_state()]
        assert torch.equal(random, moved[-1])
        assert equal(moved[:-1], list(owner.buffers()))
        return solution, found, moved

    plain, expected, moved = solved()
    assert plain.statistics.accepted > 8
    assert plain.statistics.rejected > 0
    sizes = solved(budget="1GB")[0].statistics.footprint
    assert sizes is not None
    assert sizes.tape_bytes is not None
    tapes_of_four = sizes.start_bytes + 4 * sizes.tape_bytes
    budgets = [sizes.least_bytes, sizes.least_bytes + tapes_of_four, 10**9]
    bounds: list[dict[str, Any]] = [{"budget": b} for b in budgets] + [{"checkpoints": 3}]
    tapes = []
    for options in bounds:
        solution, found, after = solved(**options)
        assert torch.equal(solution.states, plain.states)
        assert_near(found, expected)
        assert equal(after, moved)
        assert solution.statistics.evaluations == plain.statistics.evaluations
        tapes.append(solution.statistics.tapes)
    assert tapes[3] == 0 <= tapes[1] < tapes[2] == plain.statistics.accepted


def test_states_of_f_that_nobody_can_put_back_are_errors() -> None:
    linear, calls = nn.Linear(6, 6).double(), [0]

    def forgetful(t: Tensor, z: Tensor) -> Tensor:
        calls[0] += 1
        return torch.tanh(linear(z)) * (1 + 0.1 * calls[0])

    def late_draw(t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(linear(z)) + (torch.randn(()) if t > 0.5 else 0)

    class Late(Counting):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            if t > 0.5:
                self.count += 1
            return torch.tanh(self.linear(z)) * (1 + 0.01 * self.count.clone())

    y0, t = start(), torch.tensor([0.0, 1.0], dtype=DOUBLE)
    control = StepControl(min_step=0.1, max_step=0.2)
    for f, text in (
        (forgetful, "another slope when it is evaluated again at time 0"),
        (late_draw, "drew random numbers on the way"),
        (Late(), "changed the buffer 'count' of a Late on the way"),
    ):
        with pytest.raises(ExecutionError, match=text):
            solve_adaptive(f, y0, t, checkpoints=2, control=control)
        # Without steps that run again there is nothing to refuse.
        solve_adaptive(f, y0, t, control=control).states.sum().backward()


@pytest.mark.parametrize("kind", CARRYING)
@pytest.mark.parametrize("method", ["dopri5", "heun"])
def test_what_f_carries_counts(kind: str, method: str) -> None:
    torch.manual_seed(6)
    f, y0 = CARRYING[kind](), start()
    owner = f if isinstance(f, nn.Module) else f.linear
    t = torch.tensor([0.0, 0.7, 0.8, 1.9, 2.5, 3.0], dtype=DOUBLE)
    control = StepControl(max_step=1.5, min_step=0.15, first_step=1.5)

    def step(**options: Any) -> AdaptiveSolution:
        tolerances = {"rtol": 1e-6, "atol": 1e-6}
        options |= {"control": control, "loss": mean_square}
        solution = solve_adaptive(f, y0, t, method, **tolerances, **options)
        gradients(solution.states, [y0, *owner.parameters()])
        return solution

    sizes, meter = step(budget="1GB").statistics.footprint, default_meter("cpu")
    assert sizes is not None
    stored = meter.measure(step)[1].peak_bytes
    for share in (0.0, 0.1, 0.5, 0.9):
        budget = int(sizes.least_bytes + share * max(0, stored - sizes.least_bytes))
        _, measured = meter.measure(lambda budget=budget: step(budget=budget))
        assert measured.peak_bytes <= budget


def test_threads_solve_with_one_function() -> None:
    torch.manual_seed(12)
    f, t = Field(), torch.linspace(0, 3, 4, dtype=DOUBLE)
    starts, parameters = [start() for _ in range(3)], list(f.parameters())

    def step(k: int, **options: Any) -> tuple[Tensor, ...]:
        solution = solve_adaptive(f, starts[k], t, rtol=1e-4, **options)
        return gradients(solution.states, [starts[k], *parameters])

    expected = [step(k) for k in range(3)]
    least = least_budget(lambda **options: step(0, **options))

    def work(k: int) -> tuple[Tensor, ...]:
        return [step(k, budget=budget) for budget in (least, 2 * least, 2 * least)][-1]

    with ThreadPoolExecutor(3) as pool:
        for found, one in zip(pool.map(work, range(3)), expected, strict=True):
            assert_near(found, one)


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
