"""The examples of ODEs within a budget: they learn, keep it, and have plain autograd's gradient."""

from __future__ import annotations

import contextlib
import io
from types import ModuleType

import pytest

from examples import flow, pendulum, wave


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "times", "difference"),
    [(wave, 5, 0.0), (pendulum, 10, 0.0), (flow, 1.5, 1e-12)],
    ids=lambda value: value.__name__.split(".")[-1] if isinstance(value, ModuleType) else "",
)
def test_an_example_learns_within_its_budget(
    example: ModuleType, times: float, difference: float
) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        outcome = example.main(["--small"])
    assert outcome.losses[-1] < outcome.losses[0]
    assert max(outcome.peaks) <= outcome.budget_bytes
    assert outcome.plain_bytes > times * outcome.budget_bytes
    assert outcome.gradient_difference <= difference
    assert f"{outcome.peak_bytes:,} bytes" in printed.getvalue()
