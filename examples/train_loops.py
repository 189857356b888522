"""Train a vision transformer within a byte budget in loops of the shape of well-known scripts.

From the root of the repository:

    python -m examples.train_loops
    python -m examples.train_loops --loop timm

Written by hand after the order of things in torchvision's reference scripts, and in timm's: what
comes between the model and the loop differs (a criterion outside of the model, clipped gradients, a
scheduler, an average of the weights, labels that are mixed), what fits the model does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.models import VisionTransformer

import ckptsched as cs
from examples.data import load_digits
from examples.planned_step import show

SIZE = 16


@dataclass
class Outcome:
    """What a training came to."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    verification: cs.Verification | None = None


def train_as_torchvision(
    model: nn.Module, batches: Iterable[Any], epochs: int, criterion: nn.Module
) -> list[float]:
    """Label smoothing in the criterion, clipped gradients, an average of the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    average = torch.optim.swa_utils.AveragedModel(model)
    losses = []
    for _ in range(epochs):
        model.train()
        for images, target in batches:
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            losses.append(loss.item())
        scheduler.step()
    return losses


def train_as_timm(
    model: nn.Module, batches: Iterable[Any], epochs: int, criterion: nn.Module
) -> list[float]:
    """Images and labels that are mixed with those of the batch backwards, under autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    losses = []
    for _ in range(epochs):
        model.train()
        for images, target in batches:
            mixed, soft = _mix(images, target)
            with torch.autocast("cpu", torch.bfloat16):
                loss = criterion(model(mixed), soft)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def _mix(images: Tensor, target: Tensor, share: float = 0.8) -> tuple[Tensor, Tensor]:
    labels = nn.functional.one_hot(target, 10).float()
    return (
        share * images + (1 - share) * images.flip(0),
        share * labels + (1 - share) * labels.flip(0),
    )


LOOPS = {"torchvision": train_as_torchvision, "timm": train_as_timm}


def main(argv: Sequence[str] | None = None) -> Outcome:
    """Train as the arguments say.

    Args:
        argv: Arguments as on the command line; None takes those of the process.
    """
    args = _parse(argv)
    torch.manual_seed(args.seed)
    model = VisionTransformer(
        image_size=SIZE,
        patch_size=4,
        num_layers=args.layers,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        dropout=0.1,
        num_classes=10,
    )
    images = Subset(load_digits(SIZE).train, range(args.limit))
    batches: DataLoader[Any] = DataLoader(images, args.batch, collate_fn=_in_colour)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    # The one line: "none" trains the model as it is.
    if args.budget != "none":
        cs.fit(model, budget=args.budget)

    outcome = Outcome(model, LOOPS[args.loop](model, batches, args.epochs, criterion))
    if args.budget != "none":
        x, target = next(iter(batches))
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=args.loop == "timm", cache_enabled=False
        ):
            outcome.verification = show(
                model, cs.plan_of(model), x, loss=lambda y: criterion(y, target)
            )
    print(f"loss {outcome.losses[0]:.4f} at first, {outcome.losses[-1]:.4f} at last")
    return outcome


def _in_colour(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, target = zip(*rows, strict=True)
    return torch.stack(images).expand(-1, 3, -1, -1).contiguous(), torch.stack(target)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.train_loops")
    add = parser.add_argument
    add("--loop", choices=sorted(LOOPS), default="torchvision")
    add("--budget", default="60%", help='such as "2MiB", "60%%" (the default) or "none"')
    add("--layers", type=int, default=4)
    add("--batch", type=int, default=64)
    add("--epochs", type=int, default=2)
    add("--limit", type=int, default=400, help="use only so many images; the last batch is smaller")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
