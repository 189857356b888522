"""A fitted model whose forward others wrap follows its plan, until that is taken off."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import ckptsched as cs
from tests.capture.recording.test_stages import Language
from tests.fitting.test_in_place import gradients, ids, same

X = ids(4, 16)


def _by_wraps(model: nn.Module) -> None:
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = forward


def _by_partial(model: nn.Module) -> None:
    model.forward = functools.partial(model.forward)


def _as_a_method(model: nn.Module) -> None:
    function = model.forward.__func__

    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    model.forward = MethodType(forward, model)


WAYS = [_by_wraps, _by_partial, _as_a_method]


@pytest.fixture
def nets() -> tuple[Language, Language]:
    """A fitted model, and its twin by plain autograd."""
    torch.manual_seed(0)
    plain = Language()
    model = copy.deepcopy(plain)
    return cs.fit(model, X, kwargs={"labels": X}, budget="80%"), plain


@pytest.mark.parametrize("wrap", WAYS)
def test_its_plan_is_found_and_taken_off(
    nets: tuple[Language, Language], wrap: Callable[[nn.Module], None]
) -> None:
    model, plain = nets
    plan, inner = cs.plan_of(model), vars(model)["forward"]
    wrap(model)
    wrap(model)
    assert list(inspect.signature(model.forward).parameters) == ["ids", "labels"]
    assert cs.plan_of(model) is plan
    assert same(gradients(model, X, labels=X), gradients(plain, X, labels=X))
    assert not inner.is_off()
    cs.unfit(model)
    assert inner.is_off()
    with pytest.raises(cs.PlanMismatchError, match="follows no plan"):
        cs.plan_of(model)
    assert same(gradients(model, X, labels=X), gradients(plain, X, labels=X))


@pytest.mark.parametrize("wrap", WAYS)
def test_it_is_fitted_again_with_what_is_around_it(
    nets: tuple[Language, Language], wrap: Callable[[nn.Module], None]
) -> None:
    model, plain = nets
    first, inner = cs.plan_of(model), vars(model)["forward"]
    wrap(model)
    with pytest.raises(cs.InfeasibleBudgetError):
        cs.fit(model, X, kwargs={"labels": X}, budget=1000)
    assert cs.plan_of(model) is first
    assert not inner.is_off()
    cs.fit(model, X, kwargs={"labels": X}, budget="90%")
    assert inner.is_off()
    chain: Any = cs.plan_of(model).chain
    assert chain.signature.recorded
    assert cs.plan_of(model).budget_text == "90%"
    assert same(gradients(model, X, labels=X), gradients(plain, X, labels=X))
    cs.unfit(model)
    assert same(gradients(model, X, labels=X), gradients(plain, X, labels=X))


def test_a_copy_of_a_method_around_it_is_its_own_model(nets: tuple[Language, Language]) -> None:
    model, plain = nets
    _as_a_method(model)
    twin = copy.deepcopy(model)
    with pytest.raises(cs.PlanMismatchError, match="follows no plan"):
        cs.plan_of(twin)
    with pytest.warns(cs.BudgetWarning, match="copy of a fitted Language"):
        found = gradients(twin, X, labels=X)
    assert same(found, gradients(plain, X, labels=X))
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        twin(X, labels=X)
    cs.fit(twin, X, kwargs={"labels": X}, budget="80%")
    assert same(gradients(twin, X, labels=X), gradients(plain, X, labels=X))
    assert same(gradients(model, X, labels=X), gradients(plain, X, labels=X))
