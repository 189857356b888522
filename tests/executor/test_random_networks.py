"""Laws: random networks by random schedules give plain autograd's bits, in the bytes projected.

The networks pass on tensors alone, tuples and dicts, tensors that share storages, integers and
`None`; the schedules are any valid ones.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.recompute.stateful_buffers import own_generators
from ckptsched.simulator.simulator import simulate
from ckptsched.tensors.pytree import State
from tests.support.random_modules import modules
from tests.support.random_schedules import schedules


def loss(output: Any) -> Tensor:
    """Of all that carries a gradient."""
    parts = [x.square().sum() for x in State.of(output).leaves if x.requires_grad]
    return torch.stack(parts).sum()


def step(net: nn.Module, x: Tensor, extras: dict[str, Any]) -> tuple[list[Tensor | None], int]:
    """All that a step changes, and its peak in bytes."""
    tensors = [x, *(t for t in extras.values() if isinstance(t, Tensor)), *net.parameters()]
    for tensor in tensors:
        tensor.grad = None
    torch.manual_seed(7)

    def run() -> Tensor:
        output = net(x, **extras)  # held to the end, as a training loop does
        value = loss(output)
        value.backward()
        del output
        return value.detach()

    value, measured = default_meter("cpu").measure(run)
    found = [value, torch.get_rng_state(), *(t.grad for t in tensors)]
    own = (g.get_state() for g in own_generators(net.modules()))
    return [*found, *(b.clone() for b in net.buffers()), *own], measured.peak_bytes


def plan_by(chain: cs.Chain, schedule: cs.Schedule) -> cs.Plan:
    """A plan with this schedule, whose budget is just its peak."""
    plan = cs.plan(chain, budget=2**50, solver="store_all")
    trace = simulate(chain, schedule)
    return dataclasses.replace(
        plan, schedule=schedule, trace=trace, budget_bytes=trace.peak_bytes, solver="drawn"
    )


@settings(
    max_examples=60,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(modules(), st.data())
def test_random_networks_by_random_schedules_equal_plain_autograd(
    made: tuple[nn.Module, Tensor, dict[str, Any]], data: st.DataObject
) -> None:
    model, x, extras = made
    twin = copy.deepcopy(model)
    chain = cs.profile(model, x, kwargs=extras, loss=loss)
    expected, _ = step(twin, x, extras)
    known: Any = None  # what steps find out, which lets later ones share tapes
    # Counters of BatchNorm, 8 bytes each, and hidden buffers are cloned, and no tape saves them.
    norms = sum(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    slack = 8 * norms + sum(block.hidden_bytes for block in chain.blocks)
    for _ in range(2):
        schedule = data.draw(schedules(len(chain)))
        plan = plan_by(chain, schedule)
        for check in ("outputs", "glance"):
            net = cs.checkpointed(copy.deepcopy(model), plan, check=check)
            known = net.calls.prepared.usage = known or net.calls.prepared.usage  # type: ignore[union-attr]
            found, peak = step(net, x, extras)
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert (a is None) == (b is None)
                assert a is None or b is None or torch.equal(a, b)
            if check == "outputs":  # which copies some
                continue
            assert peak <= plan.peak_bytes
            # The ledger charges what is run again for frozen stages at the front; it is left out.
            assert not x.requires_grad or peak >= plan.peak_bytes - slack
        assert cs.Chain.from_json(chain.to_json()) == chain
