"""What two processes check of DDP or FSDP2: `executor/test_distributed.py` starts them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.recompute.tape_contents import SHOWS_WHAT_IS_SAVED
from tests.support.distributed.fsdp_checks import check_fsdp
from tests.support.lean_tapes import lean_runs, preferring_lean_tapes
from tests.support.networks import ode_net

Events = list[tuple[Any, ...]]
BUCKET_MB = 0.004  # several buckets for a small model


class WithUnused(nn.Module):
    """A model with a parameter that no step uses."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def make(*, dropout: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = ode_net()[0]
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(*model, nn.Dropout(0.2)) if dropout else model


def batch() -> tuple[Tensor, Tensor]:
    """The part of this process."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (8,), generator=generator)
    rank = dist.get_rank()
    return x[rank::2].contiguous(), labels[rank::2]


def plan_together(model: nn.Module) -> cs.Plan:
    """One plan for all: what each process measures differs."""
    x, labels = batch()
    chain = cs.profile(model, x, loss=lambda y: cross_entropy(y, labels))
    sent = [cs.plan(chain, budget="45%").to_json()]
    dist.broadcast_object_list(sent)
    plan = cs.Plan.from_json(sent[0])
    assert plan.overhead > 0  # something runs again
    return plan


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def train(
    network: nn.Module, *, accumulate: bool = False, events: Events | None = None
) -> tuple[list[Tensor], list[int]]:
    """Three steps: what they leave, and the peak of each."""
    x, labels = batch()
    torch.manual_seed(7 + dist.get_rank())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    peaks = []
    for _ in range(3):
        if events is not None:
            events.append(("step",))
        optimizer.zero_grad()
        if accumulate:
            with network.no_sync():  # type: ignore[operator]
                cross_entropy(network(x.flip(0)), labels).backward()

        def step() -> None:
            cross_entropy(network(x), labels).backward()

        peaks.append(default_meter("cpu").measure(step)[1].peak_bytes)
        optimizer.step()
    gradients = [whole(p.grad) for p in network.parameters() if p.grad is not None]
    parameters = [whole(p) for p in network.parameters()]
    return [*parameters, *gradients, *map(whole, network.buffers()), torch.get_rng_state()], peaks


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) for a, b in zip(some, others, strict=True)
    )


def reduced(network: DistributedDataParallel, events: Events) -> None:
    """Note when a gradient has come and when a bucket is sent."""

    def hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        events.append(("bucket", bucket.index()))
        return allreduce_hook(group, bucket)

    network.register_comm_hook(None, hook)
    for name, parameter in network.named_parameters():
        block = name.removeprefix("module.").split(".")[0]
        parameter.register_post_accumulate_grad_hook(
            lambda _, block=block: events.append(("gradient", block))
        )


def ddp_cases() -> dict[str, dict[str, Any]]:
    return {
        "default": {},
        "static graph": {"static_graph": True},
        "views of buckets": {"gradient_as_bucket_view": True},
        "unused": {"find_unused_parameters": True},
        "accumulated": {"accumulate": True},
        "dropout": {"dropout": True},
    }


def check_ddp() -> int:
    """Parameters, gradients, statistics, order and bytes are those of DDP alone."""
    plans = {dropout: plan_together(make(dropout=dropout)) for dropout in (False, True)}
    for name, options in ddp_cases().items():
        accumulate, dropout = options.pop("accumulate", False), options.pop("dropout", False)
        plan = plans[dropout]

        def run(
            wrap: Callable[[nn.Module], nn.Module],
            name: str = name,
            options: dict[str, Any] = options,
            accumulate: bool = accumulate,
            dropout: bool = dropout,
        ) -> tuple[list[Tensor], list[int], Events]:
            events: Events = []
            network = wrap(make(dropout=dropout))
            if name == "unused":
                network = WithUnused(network)
            ddp = DistributedDataParallel(network, bucket_cap_mb=BUCKET_MB, **options)
            reduced(ddp, events)
            return *train(ddp, accumulate=accumulate, events=events), events

        plain, plain_peaks, plain_events = run(lambda model: model)
        found, peaks, events = run(lambda model, plan=plan: cs.checkpointed(model, plan))
        assert same(found, plain), name
        check_order(events, plain_events, name)
        check_peaks(peaks, plain_peaks, plan, name)
    return len(ddp_cases())


def check_order(events: Events, plain: Events, name: str) -> None:
    """Each bucket is sent in the same block of the backward as without a plan."""

    def sent(found: Events) -> list[tuple[Any, ...]]:
        block, places = "", []
        for kind, *what in found:
            if kind == "gradient":
                block = what[0]
            elif kind == "bucket":
                places.append((what[0], block))
        return places

    assert sent(events) == sent(plain), (name, events, plain)
    last = [k for k, event in enumerate(events) if event[0] == "step"][-1]
    kinds = [event[0] for event in events[last:]]
    # The first bucket of a step is on its way while most gradients are still to come.
    assert kinds.count("bucket") >= 3, name
    assert kinds[kinds.index("bucket") :].count("gradient") >= 5, name


def check_peaks(peaks: list[int], plain: list[int], plan: cs.Plan, name: str) -> None:
    """The plan's bytes, and beside them what DDP takes with and without a plan."""
    engine = sum(p.nbytes for p in make().parameters())
    for peak in peaks:
        assert peak <= plan.budget_bytes + engine, (name, peak, plan.budget_bytes, engine)
    if name in ("default", "static graph", "views of buckets"):
        assert min(peaks) <= plan.peak_bytes, (name, peaks, plan.peak_bytes)
    assert max(peaks) < min(plain), (name, peaks, plain)


def check_fsdp_of_the_whole() -> int:
    """The same for FSDP2 on the whole model."""
    model = make()
    plan = plan_together(model)
    plain, plain_peaks = train(fully_shard(make()))
    found, peaks = train(fully_shard(cs.checkpointed(make(), plan)))
    assert same(found, plain)
    engine = sum(p.nbytes for p in model.parameters())
    assert max(peaks) <= plan.budget_bytes + 2 * engine, (peaks, plan.budget_bytes)
    assert max(peaks) < min(plain_peaks)
    return 1


class Skipping(nn.Module):
    """The same layers with a skip connection around each of equal width: it is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = make(dropout=True)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            y = part(x)
            x = x + y if x.shape == y.shape else y
        return x


def check_in_place() -> int:
    """Models that are fitted in place, then wrapped: a chain, and one that is recorded."""
    count = 0
    for build in (make, Skipping):
        for wrap in (DistributedDataParallel, fully_shard):
            torch.manual_seed(0)
            model = build()
            plain = train(wrap(copy.deepcopy(model)))[0]
            plan = cs.plan(model, batch()[0], budget="100%")
            room = plan.store_all_bytes - plan.least_budget_bytes
            cs.fit(model, batch()[0], budget=plan.least_budget_bytes + room // 2)
            assert same(train(wrap(model))[0], plain), (build, wrap)
            count += 1
    return count


class Normed(nn.Module):
    """Norms and activations between convolutions, which lean tapes leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.again = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.nn.functional.gelu(self.norm(self.first(x))))
        out: Tensor = self.last(torch.nn.functional.silu(self.again(y)).mean((2, 3)))
        return out


def check_lean_tapes() -> int:
    """Stages that make values again in their backward, of a model that is wrapped."""
    torch.manual_seed(0)
    model, (x, labels) = Normed(), batch()
    captured = cs.captured(model, x, cuts="dear")
    chain = cs.profile(
        captured,
        captured.take(x),
        loss=lambda y: cross_entropy(captured.give(y), labels),
    )
    plans = [cs.plan(preferring_lean_tapes(chain), budget="100%").to_json()]
    dist.broadcast_object_list(plans)
    plan = cs.Plan.from_json(plans[0])
    assert lean_runs(plan) > 0
    for wrap in (DistributedDataParallel, fully_shard):
        plain = train(wrap(copy.deepcopy(model)))[0]
        found, peaks = train(wrap(cs.checkpointed(copy.deepcopy(model), plan)))
        assert same(found, plain), wrap
        engine = sum(p.nbytes for p in model.parameters())
        assert max(peaks[1:]) <= plan.peak_bytes + 4 * engine, (peaks, plan.peak_bytes)
    return 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    count = check_ddp() + check_fsdp_of_the_whole() + check_fsdp() + check_in_place()
    count += check_lean_tapes() if SHOWS_WHAT_IS_SAVED else 0  # without it stages offer none
    if dist.get_rank() == 0:
        print(f"checked {count} cases")
    dist.destroy_process_group()
