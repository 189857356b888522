"""Train an ODE network within a byte budget, and go on after an interruption.

From the root of the repository:

    python -m examples.train --data digits --budget 40% --epochs 4
    python -m examples.train --data cifar10 --data-root data --model squeezenext --batch 256 \\
        --method midpoint --epochs 350 --budget 512MiB --checkpoint runs/sqnxt.ckpt --resume

Optimizer and learning rates are those of the ANODE paper's training script: SGD with momentum
0.9 and weight decay 5e-4, a tenth of the rate after 3/7 and again after 5/7 of the epochs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import ckptsched as cs
from examples.data import Images, load_cifar, load_digits
from models import ode_resnet18, ode_resnet_small, ode_squeezenext23

MODELS: dict[str, Callable[..., nn.Sequential]] = {
    "resnet_small": ode_resnet_small,
    "resnet18": ode_resnet18,
    "squeezenext": ode_squeezenext23,
}
# What decides the weights: a run that goes on must agree with its beginning in these.
SETTINGS = ("data", "model", "method", "steps", "batch", "epochs", "lr", "seed", "limit")


def main(argv: Sequence[str] | None = None) -> float:
    """Train as the arguments say.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        Share of the held-out images that are told right, between 0 and 1.
    """
    args = _parse(argv)
    images = _load_images(args)
    train = DataLoader(images.train, args.batch, shuffle=True, drop_last=True)
    held_out = DataLoader(images.held_out, args.batch)
    training = Training.start(args, images)
    if args.resume:
        training.load(args.checkpoint)
    network = _within_budget(training, args, next(iter(train))[0])
    if training.epoch == 0:
        torch.manual_seed(args.seed)  # what planning drew does not change the run
    else:
        training.restore_random_state()
    accuracy = None
    last = min(args.epochs, args.stop_after or args.epochs)
    while training.epoch < last:
        start = time.perf_counter()
        loss = _train_epoch(network, training.optimizer, train, args.device)
        training.scheduler.step()
        training.epoch += 1
        accuracy = _evaluate(network, held_out, args.device)
        print(
            f"epoch {training.epoch}/{args.epochs}: training loss {loss:.4f}, held-out accuracy "
            f"{accuracy:.2%}, {time.perf_counter() - start:.1f} s",
            flush=True,
        )
        if args.checkpoint:
            training.save(args.checkpoint)
    if accuracy is None:  # there was nothing left to train
        accuracy = _evaluate(network, held_out, args.device)
    print(f"final held-out accuracy {accuracy:.2%} after {training.epoch} epochs")
    return accuracy


@dataclass
class Training:
    """All that must be kept to go on later as if nothing had happened."""

    settings: dict[str, Any]
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epoch: int = 0
    plan: dict[str, str] | None = None
    random_state: list[Tensor] | None = None

    @classmethod
    def start(cls, args: argparse.Namespace, images: Images) -> Training:
        """Make a new model from the seed."""
        torch.manual_seed(args.seed)
        model = MODELS[args.model](
            num_classes=images.num_classes,
            in_channels=images.in_channels,
            method=args.method,
            steps=args.steps,
        ).to(args.device)
        optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
        drops = [-(-args.epochs * sevenths // 7) for sevenths in (3, 5)]  # rounded up
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        settings = {name: getattr(args, name) for name in SETTINGS}
        return cls(settings, model, optimizer, scheduler)

    def save(self, path: Path) -> None:
        """Write the state so that the file is the old one or the new one, never half of one."""
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch,
            "plan": self.plan,
            "random_state": _random_state(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Take up the state that `save` wrote; stay at the start where there is none yet."""
        if not path.exists():
            print(f"no checkpoint at {path} yet: this is the first run")
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        other = [
            f"--{name} was {state['settings'][name]!r} and is {value!r} now"
            for name, value in self.settings.items()
            if state["settings"][name] != value
        ]
        if other:
            raise ValueError(
                f"{path} is of another run: {'; '.join(other)}; give the same arguments, or "
                "another --checkpoint"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.plan = state["epoch"], state["plan"]
        self.random_state = state["random_state"]
        print(f"going on after epoch {self.epoch} of {path}")

    def restore_random_state(self) -> None:
        """Continue the random numbers where `save` met them."""
        if self.random_state is not None:
            cpu, *gpus = self.random_state
            torch.set_rng_state(cpu)
            if gpus and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(gpus)


def _random_state() -> list[Tensor]:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *gpus]


def _within_budget(training: Training, args: argparse.Namespace, batch: Tensor) -> nn.Module:
    """The model as it is to be run: by a plan that fits the budget, or plainly for "none".

    The plan of the first run is used again where it still fits: another one computes the same,
    but may sum gradients in another order, and the weights would differ in their last digits.
    """
    model = training.model.train()
    if args.budget == "none":
        return model
    kept = training.plan
    if kept is not None and kept["budget"] == args.budget:
        try:
            return cs.checkpointed(model, cs.Plan.from_json(json.loads(kept["plan"])))
        except cs.PlanMismatchError as error:
            print(f"planning anew: {error}")
    plan = cs.plan(cs.profile(model, batch.to(args.device)), budget=args.budget)
    print(plan)
    training.plan = {"budget": args.budget, "plan": json.dumps(plan.to_json())}
    return cs.checkpointed(model, plan)


def _train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader[Any],
    device: torch.device,
) -> float:
    """One pass over the training images, in full batches only: a plan holds for its batch."""
    network.train()
    total = torch.zeros((), device=device)
    for images, labels in batches:
        loss = nn.functional.cross_entropy(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()  # no .item(): it would wait for the device in every step
    return total.item() / len(batches)


@torch.no_grad()
def _evaluate(network: nn.Module, batches: DataLoader[Any], device: torch.device) -> float:
    """Share of images told right; without gradients there is nothing to plan."""
    network.eval()
    right = seen = 0
    for images, labels in batches:
        right += (network(images.to(device)).argmax(1).cpu() == labels).sum().item()
        seen += len(labels)
    return right / seen


def _load_images(args: argparse.Namespace) -> Images:
    if args.data == "digits":
        images = load_digits()
    else:
        images = load_cifar(args.data_root, args.data, verify=not args.unverified)

    def limited(dataset: Dataset[Any]) -> Dataset[Any]:
        return Subset(dataset, range(min(args.limit or sys.maxsize, len(dataset))))

    images = Images(
        train=limited(images.train),
        held_out=limited(images.held_out),
        num_classes=images.num_classes,
        in_channels=images.in_channels,
    )
    if len(images.train) < args.batch:
        raise ValueError(
            f"--batch {args.batch} is more than the {len(images.train)} training images; "
            "only full batches are trained on, so give a smaller batch or a larger --limit"
        )
    return images


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--data", choices=("digits", "cifar10", "cifar100"), default="digits")
    add("--data-root", type=Path, default=Path("data"), help="folder that holds CIFAR's folder")
    add("--unverified", action="store_true", help="read CIFAR files with other checksums, too")
    add("--model", choices=tuple(MODELS), default="resnet_small")
    add("--method", default="rk4", help="euler, midpoint, heun or rk4")
    add("--steps", type=_positive, default=8, help="time steps of each ODE block")
    add("--budget", default="40%", help='such as "64MiB", "40%%" or "none" (plain autograd)')
    add("--batch", type=_positive, default=64, help="images a step")
    add("--epochs", type=_positive, default=5)
    add("--stop-after", type=_positive, help="stop early, after this epoch; --resume goes on")
    add("--lr", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, help="written after every epoch")
    add("--resume", action="store_true", help="go on from --checkpoint where there is one")
    add("--limit", type=_positive, help="use only so many images of each set")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    if args.checkpoint and args.checkpoint.exists() and not args.resume:
        parser.error(f"{args.checkpoint} exists; add --resume to go on, or give another path")
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


if __name__ == "__main__":
    try:
        main()
    except (cs.CkptschedError, OSError, ValueError) as problem:
        sys.exit(f"error: {problem}")
