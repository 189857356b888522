"""Train an ODE network on several processes, each within a byte budget.

From the root of the repository:

    torchrun --nproc-per-node 2 -m examples.train_distributed --budget 40%
    torchrun --nproc-per-node 2 -m examples.train_distributed --budget 8MiB --fsdp
    torchrun --nproc-per-node 2 -m examples.train_distributed --budget 8MiB --fsdp-blocks

The model is made to follow its plan first, and DistributedDataParallel or FSDP2 then wraps it as
any other: FSDP2 as a whole, or block by block, so that each process holds the parameters of a few
blocks at a time. The plan is made once and sent to all: two processes that measure for themselves
may plan differently, and would then wait for each other where a stage communicates.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from examples.data import load_digits
from models import ode_resnet_small


@dataclass(frozen=True)
class Result:
    """What one process found."""

    measured_peak_bytes: int
    """Of the step that took most, the engine's buffers included."""
    gradient_difference: float
    """Largest absolute difference of a gradient from that of a single process."""


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Train as the arguments say, in a process that torchrun has started.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        What each process found, by rank.
    """
    args = _parse(argv)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        return _train(args)
    finally:
        dist.destroy_process_group()


def _train(args: argparse.Namespace) -> list[Result]:
    rank, size, device = dist.get_rank(), dist.get_world_size(), _device()
    torch.manual_seed(args.seed)
    model = ode_resnet_small(method=args.method, steps=args.steps).to(device)
    x, labels = (part.to(device) for part in load_digits().train.tensors)  # type: ignore[attr-defined]
    if len(x) < args.batch * size:
        raise ValueError(f"{size} batches of {args.batch} are more than the {len(x)} images")
    engine = "FSDP2 block by block" if args.fsdp_blocks else "FSDP2" if args.fsdp else "DDP"
    engine_bytes = _engine_bytes(model, engine)
    limit, plan = _plan_together(model, x[: args.batch], args.budget, engine_bytes)

    planned = cs.checkpointed(copy.deepcopy(model), plan)
    network = _wrap(planned, engine)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9)
    peak, difference, losses = 0, 0.0, []
    for number in range(args.training_steps):
        # The same images in the same order for all; each process takes every size-th of them.
        shuffled = torch.Generator().manual_seed(args.seed + number)
        chosen = torch.randperm(len(x), generator=shuffled)[: args.batch * size].to(device)
        mine = chosen[rank::size]

        def step(x: Tensor = x[mine], labels: Tensor = labels[mine]) -> float:
            loss = cross_entropy(network(x), labels)
            loss.backward()
            return loss.item()

        optimizer.zero_grad()
        loss, measured = default_meter(device).measure(step)
        peak = max(peak, measured.peak_bytes)
        losses.append(loss)
        if number == 0:
            parts = [(x[chosen[k::size]], labels[chosen[k::size]]) for k in range(size)]
            difference = _compare(network, _gradients_of_one_process(model, parts))
        optimizer.step()
        if rank == 0:
            print(f"step {number + 1}: loss {loss:.4f}", flush=True)
    return _report(Result(peak, difference), limit, plan, engine, losses)


def _engine_bytes(model: nn.Module, engine: str) -> int:
    """What the engine allocates within a step: part of the budget, and not the plan's to spend.

    DDP makes its buckets anew, once, in the second step. FSDP gathers parameters, and has buffers
    for what it sends and receives: of all blocks, or of a few at a time.
    """
    sizes = [sum(p.nbytes for p in block.parameters()) for block in model.children()]
    return {"DDP": sum(sizes), "FSDP2": 2 * sum(sizes)}.get(engine, 5 * max(sizes))


def _wrap(planned: cs.Checkpointed, engine: str) -> nn.Module:
    """Let the engine train what follows the plan."""
    if engine == "DDP":
        return DistributedDataParallel(planned)
    if engine == "FSDP2 block by block":
        for block in planned.model.children():
            if any(True for _ in block.parameters()):
                fully_shard(block)
    network: nn.Module = fully_shard(planned)
    return network


def _plan_together(
    model: nn.Module, sample: Tensor, budget: str, engine_bytes: int
) -> tuple[int, cs.Plan]:
    """The bytes that a step may take, and a plan that leaves the engine its share of them."""
    sent: list[object] = [None, None]
    if dist.get_rank() == 0:
        chain = cs.profile(model, sample)
        need = cs.plan(chain, budget="100%").store_all_bytes + engine_bytes
        limit = cs.parse_budget(budget).resolve(need)
        try:
            plan = cs.plan(chain, budget=cs.Budget(bytes=limit, reserved_bytes=engine_bytes))
        except cs.CkptschedError as error:
            sent = [limit, error]
        else:
            print(plan, flush=True)
            sent = [limit, plan.to_json()]
    dist.broadcast_object_list(sent)
    limit, found = sent
    assert isinstance(limit, int)
    if isinstance(found, cs.CkptschedError):
        raise found
    return limit, cs.Plan.from_json(found)


def _gradients_of_one_process(
    model: nn.Module, parts: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """The mean over the parts by plain autograd, which is what several processes compute."""
    model.zero_grad()
    for x, labels in parts:
        (cross_entropy(model(x), labels) / len(parts)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _compare(network: nn.Module, expected: Sequence[Tensor]) -> float:
    """Largest absolute difference of a gradient."""
    found = [p.grad for p in network.parameters() if p.grad is not None]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in found]
    return max((a - b).abs().max().item() for a, b in zip(whole, expected, strict=True))


def _report(
    mine: Result, limit: int, plan: cs.Plan, engine: str, losses: Sequence[float]
) -> list[Result]:
    """Tell what all processes found, and fail where one broke a promise."""
    results: list[Result] = [mine] * dist.get_world_size()
    dist.all_gather_object(results, mine)
    if dist.get_rank() == 0:
        print(f"{engine} on {len(results)} processes, budget {limit:,} bytes each")
        for rank, result in enumerate(results):
            print(
                f"rank {rank}: projected peak {plan.peak_bytes:,} bytes without {engine}, measured "
                f"{result.measured_peak_bytes:,} with it; largest gradient difference from a "
                f"single process {result.gradient_difference:g}"
            )
        print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last", flush=True)
    for rank, result in enumerate(results):
        if result.measured_peak_bytes > limit or not result.gradient_difference < 1e-5:
            raise SystemExit(f"rank {rank} broke a promise: {result}, budget {limit:,} bytes")
    return results


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m examples.train_distributed",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    add = parser.add_argument
    add("--fsdp", action="store_true", help="shard with FSDP2 instead of DDP")
    add("--fsdp-blocks", action="store_true", help="the same, each block by itself")
    add("--budget", default="40%", help='of each process, such as "8MiB" or "40%%" (the default)')
    add("--method", default="rk4", help="euler, midpoint, heun or rk4")
    add("--steps", type=int, default=8, help="time steps of each ODE block")
    add("--batch", type=int, default=32, help="images a step and process")
    add("--training-steps", type=int, default=20)
    add("--lr", type=float, default=0.1)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main()
    except (cs.CkptschedError, ValueError) as problem:
        sys.exit(f"error: {problem}")
