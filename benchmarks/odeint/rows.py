"""What `benchmarks.odeint` measures: bytes, gradients, evaluations and processor time of solves."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from benchmarks.online import Field, positions_of_diffrax, sweep_of_diffrax
from ckptsched import InfeasibleBudgetError, odeint, solve_adaptive
from ckptsched.memory.meters import default_meter
from ckptsched.ode.methods.table import DOPRI5
from ckptsched.solvers.binomial.revolve import advances

Solve = Callable[[], Any]
"""A forward pass: gives the states at the requested times."""

ADAPTIVE = ("bosh3 adaptive", "dopri5 adaptive", "tsit5 adaptive", "dopri8 adaptive")
FIXED = (
    *("euler", "midpoint", "heun2", "ralston", "heun3", "rk4", "rk4_classic", "bosh3", "dopri5"),
    *("tsit5", "dopri8", "implicit_euler", "trapezoid", "leapfrog"),
)
# What torchdiffeq has, too; the others' interpolants or options differ from ours.
_THEIRS = ("euler", "midpoint", "heun2", "heun3", "rk4", "dopri5 adaptive")


class Network(nn.Module):
    """An MLP as right-hand side, of a state or, for leapfrog, of a pair (q, p)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(width, hidden).double()
        self.outer = nn.Linear(hidden, width).double()

    def forward(self, t: Tensor, y: Any) -> Any:
        """The slope; q' = p and p' = force(q) for a pair."""
        if isinstance(y, tuple):
            return y[1], self.outer(torch.tanh(self.inner(y[0])))
        return self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


@dataclass(frozen=True)
class Problem:
    """A network, an initial state and what a solve of it is asked for."""

    network: Network
    states: tuple[Tensor, ...]
    steps: int
    until: float = 1.0

    @staticmethod
    def make(width: int, hidden: int, batch: int, steps: int, until: float = 1.0) -> Problem:
        """Float64, with the gradient of the initial state wanted; two states, for leapfrog."""
        network = Network(width, hidden)
        y = [torch.randn(batch, width, dtype=torch.float64).requires_grad_() for _ in range(2)]
        return Problem(network, tuple(y), steps, until)

    def solve(self, by: Callable[..., Any], method: str, **kwargs: Any) -> Solve:
        """A solve by a function with torchdiffeq's signature."""
        t = torch.tensor([0.0, self.until], dtype=torch.float64)
        y0 = self.states if method == "leapfrog" else self.states[0]
        name = method.removesuffix(" adaptive")
        if name == method:
            kwargs["options"] = {"step_size": self.until / self.steps}
        else:
            # torchdiffeq differentiates its choice of the first step, too, unless that is given.
            kwargs |= {"rtol": 1e-6, "atol": 1e-6, "options": {"first_step": self.until / 100}}
        return lambda: by(self.network, y0, t, method=name, **kwargs)

    def train(self, solve: Solve) -> None:
        """Forward, loss and backward."""
        out = solve()
        loss = sum(x.square().mean() for x in (out if isinstance(out, tuple) else (out,)))
        del out
        loss.backward()

    def clear(self) -> None:
        """Let all gradients go, so that each training step makes its own."""
        self.network.zero_grad()
        for y in self.states:
            y.grad = None

    def measured(self, solve: Solve) -> tuple[list[Tensor], int]:
        """Gradients of a training step, and its peak in bytes."""
        self.clear()
        _, found = default_meter("cpu").measure(lambda: self.train(solve))
        every = (*self.states, *self.network.parameters())
        gradients = [x.grad for x in every if x.grad is not None]
        self.clear()
        return gradients, found.peak_bytes

    def fitting(self, method: str, budget: int, **kwargs: Any) -> tuple[Solve, int]:
        """A solve within a budget, or within the least that works, and that budget; planned."""
        solve = self.solve(odeint, method, budget=budget, **kwargs)
        try:
            solve()
        except InfeasibleBudgetError as error:
            if error.least_budget_bytes is None:
                raise
            budget = error.least_budget_bytes
            solve = self.solve(odeint, method, budget=budget, **kwargs)
            solve()
        return solve, budget


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any gradient, over the largest entry of that one; 0 is bit for bit."""
    assert len(found) == len(expected)
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def least_seconds(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Least processor time of each, all taken in turn."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            gc.collect()
            gc.disable()
            start = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - start)
            gc.enable()
    return best


def budgets_kept(methods: Sequence[str]) -> list[dict[str, Any]]:
    """A row a method and budget: measured peak and gradients, against plain autograd's."""
    rows = []
    for method in methods:
        # Adaptive steps are few on the short interval, so those solve a longer one.
        problem = Problem.make(16, 64, 32, 50, 20.0 if method in ADAPTIVE else 1.0)
        exact, peak = problem.measured(problem.solve(odeint, method))
        theirs = None
        if method in _THEIRS:
            solve = problem.solve(torchdiffeq.odeint, method)
            theirs = difference(problem.measured(solve)[0], exact)
        for budget in (peak, peak * 3 // 10, 1):
            solve, granted = problem.fitting(method, budget)
            found, measured = problem.measured(solve)
            rows.append(
                {
                    "method": method,
                    "plain_bytes": peak,
                    "least": granted != budget,
                    "budget_bytes": granted,
                    "peak_bytes": measured,
                    "difference": difference(found, exact),
                    "torchdiffeq_difference": theirs,
                }
            )
    return rows


def times(
    width: int, hidden: int, batch: int, steps: int, methods: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """A row a method: ours against torchdiffeq's, at store-all and at the adjoint's memory."""
    rows = []
    for method in methods:
        problem = Problem.make(width, hidden, batch, steps, 10.0 if method in ADAPTIVE else 1.0)
        solves = {
            "torchdiffeq": problem.solve(torchdiffeq.odeint, method),
            "adjoint": problem.solve(torchdiffeq.odeint_adjoint, method),
            "ours": problem.solve(odeint, method),
        }
        found = {name: problem.measured(solve) for name, solve in solves.items()}
        exact, peaks = found["ours"][0], {name: peak for name, (_, peak) in found.items()}
        solves["at_adjoint"], budget = problem.fitting(method, peaks["adjoint"])
        solves["at_all"], _ = problem.fitting(method, peaks["torchdiffeq"])
        for name in ("at_adjoint", "at_all"):
            found[name] = problem.measured(solves[name])
            peaks[name] = found[name][1]
        ways = {name: _training(problem, solve) for name, solve in solves.items()}
        rows.append(
            {
                "method": method,
                "size": [width, hidden, batch, steps],
                "seconds": least_seconds(ways, rounds),
                "peak_bytes": peaks,
                "budget_bytes": budget,
                "differences": {name: difference(g, exact) for name, (g, _) in found.items()},
            }
        )
    return rows


def _training(problem: Problem, solve: Solve) -> Callable[[], None]:
    def work() -> None:
        problem.clear()
        problem.train(solve)

    return work


def evaluations(slots: Sequence[int], until: float) -> list[dict[str, Any]]:
    """A row a number of states: evaluations of f by adaptive dopri5, and the least possible."""
    rows = []
    exact = _adaptive(None, until)[1]
    for kept in slots:
        (accepted, rejected, forward, backward), gradients = _adaptive(kept, until)
        # Backward each step runs once with its tape. Of the advances that revolve counts, all but
        # the last step's are the forward pass itself.
        again = advances(accepted, kept) - (accepted - 1)
        published = sweep_of_diffrax(positions_of_diffrax(accepted, kept), accepted, kept)
        rows.append(
            {
                "slots": kept,
                "accepted": accepted,
                "rejected": rejected,
                "forward": forward,
                "backward": backward,
                "least_backward": DOPRI5.evaluations * (accepted + again),
                "diffrax_backward": DOPRI5.evaluations * (accepted + published),
                "difference": difference(gradients, exact),
            }
        )
    return rows


def _adaptive(slots: int | None, until: float) -> tuple[tuple[int, int, int, int], list[Tensor]]:
    """Accepted, rejected steps, evaluations forward and backward; and gradients."""
    field, y0 = Field(), torch.ones(8, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, until], dtype=torch.float64)
    solution = solve_adaptive(field, y0, t, DOPRI5, rtol=1e-6, atol=1e-6, checkpoints=slots)
    before, done = field.calls, solution.statistics
    loss = solution.states[-1].square().sum()
    gradients = list(torch.autograd.grad(loss, [y0, *field.parameters()]))
    return (done.accepted, done.rejected, done.evaluations, field.calls - before), gradients


def long_solve(steps: int, divisor: int, rounds: int) -> dict[str, Any]:
    """Many RK4 steps in a small part of the memory that storing everything takes."""
    problem = Problem.make(16, 32, 8, steps, 10.0)
    plain = problem.solve(odeint, "rk4")
    exact, peak = problem.measured(plain)
    start = time.process_time()
    solve, budget = problem.fitting("rk4", peak // divisor)
    planned = time.process_time() - start
    found, measured = problem.measured(solve)
    solves = {
        "plain": plain,
        "ours": solve,
        "torchdiffeq": problem.solve(torchdiffeq.odeint, "rk4"),
        "adjoint": problem.solve(torchdiffeq.odeint_adjoint, "rk4"),
    }
    adjoint, adjoint_peak = problem.measured(solves["adjoint"])
    ways = {name: _training(problem, way) for name, way in solves.items()}
    seconds = least_seconds(ways, rounds)
    return {
        "steps": steps,
        "plain_bytes": peak,
        "budget_bytes": budget,
        "peak_bytes": measured,
        "difference": difference(found, exact),
        "adjoint_bytes": adjoint_peak,
        "adjoint_difference": difference(adjoint, exact),
        "first_call_seconds": planned,
        "seconds": seconds,
    }


def least_budgets(methods: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """A row a method: the least budget of steps and of slopes as stages."""
    rows = []
    for method in methods:
        problem = Problem.make(16, 64, 32, steps)
        exact, peak = problem.measured(problem.solve(odeint, method))
        row: dict[str, Any] = {"method": method, "plain_bytes": peak}
        for granularity in ("step", "slope"):
            solve, least = problem.fitting(method, 1, granularity=granularity)
            found, measured = problem.measured(solve)
            row[granularity] = {
                "least_bytes": least,
                "peak_bytes": measured,
                "difference": difference(found, exact),
            }
        rows.append(row)
    return rows
