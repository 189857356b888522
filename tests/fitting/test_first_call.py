"""A model that is fitted without a batch plans when it is first called with gradients on."""

from __future__ import annotations

import copy
import logging
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from tests.capture.recording.test_stages import Language

BUDGET = "70%"


def ids(rows: int = 4, length: int = 16) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(rows))


def chain() -> nn.Sequential:
    parts = [m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2))]
    return nn.Sequential(*parts)


def gradients_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Those of one step with random numbers of its own, and the random state after it."""
    torch.manual_seed(1)
    model.zero_grad()
    found = model(*args, **kwargs)
    (found["loss"] if isinstance(found, dict) else found.square().sum()).backward()
    return [*(p.grad.clone() for p in model.parameters()), torch.get_rng_state()]  # type: ignore[union-attr]


CALLS = [(Language, (ids(),), {"labels": ids()}), (chain, (torch.ones(256, 16),), {})]


@pytest.mark.parametrize(
    ("made", "args", "kwargs", "around"),
    [(*CALLS[0], nullcontext), (*CALLS[1], lambda: torch.autocast("cpu", torch.bfloat16))],
)
def test_the_first_step_is_planned_among_what_is_around_it(
    made: Any, args: Any, kwargs: Any, around: Any
) -> None:
    model = made()
    twin = copy.deepcopy(model)
    assert cs.fit(model, budget=BUDGET) is model

    def step(of: nn.Module) -> list[Tensor]:
        surrounding: AbstractContextManager[Any] = around()
        with surrounding:
            return gradients_of(of, *args, **kwargs)

    with torch.no_grad():
        model(*args, **kwargs)
    with pytest.raises(cs.PlanMismatchError, match="first called with gradients on"):
        cs.plan_of(model)
    assert all(map(torch.equal, step(model), step(twin)))
    plan = cs.plan_of(model)
    assert plan.overhead > 0
    model.zero_grad(set_to_none=True)
    _, bytes_of_step = default_meter(torch.device("cpu")).measure(lambda: step(model))
    assert bytes_of_step.peak_bytes > 0.5 * plan.peak_bytes


def test_the_first_step_keeps_the_budget() -> None:
    """Of the whole of it: the bytes of the step after the first are those of its plan."""
    model, x = cs.fit(chain(), budget=BUDGET), torch.ones(256, 16)
    gradients_of(model, x)
    model.zero_grad(set_to_none=True)

    def step() -> None:
        y = model(x)
        torch.log_softmax(y, -1).square().mean().backward()

    _, found = default_meter(torch.device("cpu")).measure(step)
    plan = cs.plan_of(model)
    assert found.peak_bytes <= plan.budget_bytes < plan.store_all_bytes


def test_a_log_says_what_was_planned(caplog: pytest.LogCaptureFixture) -> None:
    model = cs.fit(chain(), budget=BUDGET)
    with caplog.at_level(logging.WARNING, "ckptsched"):
        gradients_of(model, torch.ones(256, 16))
    assert re.search(r"Sequential: planned .*torch.float32\[256, 16\].* peak", caplog.text)


def test_a_model_that_trains_in_eval_mode_is_planned() -> None:
    """Nothing would keep the budget otherwise, and nothing would say so."""
    model = cs.fit(chain().eval(), budget=BUDGET)
    gradients_of(model, torch.ones(256, 16))
    assert cs.plan_of(model).overhead > 0


def test_what_is_refused_is_what_comes_after_the_first_call() -> None:
    model = cs.fit(chain(), budget=BUDGET, on_new_input="refuse")
    other = copy.deepcopy(model)
    for fitted in (model, other, copy.deepcopy(model)):
        gradients_of(fitted, torch.ones(256, 16))
        with pytest.raises(cs.PlanMismatchError, match="was planned for"):
            fitted(torch.ones(300, 16))


def test_what_does_not_fit_is_an_error_before_the_first_step() -> None:
    model = cs.fit(chain(), budget=100)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.ones(256, 16)
    with pytest.raises(cs.InfeasibleBudgetError) as caught:
        model(x)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before[1], torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(before[0][name], value), name
    cs.fit(model, budget=caught.value.least_budget_bytes or 0)
    gradients_of(model, x)
    assert cs.plan_of(model).peak_bytes == caught.value.least_budget_bytes


def test_a_share_is_one_of_the_first_batch() -> None:
    model = cs.fit(chain(), budget=BUDGET)
    gradients_of(model, torch.ones(256, 16))
    plan = cs.plan_of(model)
    gradients_of(model, torch.ones(300, 16))
    assert cs.plan_of(model) is plan
    other = cs.fit(cs.unfit(model), torch.ones(256, 16), budget=BUDGET)
    assert cs.plan_of(other).budget_bytes == plan.budget_bytes
