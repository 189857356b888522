"""What a budget of `odeint` covers of the caller's loss: one that is named, or a small one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import odeint, solve_adaptive
from ckptsched.base.errors import InfeasibleBudgetError, ProfileError
from ckptsched.memory.meters import ProfilerMeter, default_meter

DOUBLE = torch.float64
Loss = Callable[[Any], Tensor]


class Field(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden).double(), nn.Linear(hidden, width).double()

    def forward(self, t: Tensor, y: Any) -> Any:
        if isinstance(y, tuple):
            return tuple(self.down(torch.tanh(self.up(part))) for part in y)
        return self.down(torch.tanh(self.up(y)))


HEAD = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3)).double()


def parts(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


NAMED: dict[str, Loss] = {
    "mean square": lambda y: torch.stack([p.square().mean() for p in parts(y)]).sum(),
    "one by one": lambda y: torch.stack(
        [(p[j] - j).abs().mean() for p in parts(y) for j in range(len(p))]
    ).sum(),
    "through a network": lambda y: HEAD(parts(y)[0]).logsumexp(-1).mean(),
    "last": lambda y: (parts(y)[0][-1] - 1).square().mean(),
}
SMALL: dict[str, Loss] = {
    "last": NAMED["last"],
    "one on the way": lambda y: (parts(y)[0][1] * 2 - 1).square().mean(),
    "sum": lambda y: torch.stack([p.sum() for p in parts(y)]).sum(),
    "cross-entropy of the last": lambda y: nn.functional.cross_entropy(
        parts(y)[0][-1], torch.zeros(len(parts(y)[0][-1]), dtype=torch.int64)
    ),
}


def assert_kept(solve: Callable[..., Any], loss: Loss, inputs: list[Tensor], share: float) -> None:
    """The peak of forward, loss and backward is within a budget from the least upwards."""

    def step(budget: int | None) -> None:
        for x in (*inputs, *HEAD.parameters()):
            x.grad = None
        value = loss(solve(budget))
        value.backward()

    meter = default_meter(torch.device("cpu"))
    _, stored = meter.measure(lambda: step(None))
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(1)
    least = caught.value.least_budget_bytes
    assert least is not None
    budget = max(least, int(least + share * (stored.peak_bytes - least)))
    step(budget)
    _, measured = meter.measure(lambda: step(budget))
    assert measured.peak_bytes <= budget


@settings(deadline=None, max_examples=30)
@given(
    method=st.sampled_from(["midpoint", "rk4", "dopri5"]),
    times=st.integers(2, 33),
    pair=st.booleans(),
    named=st.booleans(),
    kind=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_budget_holds_with_the_loss_that_it_covers(
    method: str, times: int, pair: bool, named: bool, kind: int, share: float
) -> None:
    torch.manual_seed(1)
    f = Field()
    y0 = torch.randn(6, 8, dtype=DOUBLE, requires_grad=True)
    start = (y0, torch.ones(3, 8, dtype=DOUBLE)) if pair else y0
    t = torch.linspace(0, 1, times, dtype=DOUBLE)
    losses = list((NAMED if named else SMALL).values())
    loss = losses[kind]
    how: dict[str, Any] = {"method": method}
    how |= {"rtol": 1e-4} if method == "dopri5" else {"options": {"step_size": 0.1}}

    def solve(budget: int | None) -> Any:
        return odeint(f, start, t, budget=budget, loss=loss if named else None, **how)

    assert_kept(solve, loss, [y0, *f.parameters()], share)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_many_outputs_need_themselves_and_their_gradient(method: str) -> None:
    """Not the five tensors of their size that a mean square over all of them takes."""
    f, y0 = Field(), torch.randn(40, 8, dtype=DOUBLE, requires_grad=True)
    t = torch.linspace(0, 1, 129, dtype=DOUBLE)
    least = {}
    for name, loss in {"unnamed": None, "named": NAMED["mean square"]}.items():
        with pytest.raises(InfeasibleBudgetError) as caught:
            odeint(f, y0, t, method=method, budget=1, loss=loss)
        least[name] = (caught.value.least_budget_bytes or 0) / y0.nbytes
    assert 2 * 129 < least["unnamed"] < 2.4 * 129
    assert least["named"] > 4 * 129  # the loss takes it, and is measured


class Head(nn.Module):
    """Draws, moves its statistics, and takes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(8).double(), nn.Dropout(0.5)
        self.seen: list[torch.Size] = []

    def forward(self, y: Tensor) -> Tensor:
        self.seen.append(y.shape)
        return self.drop(self.norm(y[-1]))


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_loss_is_measured_once_and_leaves_no_trace(method: str) -> None:
    f, y0 = Field(), torch.randn(5, 8, dtype=DOUBLE, requires_grad=True)
    t = torch.linspace(0, 1, 5, dtype=DOUBLE)
    head = Head()

    def solve(target: Tensor) -> Tensor:
        def loss(y: Tensor) -> Tensor:  # made anew for each solve
            return (head(y) - target).square().mean()

        return odeint(f, y0, t, method=method, budget=10**6, loss=loss)

    before = [x.clone() for x in (torch.get_rng_state(), *head.state_dict().values())]
    solve(torch.zeros(8, dtype=DOUBLE))
    after = [torch.get_rng_state(), *head.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in head.parameters())
    count = len(head.seen)
    assert set(head.seen) == {torch.Size([5, 5, 8])}
    solve(torch.ones(8, dtype=DOUBLE))
    assert len(head.seen) == count


@pytest.mark.parametrize("method", ["euler", "dopri5"])
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda y: y, "one number .* found \\(3, 4, 8\\)"),
        (lambda y: 1.0, "one number .* found float"),
        (lambda y: y.detach().sum(), "one number that depends on the outputs"),
        (lambda y: HEAD[0].weight.sum(), "loss does not depend on the outputs"),
    ],
)
def test_what_is_no_loss_of_the_outputs_is_refused(method: str, loss: Any, words: str) -> None:
    y0 = torch.ones(4, 8, dtype=DOUBLE, requires_grad=True)
    t = torch.linspace(0, 1, 3, dtype=DOUBLE)
    with pytest.raises(ProfileError, match=words):
        odeint(Field(), y0, t, method=method, budget=10**6, loss=loss)


def test_a_loss_is_for_a_budget_alone() -> None:
    y0, t = torch.ones(4, 8, dtype=DOUBLE, requires_grad=True), torch.linspace(0, 1, 3).double()
    f = Field()
    for options in ({}, {"checkpoints": 2}):
        assert solve_adaptive(f, y0, t, loss=lambda y: 1 / 0, **options).states.shape == (3, 4, 8)
    with ProfilerMeter().window() as window:
        odeint(f, y0, t, method="rk4", loss=lambda y: 1 / 0)
    assert window.measurement.peak_bytes > 0
