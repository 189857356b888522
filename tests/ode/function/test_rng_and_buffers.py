"""Right-hand sides that draw random numbers, or keep something from one evaluation to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import ExecutionError
from ckptsched.memory.meters import default_meter

DOUBLE = torch.float64


class Noisy(nn.Module):
    """Draws when it is first evaluated, as FFJORD does for its estimate of the divergence."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)
        self.reset()

    def reset(self) -> None:
        self.noise: Any = None

    def draw(self, y: Tensor) -> Tensor:
        if self.noise is None:
            self.noise = torch.randn_like(y)
        return self.noise

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(y))) * self.draw(y) * torch.cos(t)


class Listed(Noisy):
    def reset(self) -> None:
        self.noises: list[Tensor] = []

    def draw(self, y: Tensor) -> Tensor:
        if not self.noises:
            self.noises.append(torch.randn_like(y))
        return self.noises[0]


class Cleared(Listed):
    """As `Listed`; the list stays the same."""

    def __init__(self) -> None:
        self.__dict__["noises"] = []
        super().__init__()

    def reset(self) -> None:
        self.noises.clear()


class Mapped(Noisy):
    def reset(self) -> None:
        self.noises = {"other": torch.ones(())}

    def draw(self, y: Tensor) -> Tensor:
        if "noise" not in self.noises:
            self.noises["noise"] = torch.randn_like(y)
        return self.noises["noise"]


class New(Noisy):
    """Without an attribute at first."""

    def reset(self) -> None:
        vars(self).pop("noise", None)

    def draw(self, y: Tensor) -> Tensor:
        if not hasattr(self, "noise"):
            self.noise = torch.randn_like(y)
        return self.noise


class OnAnother(Noisy):
    """Kept with a module of torch's."""

    def reset(self) -> None:
        vars(self.up).pop("noise", None)

    def draw(self, y: Tensor) -> Tensor:
        if "noise" not in vars(self.up):
            self.up.noise = torch.randn_like(y)
        return self.up.noise


class Registered(Noisy):
    """As a buffer that is registered at the first evaluation."""

    def reset(self) -> None:
        self._buffers.pop("noise", None)

    def draw(self, y: Tensor) -> Tensor:
        if "noise" not in self._buffers:
            self.register_buffer("noise", torch.randn_like(y), persistent=False)
        return self.noise


class Buffer(Noisy):
    """As a buffer that is another before each solve."""

    def reset(self) -> None:
        self.register_buffer("noise", torch.randn(5, 4, dtype=DOUBLE))


class Flagged(Noisy):
    """Draws in place."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(5, 4, dtype=DOUBLE)

    def reset(self) -> None:
        self.drawn = False
        self.kept = torch.zeros(5, 4, dtype=DOUBLE)

    def draw(self, y: Tensor) -> Tensor:
        if not self.drawn:
            self.kept.normal_()
            self.drawn = True
        return self.kept


class Cell(Noisy):
    def __init__(self) -> None:
        noise: Any = None

        def draw(y: Tensor) -> Tensor:
            nonlocal noise
            if noise is None:
                noise = torch.randn_like(y)
            return noise

        def reset() -> None:
            nonlocal noise
            noise = None

        super().__init__()
        self.draw, self.reset = draw, reset  # type: ignore[method-assign]


class Before(Noisy):
    """Drawn by the user, before each solve."""

    def reset(self) -> None:
        self.noise = torch.randn(5, 4, dtype=DOUBLE)


class Always(Noisy):
    """Draws in each evaluation."""

    def draw(self, y: Tensor) -> Tensor:
        return 1 + 1e-3 * torch.randn_like(y)


class Dropping(Noisy):
    def draw(self, y: Tensor) -> Tensor:
        return nn.functional.dropout(torch.ones_like(y), 1e-3, self.training)


KINDS = [
    *(Noisy, Listed, Cleared, Mapped, New, OnAnother, Registered, Buffer, Flagged, Cell, Before),
    *(Always, Dropping),
]
SOLVES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "rk4": ({"method": "rk4"}, [1 << 20, 19_200]),
    "dopri5": ({"rtol": 1e-4, "atol": 1e-4}, [1 << 20, 16_000]),
}


def solves(kind: Callable[[], Noisy], options: dict[str, Any], budget: int | None) -> list[Any]:
    """Three solves, each with its gradients and what is drawn next."""
    torch.manual_seed(0)
    f = kind().double()
    y0 = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    t, found = torch.linspace(0, 1, 9, dtype=DOUBLE), []
    for _ in range(3):
        f.reset()
        y = odeint(f, y0, t, budget=budget, **options)
        found += [y.detach(), torch.rand(2)]
        found += torch.autograd.grad(y.square().mean(), [y0, *f.parameters()])
        found += [torch.rand(2)]
    return found


BOTH = [(kind, solve) for kind in KINDS for solve in SOLVES]


@pytest.mark.parametrize(("kind", "solve"), BOTH)
def test_the_random_stream_is_that_of_plain_autograd(kind: Any, solve: str) -> None:
    options, budgets = SOLVES[solve]
    expected = solves(kind, options, None)
    for budget in budgets:
        found = solves(kind, options, budget)
        if solve == "rk4" or budget == budgets[0]:
            assert all(map(torch.equal, found, expected))
        else:  # sums of gradients that run again are made in another order
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


ONCE = [
    (kind, solve)
    for kind, solve in BOTH
    # A plan knows the buffers that were there before the first solve.
    if kind not in (Always, Dropping) and (kind, solve) != (Registered, "rk4")
]


@pytest.mark.parametrize(("kind", "solve"), ONCE)
def test_a_backward_finds_the_noise_of_its_own_solve(kind: Any, solve: str) -> None:
    options, budgets = SOLVES[solve]

    def interleaved(budget: int | None) -> list[Any]:
        torch.manual_seed(0)
        f = kind().double()
        y0 = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
        t = torch.linspace(0, 1, 9, dtype=DOUBLE)
        losses = []
        for _ in range(2):
            f.reset()
            losses.append(odeint(f, y0, t, budget=budget, **options).square().mean())
        f.reset()
        found = [torch.autograd.grad(loss, [y0, *f.parameters()]) for loss in losses]
        # And leaves what is there by then.
        return [*found[0], *found[1], torch.rand(2), f.draw(y0.detach())]

    expected = interleaved(None)
    for budget in budgets:
        torch.testing.assert_close(interleaved(budget), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("solve", SOLVES)
def test_a_buffer_that_changes_in_place_before_the_backward_is_an_error(solve: str) -> None:
    options, budgets = SOLVES[solve]
    f = Buffer().double()
    y0 = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    y = odeint(f, y0, torch.linspace(0, 1, 9, dtype=DOUBLE), budget=budgets[-1], **options)
    f.noise.normal_()
    with pytest.raises(ExecutionError, match="changed in place"):
        y.square().mean().backward()


def test_a_buffer_that_a_solve_registered_and_is_another_by_the_backward_is_an_error() -> None:
    options, budgets = SOLVES["rk4"]
    f = Registered().double()
    y0 = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    y = odeint(f, y0, torch.linspace(0, 1, 9, dtype=DOUBLE), budget=budgets[-1], **options)
    f.reset()
    f.draw(y0.detach())
    with pytest.raises(ExecutionError, match="gave another result"):
        y.square().mean().backward()


@pytest.mark.parametrize("kind", [Noisy, Registered])
@pytest.mark.parametrize("solve", SOLVES)
def test_noise_that_a_solve_draws_counts(solve: str, kind: Any) -> None:
    options, budgets = SOLVES[solve]
    torch.manual_seed(0)
    f = kind().double()
    y0 = torch.randn(5, 4, dtype=DOUBLE, requires_grad=True)
    t = torch.linspace(0, 1, 9, dtype=DOUBLE)

    def step() -> None:
        f.reset()
        odeint(f, y0, t, budget=budgets[-1], **options).square().mean().backward()

    step()
    f.reset()
    for p in (y0, *f.parameters()):
        p.grad = None
    _, measured = default_meter(torch.device("cpu")).measure(step)
    assert measured.peak_bytes <= budgets[-1]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_measuring_leaves_what_func_keeps_as_it_was(method: str) -> None:
    """Lists hold what the evaluations of the solve appended."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)
            self.times: list[float] = []
            self.by_name: dict[str, float] = {}
            self.seen: set[float] = set()

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            self.times.append(float(t))
            self.by_name[str(float(t))] = float(t)
            self.seen.add(float(t))
            return torch.tanh(self.net(y))

    torch.manual_seed(0)
    f, y0 = Counting(), torch.randn(5, 4)
    t = torch.linspace(0, 1, 4)
    odeint(f, y0, t, method=method, rtol=1e-3, atol=1e-3)
    expected = (list(f.times), dict(f.by_name), set(f.seen))
    f.times.clear()
    f.by_name, f.seen = {}, set()
    odeint(f, y0, t, method=method, rtol=1e-3, atol=1e-3, budget="1MiB")
    assert (f.times, f.by_name, f.seen) == expected
