"""What the ODE examples print: the budget, what was measured, and what plain autograd takes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import ckptsched as cs
from ckptsched.memory.meters import default_meter

Loss = Callable[[int | str | None], Tensor]
"""A loss solved within a budget; None is plain autograd."""


@dataclass(kw_only=True)
class Outcome:
    """What training within a budget came to."""

    budget_bytes: int
    peaks: list[int] = field(default_factory=list)
    """Measured peak of each training step, forward and backward together, in bytes."""
    losses: list[float] = field(default_factory=list)
    plain_bytes: int = 0
    """Measured peak of the same training step by plain autograd."""
    gradient_difference: float = float("nan")
    """Norm of the difference to plain autograd's gradient, relative to that gradient's norm."""
    seconds: float = 0.0
    """Of a training step within the budget, the mean."""

    @property
    def peak_bytes(self) -> int:
        """The largest peak of all training steps."""
        return max(self.peaks)

    def show(self, *more: tuple[str, str]) -> None:
        """Print the table, with lines of the example's own."""
        times = self.plain_bytes / self.budget_bytes
        bits = "0: the same bits" if self.gradient_difference == 0 else "relative"
        kept = "within" if self.peak_bytes <= self.budget_bytes else "ABOVE"
        lines = [
            ("budget", _bytes(self.budget_bytes)),
            ("measured peak", f"{_bytes(self.peak_bytes)}, {kept}, {len(self.peaks)} steps"),
            ("plain autograd's peak", f"{_bytes(self.plain_bytes)}, {times:.1f} times the budget"),
            ("gradient difference", f"{self.gradient_difference:.2g} ({bits})"),
            ("loss", f"{self.losses[0]:.6g} before, {self.losses[-1]:.6g} after"),
            ("a training step", f"{self.seconds:.2f} s"),
            *more,
        ]
        for name, text in lines:
            print(f"{name:<24} {text}")
        if self.peak_bytes > self.budget_bytes:
            raise SystemExit("the budget was not kept")


def read_arguments(argv: Sequence[str] | None, about: str, budget: str) -> argparse.Namespace:
    """The arguments of an example, `small` and `budget`.

    Args:
        argv: As on the command line; None takes those of the process.
        about: What the example is, in its first line.
        budget: The budget that it takes if none is given.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="only show that it runs")
    parser.add_argument("--budget", help=f'such as "{budget}" (the default)')
    return parser.parse_args(argv)


def _bytes(size: int) -> str:
    return f"{size:,} bytes ({cs.format_bytes(size)})"


def bytes_of(budget: str, loss: Loss, parameters: Iterable[Tensor]) -> int:
    """A budget in bytes; a percentage is one of plain autograd's peak, which is measured.

    Args:
        budget: As people write it, such as "4MiB" or "40%".
        loss: The loss.
        parameters: Whose gradients a training step makes.
    """
    parsed = cs.parse_budget(budget)
    plain = _gradient(loss, list(parameters), None)[1] if parsed.share is not None else 0
    return parsed.resolve(plain)


def measured_step(
    outcome: Outcome, loss: Loss, parameters: Iterable[Tensor], *, show: bool = True
) -> Tensor:
    """Evaluate the loss and its gradient within the budget, and note both and the peak.

    Args:
        outcome: Where figures are noted.
        loss: The loss.
        parameters: Whose gradients are made anew.
        show: Print a line.

    Returns:
        The loss, without a graph.
    """
    started = time.perf_counter()
    (value, _), peak = _gradient(loss, list(parameters), outcome.budget_bytes)
    seconds, count = time.perf_counter() - started, len(outcome.losses)
    outcome.seconds = (outcome.seconds * count + seconds) / (count + 1)
    outcome.peaks.append(peak)
    outcome.losses.append(float(value))
    if show:
        print(f"step {count + 1:>3}: loss {float(value):.6g}, {seconds:.1f} s", flush=True)
    return value


def against_plain(outcome: Outcome, loss: Loss, parameters: Iterable[Tensor]) -> None:
    """Compare gradient and peak with plain autograd's, and note them.

    Args:
        outcome: Where figures are noted.
        loss: The loss.
        parameters: Whose gradients are compared, each and all.
    """
    chosen = list(parameters)
    (_, planned), peak = _gradient(loss, chosen, outcome.budget_bytes)
    (_, plain), outcome.plain_bytes = _gradient(loss, chosen, None)
    outcome.peaks.append(peak)
    difference = torch.linalg.vector_norm(planned - plain) / torch.linalg.vector_norm(plain)
    outcome.gradient_difference = float(difference)


def _gradient(
    loss: Loss, parameters: list[Tensor], budget: int | None
) -> tuple[tuple[Tensor, Tensor], int]:
    """The loss, its gradient as one vector (both without a graph), and the peak in bytes."""
    for p in parameters:
        p.grad = None

    def step() -> Tensor:
        value = loss(budget)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    value, measurement = default_meter(parameters[0].device).measure(step)
    vector = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )
    return (value, vector), measurement.peak_bytes
