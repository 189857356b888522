"""Draws and buffers of functions within a budget, and functions in several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ckptsched.base.errors import (
    ExecutionError,
)
from ckptsched.memory.meters import default_meter
from ckptsched.ode.adaptive.solve import AdaptiveSolution, solve_adaptive
from ckptsched.ode.adaptive.step_size import StepControl
from tests.ode.adaptive.problems import (
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
