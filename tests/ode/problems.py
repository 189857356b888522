"""Right-hand sides, and what tests of `odeint` compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ckptsched.base.errors import (
    InfeasibleBudgetError,
)
from ckptsched.memory.meters import default_meter

DOUBLE = torch.float64
AS_TORCHDIFFEQ = ["euler", "midpoint", "heun2", "heun3", "rk4"]
EXPLICIT = [*AS_TORCHDIFFEQ, "ralston", "rk4_classic", "tsit5"]


class Field(nn.Module):
    """A small right-hand side that depends on time."""

    def __init__(self, width: int = 6, hidden: int = 24) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(y))) * torch.cos(t)


def problem(width: int = 6, batch: int = 5) -> tuple[Field, Tensor]:
    torch.manual_seed(0)
    f = Field(width).double()
    return f, torch.randn(batch, width, dtype=DOUBLE, requires_grad=True)


def loss_of(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    return torch.stack([part.abs().square().mean() for part in parts]).sum()


def gradients(output: Any, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss_of(output), inputs, allow_unused=True))


def equal(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )


def assert_within(call: Callable[..., Any], inputs: Sequence[Tensor], share: float) -> None:
    """With a budget the numbers are the same, bit for bit, and the budget is kept."""
    meter = default_meter(torch.device("cpu"))

    def step(budget: int | None) -> tuple[Any, list[Tensor | None]]:
        output = call(budget)
        return output, gradients(output, inputs)

    (expected, plain), all_stored = meter.measure(lambda: step(None))
    budget = int(share * all_stored.peak_bytes)
    try:
        call(budget)  # profiled and planned here
    except InfeasibleBudgetError as error:
        budget = error.least_budget_bytes or 0
        call(budget)
    (found, planned), measured = meter.measure(lambda: step(budget))
    assert equal(plain, planned)
    parts = zip(*[x if isinstance(x, tuple) else (x,) for x in (expected, found)], strict=True)
    assert all(torch.equal(a, b) for a, b in parts)
    assert measured.peak_bytes <= budget


class Count(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f, self.calls = f, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.f(t, y)


ENDS = torch.tensor([0.0, 1.0], dtype=DOUBLE)
TIMES = torch.tensor([0.0, 0.4, 1.0], dtype=DOUBLE)
ADAPTIVE = ["bosh3", "dopri5", "tsit5"]
FIXED = ["euler", "rk4"]


def decay(t: Tensor, y: Any) -> Any:
    return tuple(-part for part in y) if isinstance(y, tuple) else -y


class Pair(nn.Module):
    """dq/dt = p + drag_q * q, dp/dt = -q - drag_p * p + cos(t), all of them trained."""

    def __init__(self, drag_q: float = 0.0, drag_p: float = 0.0) -> None:
        super().__init__()
        self.drags = nn.Parameter(torch.tensor([drag_q, drag_p], dtype=DOUBLE))
        self.calls = 0

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        q, p = y
        drags = self.drags.to(q.dtype)
        return p + drags[0] * q, -q - drags[1] * p + torch.cos(t)


def pair(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    return torch.full((3,), 0.6, dtype=dtype), torch.full((3,), -0.8, dtype=dtype)


class Told(nn.Module):
    """Notes what it is told on the way, of the forward pass and of the adjoint equation."""

    def __init__(self, *names: str, parts: int = 0, rate: float = 5.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.parts, self.rate = Field(6).double(), parts, rate
        self.told: list[tuple[str, float, float, Any]] = []
        for name in names:
            setattr(self, name, self.note(name))

    def note(self, name: str) -> Callable[[Tensor, Any, Tensor], None]:
        def callback(t: Tensor, y: Any, h: Tensor) -> None:
            first = y[0] if isinstance(y, tuple) else y
            self.told.append((name, float(t), float(h), first.detach().clone()))

        return callback

    def forward(self, t: Tensor, y: Any) -> Any:
        slope = self.f(self.rate * t, y[0] if self.parts else y)
        return (slope, *y[1:]) if self.parts else slope
