"""FSDP2 on parts of a model that follows a plan, in one process.

A process by itself is a group, too: FSDP shards, gathers and reduces as it does with many. What
takes two processes is in `tests/support/distributed/fsdp_checks.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ckptsched as cs
from ckptsched.recompute.fsdp import OneAtATime, Sharding
from tests.executor.test_random_networks import plan_by
from tests.support.random_schedules import schedules

WIDTH = 6

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.a(x)))


def make(kinds: str) -> nn.Sequential:
    """Parts by letters: several stages, random numbers, statistics, shared and frozen ones."""
    torch.manual_seed(0)
    shared = nn.Linear(WIDTH, WIDTH)

    def linear() -> nn.Linear:
        return nn.Linear(WIDTH, WIDTH)

    parts = {
        "l": Layer,
        "o": lambda: cs.ODEBlock(nn.Sequential(linear(), nn.Tanh(), linear()), "midpoint", 2),
        "b": lambda: nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), nn.Tanh(), linear()),
        "r": lambda: nn.ReLU(inplace=True),
        "s": lambda: shared,
        "f": lambda: linear().requires_grad_(False),
    }
    return nn.Sequential(*(parts[kind]() for kind in kinds))


def step(network: nn.Module, x: Tensor) -> list[Tensor | None]:
    """All that a step leaves."""
    torch.manual_seed(3)
    network.zero_grad()
    output = network(x)
    output.square().sum().backward()
    gradients = (p.grad for p in network.parameters())
    whole = (g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)
    buffers = (b.clone() for b in network.buffers())
    return [output.detach(), torch.get_rng_state(), *whole, *buffers]


def shard_some(model: nn.Sequential, data: st.DataObject) -> None:
    """Shard blocks and what is inside of them, inner ones first."""
    from torch.distributed.fsdp import fully_shard

    keep = data.draw(st.booleans())
    for module in reversed(list(model.modules())[1:]):
        once_in = 1 if any(module is block for block in model) else 5
        if list(module.parameters()) and data.draw(st.integers(0, once_in)) == 0:
            fully_shard(module, reshard_after_forward=not keep)


@needs_gloo
@pytest.mark.slow
@settings(
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(st.text("lobrsf", min_size=1, max_size=4), st.data())
def test_random_networks_sharded_in_random_parts_equal_plain_autograd(
    group: None, kinds: str, data: st.DataObject
) -> None:
    from torch.distributed.fsdp import fully_shard

    model = make("l" + re.sub("r+", "r", kinds))
    twin, x = copy.deepcopy(model), torch.randn(5, WIDTH)
    chain = cs.profile(model, x)
    plan = plan_by(chain, data.draw(schedules(len(chain))))
    order = data.draw(st.sampled_from(["plan first", "shard first", "parts alone"]))
    if order == "plan first":
        network: nn.Module = cs.checkpointed(model, plan)
        shard_some(model, data)
        fully_shard(network)
    else:
        shard_some(model, data)
        if order == "shard first":
            fully_shard(model)
        network = cs.checkpointed(model, plan)
    for _ in range(2):
        found, expected = step(network, x), step(twin, x)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


@needs_gloo
def test_a_sharded_model_runs_without_gradients_and_again_with_retain_graph(group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = make("lob")
    twin, x = copy.deepcopy(model), torch.randn(5, WIDTH)
    planned = cs.checkpointed(model, cs.plan(cs.profile(model, x), budget="100%"))
    for block in model:
        fully_shard(block)
    network = fully_shard(planned)
    with torch.no_grad():
        torch.manual_seed(1)
        quiet = network(x)
        torch.manual_seed(1)
        assert torch.equal(quiet, twin(x))
    gradients = []
    for net in (network, twin):
        torch.manual_seed(2)
        loss = net(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        found = [p.grad for p in net.parameters()]
        gradients.append([g.full_tensor() if isinstance(g, DTensor) else g for g in found])
    for a, b in zip(*gradients, strict=True):
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert torch.equal(a, b)
    assert network.state_dict().keys() == twin.state_dict().keys()


@needs_gloo
def test_a_plan_within_a_plan_is_refused_where_it_is_sharded(group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    class Holder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    x, inner = torch.randn(5, WIDTH), make("ll")
    sample = x.clone().requires_grad_()
    planned = cs.checkpointed(inner, cs.plan(cs.profile(inner, sample), budget="100%"))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Holder(planned))
    outer = cs.checkpointed(model, cs.plan(cs.profile(model, x), budget="100%"))
    fully_shard(inner[0])
    network = fully_shard(outer)
    with pytest.raises(cs.PlanMismatchError, match="the outer model alone"):
        network(x)


def test_parts_that_overlap_are_refused() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    both = nn.Sequential(one, two)
    with pytest.raises(cs.PlanMismatchError, match="neither in all of the other's"):
        Sharding([one, both, two], [one, two])
    Sharding([both, two], [one, two])
    Sharding([both, nn.ReLU(), both], [both, one, two])


def test_one_at_a_time_leaves_what_it_enters() -> None:
    seen: list[Any] = []

    class Place:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            seen.append(self.number)
            if self.number == 7:
                raise ValueError(seen)

        def __exit__(self, *error: object) -> None:
            seen.append(-self.number)

    with OneAtATime(Place) as place:
        for number in (1, 1, 2, 1):
            place.to(number)
    assert seen == [1, -1, 2, -2, 1, -1]
    seen.clear()
    with OneAtATime(Place) as place:
        place.to(3)
        with pytest.raises(ValueError, match="7"):
            place.to(7)
        place.to(4)
    assert seen == [3, -3, 7, 4, -4]
