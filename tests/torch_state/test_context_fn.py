"""Flags that torch does not see: an error when only the forward had them, and `context_fn`."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ckptsched as cs
from ckptsched.recompute.output_check import glance
from tests.support.networks import planned
from tests.support.surroundings import (
    FLAG,
    PLANNED,
    SOLVERS,
    Attention,
    Stage,
    chain_of,
    equal,
    flag,
    gradients,
    sample,
)


class Flagged(Stage):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * FLAG[0]


def low() -> AbstractContextManager[None]:
    return flag(0.5)


def both() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return low(), low()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_flag_that_only_the_forward_had_is_an_error(solver: str) -> None:
    model, x = chain_of(Flagged), sample(Stage)
    trained = cs.checkpointed(model, planned(model, x, solver))
    if solver == "store_all":
        expected = gradients(model, model, x, low)
        assert equal(gradients(trained, model, x, low), expected)
    else:
        with pytest.raises(cs.ExecutionError, match=r"gave another result.*context_fn="):
            gradients(trained, model, x, low)


@pytest.mark.parametrize("solver", SOLVERS)
def test_context_fn_gives_the_flag_to_what_runs_again(solver: str) -> None:
    model, x = chain_of(Flagged), sample(Stage)
    expected = gradients(model, model, x, low)
    trained = cs.checkpointed(model, planned(model, x, solver), context_fn=both)
    assert equal(gradients(trained, model, x, nullcontext), expected)
    assert equal(gradients(trained, model, x, low), expected)
    assert FLAG == [1.0]
    with torch.no_grad():
        assert torch.equal(trained(x), expected[0])


def test_context_fn_in_further_backwards() -> None:
    model, x = chain_of(Flagged), sample(Stage)
    with low():
        y = model(x).square().mean()
    weights = list(model.parameters())
    first = torch.autograd.grad(y, weights, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
    trained = cs.checkpointed(model, planned(model, x, "every_2"), context_fn=both)
    loss = trained(x).square().mean()
    for _ in range(2):
        assert equal(list(torch.autograd.grad(loss, weights, retain_graph=True)), list(first))
    with pytest.warns(cs.BudgetWarning, match="create_graph"):
        again = torch.autograd.grad(loss, weights, create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in again), weights)
    for a, b in zip(found, second, strict=True):
        torch.testing.assert_close(a, b)


def test_first_runs_and_later_ones_have_contexts_of_their_own() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def noted(word: str) -> Iterator[None]:
        seen.append(word)
        yield
        seen.append(f"end of {word}")

    class Telling(Stage):
        def forward(self, x: Tensor) -> Tensor:
            seen.append("run")
            return super().forward(x)

    model, x = chain_of(Telling, 4), sample(Stage)
    plan = planned(model, x, "input_only")
    trained = cs.checkpointed(model, plan, context_fn=lambda: (noted("first"), noted("again")))
    seen.clear()
    y = trained(x)
    assert seen == ["first", *["run"] * 4, "end of first"]
    seen.clear()
    y.sum().backward()
    inside = None
    for word in seen:
        if word == "run":
            assert inside == "again"
        else:
            inside = None if word.startswith("end") else word
    assert seen.count("run") == plan.forwards - 4
    assert seen.count("again") > 1


def test_context_fn_is_kept_by_all_that_hands_a_model_on() -> None:
    model, x = chain_of(Flagged), sample(Stage)
    plan = planned(model, x, "input_only")
    trained = cs.checkpointed(model, plan, context_fn=both)
    expected = gradients(model, model, x, low)
    for other in (
        copy.deepcopy(trained),
        pickle.loads(pickle.dumps(trained)),
        cs.checkpointed(trained, plan),
    ):
        assert equal(gradients(other, other.model, x, nullcontext), expected)
    result = cs.verify(trained, plan, x)
    assert result.ok, result
    file = io.BytesIO()
    local = cs.checkpointed(model, plan, context_fn=lambda: both())
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dump(local, file)


def test_fit_measures_in_the_first_context() -> None:
    seen = []

    class Telling(Flagged):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(FLAG[0])
            return super().forward(x)

    model, x = chain_of(Telling), sample(Stage)
    expected = gradients(model, model, x, low)
    seen.clear()
    trained = cs.fit(model, x, budget="90%", context_fn=both)
    assert seen
    assert set(seen) == {0.5}
    assert equal(gradients(trained, model, x, nullcontext), expected)


def test_settings_may_come_from_a_context() -> None:
    def math() -> Any:
        return sdpa_kernel(SDPBackend.MATH), sdpa_kernel(SDPBackend.MATH)

    model, x = chain_of(Attention), sample(Attention)
    expected = gradients(model, model, x, PLANNED["attention"])
    trained = cs.fit(model, x, budget="100%", solver="every_2", context_fn=math)
    assert equal(gradients(trained, model, x, nullcontext), expected)


def test_autocast_may_come_from_a_context() -> None:
    def cast() -> Any:
        return tuple(torch.autocast("cpu", torch.bfloat16) for _ in range(2))

    def uncached() -> Any:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    model, x = chain_of(Stage), sample(Stage)
    expected = gradients(model, model, x, uncached)
    for budget in ("100%", "90%"):
        trained = cs.fit(model, x, budget=budget, context_fn=cast)
        assert equal(gradients(trained, model, x, nullcontext), expected)


@pytest.mark.parametrize("given", [3, lambda: None, lambda: (nullcontext(),), lambda: (1, 2)])
def test_what_is_no_context_fn_is_refused(given: Any) -> None:
    model, x = chain_of(Stage, 2), sample(Stage)
    plan = planned(model, x, "every_stage")
    with pytest.raises(cs.ExecutionError, match=r"context_fn.*two context managers"):
        cs.checkpointed(model, plan, context_fn=given)(x)


def test_a_glance_sees_the_start_the_middle_and_the_end() -> None:
    x = torch.arange(1000.0)
    first = glance([x])
    for place in (0, 500, 999):
        y = x.clone()
        y[place] += 1
        assert glance([y]) != first
    assert glance([x.clone()]) == first
    assert glance([torch.empty(0), torch.empty(3, device="meta")]) == (0, hash(()))
    assert glance([x.view(10, 100).T]) != glance([(x + 1).view(10, 100).T])
