"""The main job on real input: train an ODE network on digits within a byte budget.

From the root of the repository: python -m examples.demo

It measures the network, shows what memory costs in time, plans for a budget well below what
storing everything needs, checks one step against plain autograd, and trains. The peak of real
training steps is measured while it trains.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from examples.data import Images, load_digits
from models import ode_resnet_small


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    batch: int
    epochs: int
    images: int | None
    budgets: int
    rounds: int


FULL = Size(batch=64, epochs=5, images=None, budgets=6, rounds=5)
SMALL = Size(batch=16, epochs=1, images=64, budgets=3, rounds=1)


def main(argv: Sequence[str] | None = None) -> float:
    """Run the demo.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        Share of the held-out digits that are told right, between 0 and 1.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="only show that it runs")
    parser.add_argument("--budget", default="20%", help='such as "48MiB" or "20%%" (the default)')
    args = parser.parse_args(argv)
    size = SMALL if args.small else FULL
    began = time.perf_counter()
    torch.manual_seed(0)
    images = load_digits()
    model = ode_resnet_small(method="rk4", steps=8)
    x, labels = next(iter(DataLoader(images.train, size.batch)))

    def loss(output: Tensor) -> Tensor:
        return functional.cross_entropy(output, labels)

    heading("1. The network, stage by stage measured")
    chain = cs.profile(model, x, loss=loss)
    blocks = sum(block.last > block.first for block in chain.blocks)
    print(f"{len(chain)} stages, {blocks} ODE blocks of 8 RK4 steps, batch {size.batch} of 32x32")

    heading("2. What memory costs in time")
    print(cs.tradeoff(chain, budgets=size.budgets))

    heading(f"3. A plan for a budget of {args.budget}")
    plan = cs.plan(chain, budget=args.budget)
    print(plan)

    heading("4. One step by the plan, and the same step by plain autograd")
    print(cs.verify(model, plan, x, loss=loss, rounds=size.rounds))

    heading("5. Training within the budget")
    network = cs.checkpointed(model, plan)
    peaks = train(network, images, size)
    accuracy = evaluate(network, images)

    heading("Summary")
    verified = cs.verify(model, plan, x, loss=loss, rounds=size.rounds)
    plain = verified.plain_peak_bytes
    lines = [
        ("budget", f"{mib(plan.budget_bytes, budget=True)}, asked for as {args.budget}"),
        ("plain autograd's peak", mib(plain)),
        ("projected peak", mib(plan.peak_bytes)),
        ("measured peak in training", f"{mib(max(peaks))} ({len(peaks)} steps measured)"),
        ("within the budget", "yes" if max(peaks) <= plan.budget_bytes else "NO"),
        ("overhead", f"{plan.overhead:+.1%} projected, {slower(verified):+.1%} measured"),
        ("largest gradient difference", f"{verified.max_gradient_difference:g}"),
        ("held-out accuracy", f"{accuracy:.1%} after {size.epochs} epochs"),
        ("demo took", f"{time.perf_counter() - began:.0f} s"),
    ]
    for name, value in lines:
        print(f"{name:<28} {value}")
    if max(peaks) > plan.budget_bytes or not verified.ok:
        raise SystemExit("the demo broke a promise: see the summary")
    if not args.small and accuracy < 0.9:
        raise SystemExit(f"the network did not learn: {accuracy:.1%} of the held-out digits")
    return accuracy


def heading(text: str) -> None:
    """Print a line that stands out."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def mib(size: int, *, budget: bool = False) -> str:
    """Bytes, exactly and for people."""
    return f"{size:,} bytes ({cs.format_bytes(size, budget=budget)})"


def slower(verified: cs.Verification) -> float:
    """How much longer the planned step took than plain autograd, as a share."""
    return verified.seconds / verified.plain_seconds - 1 if verified.plain_seconds else float("nan")


def train(network: nn.Module, images: Images, size: Size) -> list[int]:
    """Train, and measure the peak of the first and last step of each epoch, in bytes."""
    torch.manual_seed(0)
    data = images.train
    if size.images is not None:
        data = torch.utils.data.Subset(data, range(size.images))
    loader = DataLoader(data, size.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.epochs * len(loader))
    peaks = []
    for epoch in range(1, size.epochs + 1):
        start, losses = time.perf_counter(), []
        network.train()
        for number, (x, labels) in enumerate(loader, 1):
            optimizer.zero_grad()

            def step(x: Tensor = x, labels: Tensor = labels) -> float:
                loss = functional.cross_entropy(network(x), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss.item()

            if number in (1, len(loader)):
                value, measured = default_meter(x.device).measure(step)
                peaks.append(measured.peak_bytes)
            else:
                value = step()
            losses.append(value)
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - start
        mean = statistics.fmean(losses)
        print(f"epoch {epoch}: training loss {mean:.4f}, {seconds:.1f} s", flush=True)
    return peaks


@torch.no_grad()
def evaluate(network: nn.Module, images: Images) -> float:
    """Share of the held-out digits that are told right."""
    network.eval()
    right = total = 0
    for x, labels in DataLoader(images.held_out, 128):
        right += int((network(x).argmax(1) == labels).sum())
        total += len(labels)
    network.train()
    return right / total


if __name__ == "__main__":
    main()
