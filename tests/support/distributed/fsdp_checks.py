"""What two processes check of FSDP2, on a whole model and block by block.

`tests/support/distributed/checks.py` calls this in processes that torchrun has started.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.simulator.simulator import simulate

Pair = tuple[nn.Module, nn.Module]
"""What is called, and what takes FSDP's settings."""

Mark = tuple[str, int]
WIDTH = 24
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
OUT = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
)


class Passing(torch.autograd.Function):
    """Notes when a backward passes a place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marks: list[Mark], k: int) -> Tensor:
        ctx.marks, ctx.k = marks, k
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.marks.append(("back", ctx.k))
        return grads[0], None, None


class Layer(nn.Module):
    """Random numbers, a shortcut, and a note when a backward comes through."""

    def __init__(self, k: int, marks: list[Mark], width: int = WIDTH) -> None:
        super().__init__()
        self.k, self.marks = k, marks
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.2)

    def extra_repr(self) -> str:
        return f"k={self.k}"

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(Passing.apply(self.a(x), self.marks, self.k))
        return x + self.dropout(self.b(inner))


def make(marks: list[Mark] | None = None) -> nn.Sequential:
    """Layers, an ODE block, and stages of a block that a stage of the next changes in place."""
    torch.manual_seed(0)
    marks = [] if marks is None else marks
    f = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(
        Layer(0, marks),
        cs.ODEBlock(f, "rk4", 2),
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)),
        nn.ReLU(inplace=True),
        Layer(4, marks),
        nn.Linear(WIDTH, WIDTH),
    )


def batch(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """The part of this process."""
    generator = torch.Generator().manual_seed(3 + dist.get_rank())
    return torch.randn(12, width, generator=generator), torch.randn(12, width, generator=generator)


def sent(plan: cs.Plan) -> cs.Plan:
    """The plan of the first process, for all."""
    texts = [plan.to_json()]
    dist.broadcast_object_list(texts)
    return cs.Plan.from_json(texts[0])


def rerun_all(chain: cs.Chain) -> cs.Plan:
    """A plan that keeps the input alone: each backward begins with runs of all earlier blocks."""
    n = len(chain)

    def runs(last: int) -> list[str]:
        words = []
        for i in range(1, last):
            words += [f"F{i}", *([f"-x{i - 1}"] if i > 1 else [])]
        return [*words, f"T{last}"]

    words = [*runs(n), "turn", f"B{n}", f"-x{n - 1}"]
    for i in range(n - 1, 0, -1):
        words += [*runs(i), f"B{i}", *([f"-x{i - 1}"] if i > 1 else [])]
    schedule = cs.Schedule.from_text(" ".join([*words, "-x0"]))
    trace = simulate(chain, schedule)
    plan = cs.plan(chain, budget=2**50, solver="store_all")
    return dataclasses.replace(
        plan, schedule=schedule, trace=trace, budget_bytes=trace.peak_bytes, solver="by hand"
    )


def shard_blocks(model: nn.Module, **options: Any) -> None:
    """Shard each block that has parameters."""
    for block in model.children():
        if list(block.parameters()):
            fully_shard(block, **options)


def plain(model: nn.Sequential, by: Callable[..., None] = shard_blocks, **options: Any) -> Pair:
    """FSDP2 alone."""
    by(model, **options)
    network = fully_shard(model, **options)
    return network, network


def plan_first(
    model: nn.Sequential, plan: cs.Plan, by: Callable[..., None] = shard_blocks, **options: Any
) -> Pair:
    """What follows the plan is sharded."""
    planned = cs.checkpointed(model, plan)
    by(model, **options)
    network = fully_shard(planned, **options)
    return network, network


def shard_first(
    model: nn.Sequential, plan: cs.Plan, by: Callable[..., None] = shard_blocks, **options: Any
) -> Pair:
    """What is sharded follows the plan."""
    by(model, **options)
    fully_shard(model, **options)
    return cs.checkpointed(model, plan), model


def train(pair: Pair, *, accumulate: bool = False) -> list[Tensor]:
    """Two steps: what they leave."""
    network, sharded = pair
    x, target = batch()
    torch.manual_seed(7 + dist.get_rank())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        if accumulate:
            sharded.set_requires_gradient_sync(False)  # type: ignore[operator]
            mse_loss(network(x.flip(0)).float(), target).backward()
            sharded.set_requires_gradient_sync(True)  # type: ignore[operator]
        output = network(x)
        mse_loss(output.float(), target).backward()
        optimizer.step()
    gradients = [shard(p.grad) for p in network.parameters() if p.grad is not None]
    assert len(gradients) == len(list(network.parameters()))
    return [output.detach(), *gradients, *map(shard, network.parameters()), torch.get_rng_state()]


def shard(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach().clone()


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True)
    )


def in_half(model: nn.Module) -> nn.Module:
    """What FSDP computes with under `HALF`: parameters cast, buffers as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


@functools.cache
def chain_of(model: nn.Module | None = None, *, half: bool = False) -> cs.Chain:
    """What the model costs, or another one."""
    x, _ = batch()
    model = make() if model is None else model
    return cs.profile(in_half(model), x.bfloat16()) if half else cs.profile(model, x)


def shard_parts(model: nn.Module, **options: Any) -> None:
    """Shard a right-hand side, a part of a layer, and two modules as one group."""
    children = list(model.children())
    fully_shard(children[1].f, **options)  # type: ignore[arg-type]
    fully_shard(children[4].a, **options)  # type: ignore[arg-type]
    fully_shard(children[4], **options)
    fully_shard([children[0], children[5]], **options)


def check_blocks() -> int:
    """Parameters, gradients, outputs and random states are those of FSDP2 alone."""
    plans = [sent(cs.plan(chain_of(), budget="100%")), sent(rerun_all(chain_of()))]
    half = [sent(rerun_all(chain_of(half=True)))]
    keep = {"reshard_after_forward": False}
    cases: list[tuple[list[cs.Plan], bool, dict[str, Any]]] = [
        (plans, False, {}),
        (plans[1:], True, {}),
        (plans[1:], True, keep),
        (plans[1:], False, {"by": shard_parts}),
        (half, True, {"mp_policy": HALF}),
        (half, False, {"mp_policy": OUT}),
    ]
    count = 0
    for followed, accumulate, options in cases:
        expected = train(plain(make(), **options), accumulate=accumulate)
        for plan in followed:
            for wrap in (plan_first, shard_first):
                found = train(wrap(make(), plan, **options), accumulate=accumulate)
                assert same(found, expected), (wrap.__name__, plan.solver, accumulate, options)
                count += 1
    return count


def check_one_process() -> int:
    """Gradients are those of a single process, up to the rounding of a mean."""
    x, target = batch()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    plan = sent(rerun_all(cs.profile(model, x)))
    outputs: list[Any] = [None, None]
    dist.all_gather_object(outputs, (x, target))
    for one, other in outputs:
        (mse_loss(model(one), other) / 2).backward()
    expected = [whole(p.grad) for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    network, _ = plan_first(model, plan)
    mse_loss(network(x), target).backward()
    found = [whole(p.grad) for p in network.parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)
    return 1


def check_order() -> int:
    """Each block's gradients are reduced before the backward of the block before it begins."""

    def events(marks: list[Mark], pair: Pair, model: nn.Sequential) -> list[Mark]:
        for k, block in enumerate(model):
            for parameter in block.parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda _, k=k: marks.append(("reduced", k))
                )
        x, target = batch()
        mse_loss(pair[0](x), target).backward()
        return list(marks)

    plan = sent(rerun_all(chain_of()))
    found = []
    for wrap in (plain, plan_first, shard_first):
        marks: list[Mark] = []
        model = make(marks)
        pair = plain(model) if wrap is plain else wrap(model, plan)  # type: ignore[arg-type]
        found.append(events(marks, pair, model))
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert found[0].index(("reduced", 5)) < found[0].index(("back", 4))
    assert found[0].index(("reduced", 1)) < found[0].index(("back", 0))
    return 1


def check_bytes() -> int:
    """A step holds the parameters of a few blocks at a time, whatever runs again."""
    width = 128
    x, target = batch(width)
    torch.manual_seed(0)

    def layers() -> nn.Sequential:
        return nn.Sequential(*(Layer(k, [], width) for k in range(8)))

    plan = sent(rerun_all(cs.profile(layers(), x)))

    def peak(network: nn.Module) -> int:
        def step() -> None:
            mse_loss(network(x), target).backward()

        peaks = []
        for _ in range(2):
            network.zero_grad()
            peaks.append(default_meter("cpu").measure(step)[1].peak_bytes)
        return max(peaks)

    found = peak(plan_first(layers(), plan)[0])
    largest = sum(p.nbytes for p in layers()[0].parameters())
    # The one that goes back, the next one, and one that runs again; twice while it is gathered.
    # What is reduced takes less than the gradients that the plan counts for it.
    assert found <= plan.peak_bytes + 5 * largest, (found, plan.peak_bytes, largest)
    at_once = peak(fully_shard(cs.checkpointed(layers(), plan)))
    assert found < at_once - 5 * largest, (found, at_once)
    return 1


def check_failures() -> int:
    """What cannot be right is an error, and a step that failed can be tried again."""
    x, target = batch()
    plan, half = (sent(rerun_all(chain_of(half=half))) for half in (False, True))
    network, _ = plan_first(make(), plan)
    with (
        pytest.warns(UserWarning, match="create_graph"),
        pytest.raises(cs.ExecutionError, match="create_graph"),
    ):
        network(x).sum().backward(create_graph=True)
    network, _ = plan_first(make(), plan)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    mse_loss(network(x), target).backward()
    output = network(x)
    optimizer.step()
    with pytest.raises(cs.ExecutionError, match=r"shard of parameter '0\.a\.weight'"):
        output.sum().backward()
    with pytest.raises(cs.ProfileError, match="fully_shard"):
        cs.profile(plain(make())[0], x)
    network, _ = shard_first(make(), plan)
    with pytest.raises(cs.PlanMismatchError, match="shard one of them"):
        fully_shard(network)(x)
    mixtures: list[tuple[cs.Plan, Tensor, dict[str, Any], str]] = [
        (plan, x, {"mp_policy": HALF}, "block number 1 takes from torch.float32"),
        (plan, x, {"mp_policy": dataclasses.replace(HALF, cast_forward_inputs=False)}, "gathered"),
        (half, x.bfloat16(), {}, "parameters of torch.bfloat16"),
    ]
    for followed, given, options, message in mixtures:
        model = make()
        planned = cs.checkpointed(model, followed)
        fully_shard(model[1], **options)
        with pytest.raises(cs.PlanMismatchError, match=message):
            fully_shard(planned)(given)
    return 4 + len(mixtures)


def check_hooks_and_faults() -> int:
    """A user's own hooks go on working on a sharded block, and a failed step leaves no trace."""
    x, target = batch()
    calls: list[int] = []
    faults = [False]

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        if faults[0] and len(calls) == 2:  # as it runs again
            raise ValueError("a fault")
        return output * 2

    def hooked() -> nn.Sequential:
        model = make()
        model[4].register_forward_hook(hook)
        return model

    plan = sent(rerun_all(chain_of(hooked())))
    calls.clear()
    expected = train(plain(hooked()))
    once = len(calls)
    calls.clear()
    pair = plan_first(hooked(), plan)
    reset = getattr(pair[0], "reset_iter_state", None)
    if reset is not None:  # torch 2.13 has it
        faults[0] = True
        with pytest.raises(ValueError, match="a fault"):
            mse_loss(pair[0](x), target).backward()
        reset()
        faults[0] = False
    calls.clear()
    assert same(train(pair), expected)
    assert len(calls) == 2 * once  # each run again fires it once more
    return 1


def check_fsdp() -> int:
    """All of these."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", cs.TimingWarning)  # verdicts depend on no clock
        return (
            check_blocks()
            + check_one_process()
            + check_order()
            + check_bytes()
            + check_failures()
            + check_hooks_and_faults()
        )
