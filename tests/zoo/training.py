"""How a model of the zoo is put to the test: one training step at each of three budgets."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.capture.recording.preparation import caching, switched_off
from ckptsched.capture.recording.stages import Captured
from ckptsched.tensors.pytree import State

SHARES = (0.0, 0.4, 0.8)  # of the way from the least budget to that which stores all


@dataclass(frozen=True)
class Training:
    """A model, and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    sizes_vary: bool = False
    """Whether sizes hang on values, as with experts: then a plan provides for more than is used."""
    cuts: Any = "dear"
    """Where it is cut; finer where parameter gradients or the output leave coarse cuts no room."""
    most: tuple[Any, ...] = ()
    """A batch of the same shapes whose values take the most, where a plan provides for that."""
    overestimated: bool = False
    """Whether the projected peak is over 1 KiB above the measured one: a stage whose tape keeps
    more than four storages of others is charged as if all or none of them outlived it."""


class Held(nn.Module):
    """A model one level further down, where its parts may be called "model" or "stages"."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)


Maker = Callable[[], Training]


def library(name: str) -> ModuleType:
    """A library that models come from.

    All belong to the extra `zoo`. They ask for a newer torch than the oldest that is supported, and
    only with such an old one may they be missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        if torch.__version__ < "2.10":
            pytest.skip(f"{name} is not there", allow_module_level=True)
        raise


def loss_of(output: Any) -> Tensor:
    """The loss that a model gives; else one that every result enters that has a gradient."""
    if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
        return output["loss"]
    results = [y for y in State.of(output, opaque=True).leaves if y.requires_grad]
    real = [y.abs() if y.is_complex() else y for y in results]
    return torch.stack([(y.float() - 1).square().mean() for y in real]).sum()


def assert_trains_within_budgets(training: Training, cuts: Any = None) -> None:
    """What the model gives and all that a step leaves are plain autograd's, the peak is planned."""
    model, args, kwargs = training.model, training.args, training.kwargs
    if any(hasattr(Captured, name) for name in model._modules):
        model = Held(model)
    net = cs.captured(model, *args, kwargs=kwargs, cuts=cuts or training.cuts)
    x = net.take(*args, **kwargs)

    def loss(tensors: Any) -> Tensor:
        return loss_of(net.give(tensors))

    chain = cs.profile(net, x, loss=loss)
    whole = cs.plan(chain, budget="100%")
    assert whole.least_budget_bytes < whole.store_all_bytes
    room = whole.store_all_bytes - whole.least_budget_bytes
    for share in SHARES:
        plan = cs.plan(chain, budget=whole.least_budget_bytes + int(share * room))
        found = cs.verify(net, plan, x, loss=loss)
        assert found.ok, f"{found}\n{net}"
        assert found.max_gradient_difference == found.loss_difference == 0
        assert found.max_gradient > 0
        assert found.measured_peak_bytes <= found.projected_peak_bytes, str(found)
        if training.most:
            found = cs.verify(net, plan, net.take(*training.most, **kwargs), loss=loss)
            assert found.ok, str(found)
        if not (training.sizes_vary or training.overestimated):
            assert found.projected_peak_bytes - 1024 <= found.measured_peak_bytes, str(found)


def assert_trains_in_place(training: Training, steps: int = 2) -> None:
    """A fitted model's training steps leave what those of a plain copy leave, to the bit."""
    model, args, kwargs = training.model, training.args, dict(training.kwargs)
    plain = copy.deepcopy(model)
    keys = [*model.state_dict()]
    try:
        cs.fit(model, *args, kwargs=kwargs, budget="75%")
    except cs.InfeasibleBudgetError as error:
        least = error.least_budget_bytes or 0  # which is refused again, if none is named
        cs.fit(model, *args, kwargs=kwargs, budget=least)
    assert [*model.state_dict()] == keys
    found = []
    for trained in (plain, model):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
        torch.manual_seed(3)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            # What a recording is made without: caches of keys and values, which change bits.
            with switched_off(caching(trained)):
                loss = loss_of(trained(*args, **kwargs))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            gradients = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
            optimizer.step()
        found.append((losses, gradients, trained.state_dict(), torch.get_rng_state()))
    (losses, gradients, state, drawn), (*planned, drawn_by_plan) = found
    assert torch.equal(drawn, drawn_by_plan)
    for expected, got in zip((dict(enumerate(losses)), gradients, state), planned, strict=True):
        got = dict(enumerate(got)) if isinstance(got, list) else got
        assert expected.keys() == got.keys()
        for name in expected:
            assert torch.equal(expected[name], got[name]), name
