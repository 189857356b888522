"""Experiment (e): training with the gradient of the discrete steps, and with backsolve's.

From the root of the repository:

    python -m examples.anode.training --plot training.png
    python -m examples.anode.training --full --data cifar10 --data-root data --networks squeezenext

Euler, RK2 and adaptive RK45 (dopri5). ANODE's gradient is that of a plan by its schedule, or for
steps that adapt that of `odeint`; backsolve solves the adjoint equation backwards, as Chen et al.
do. Both start from the same weights and see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

import ckptsched as cs
from ckptsched.base.errors import IntegrationError
from examples.anode.budgets import least_bytes
from examples.anode.display import new_figure, save, table
from examples.data import Images, load_cifar, load_digits
from models import ode_resnet18, ode_resnet_small, ode_squeezenext23

METHODS = {"euler": "Euler", "midpoint": "RK2", "dopri5": "RK45"}
GRADIENTS = ("ANODE", "backsolve")
TOLERANCE = 1e-3
MOST_STEPS = 500
"""Attempts of an adaptive solve; backward solves that blow up would never end."""


@dataclass(frozen=True)
class Network:
    """What is trained, and how."""

    make: Callable[..., nn.Sequential]
    steps: int
    pixels: int
    epochs: int
    rate: float
    batch: int = 64


def fully_connected(num_classes: int, in_channels: int, method: str, steps: int) -> nn.Sequential:
    """z' = ReLU(W z) on the 64 pixels of a digit, W Gaussian of deviation 1: hard to reverse."""
    w = nn.Linear(64 * in_channels, 64 * in_channels, bias=False)
    nn.init.normal_(w.weight)
    block = cs.ODEBlock(nn.Sequential(w, nn.ReLU()), method=method, steps=steps)
    norm = nn.LayerNorm(64 * in_channels)
    return nn.Sequential(nn.Flatten(), block, norm, nn.Linear(64 * in_channels, num_classes))


def narrow_resnet(**how: Any) -> nn.Sequential:
    """ODE ResNet-18 with an eighth of the channels, or less."""
    return ode_resnet_small(widths=(8, 8, 16, 16), **how)


def plain_squeezenext(**how: Any) -> nn.Sequential:
    """ODE SqueezeNext-23 without batch normalisation in its ODE blocks: their f may grow."""
    model = ode_squeezenext23(**how)
    for layer in model:
        if isinstance(layer, cs.ODEBlock) and isinstance(layer.f, nn.Module):
            for part in [*layer.f.modules()]:
                for name, child in part.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(part, name, nn.Identity())
    return model


HERE = {
    "fc": Network(fully_connected, steps=5, pixels=8, epochs=8, rate=0.05),
    "resnet": Network(narrow_resnet, steps=2, pixels=16, epochs=4, rate=0.1),
    "squeezenext": Network(ode_squeezenext23, steps=2, pixels=8, epochs=4, rate=0.1),
    "plain": Network(plain_squeezenext, steps=2, pixels=8, epochs=10, rate=0.1),
}
FULL = {
    "fc": Network(fully_connected, steps=5, pixels=8, epochs=8, rate=0.05),
    "resnet": Network(ode_resnet18, steps=2, pixels=32, epochs=350, rate=0.1, batch=256),
    "squeezenext": Network(ode_squeezenext23, steps=2, pixels=32, epochs=350, rate=0.1, batch=256),
    "plain": Network(plain_squeezenext, steps=2, pixels=32, epochs=350, rate=0.1, batch=256),
}


@dataclass
class Run:
    """The curves of one network, method and gradient."""

    losses: list[float] = field(default_factory=list)
    """Mean over the training images of each epoch; NaN at the end where it diverged."""
    accuracies: list[float] = field(default_factory=list)
    """Share of the held-out images told right after each epoch."""
    stopped: str = ""
    """Why it ended early; empty where it did not."""
    errors: list[tuple[float, float]] = field(default_factory=list)
    """Before each epoch of a run with ANODE's gradient: how far backsolve's is off at its weights,
    as a relative error and a cosine; infinite and NaN where it has none."""


def main(argv: Sequence[str] | None = None) -> dict[tuple[str, str, str], Run]:
    """Run the experiment, print its table, and draw its figure.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        The runs by network, method and gradient.
    """
    args = _parse(argv)
    networks = FULL if args.full else HERE
    runs = {}
    for name in args.networks:
        network = networks[name]
        images = _load(args, name, network.pixels)
        for method in args.methods:
            for gradient in GRADIENTS:
                epochs = args.epochs or network.epochs
                run = train(network, images, method, gradient, epochs, args)
                runs[name, method, gradient] = run
                print(_line(name, method, gradient, run), flush=True)
    print()
    show(runs)
    if args.plot:
        draw(runs, args.plot)
    return runs


class RightHandSide(nn.Module):
    """A network of the state as a function of time and state."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Leave out the time."""
        return self.f(z)


class Solved(nn.Module):
    """An ODE block solved by `odeint` over [0, 1]."""

    def __init__(self, block: cs.ODEBlock, method: str, gradient: str) -> None:
        super().__init__()
        self.f = RightHandSide(block.f)
        self.how: dict[str, Any] = {"method": method}
        if method == "dopri5":
            self.how |= {"rtol": TOLERANCE, "atol": TOLERANCE}
            self.how["options"] = {"max_num_steps": MOST_STEPS}
        else:
            self.how["options"] = {"step_size": 1 / block.steps}
        self.how["gradient"] = "exact" if gradient == "ANODE" else "backsolve"

    def forward(self, z: Tensor) -> Tensor:
        """The state at time 1."""
        times = torch.tensor([0.0, 1.0], dtype=z.dtype, device=z.device)
        return cs.odeint(self.f, z, times, **self.how)[-1]


def build(
    network: Network, images: Images, method: str, gradient: str, x: Tensor, seed: int
) -> nn.Module:
    """The network with the gradient wanted; the same weights for both."""
    torch.manual_seed(seed)
    fixed = "euler" if method == "dopri5" else method
    model = network.make(
        num_classes=images.num_classes,
        in_channels=images.in_channels,
        method=fixed,
        steps=network.steps,
    )
    if gradient == "ANODE" and method != "dopri5":
        chain = cs.profile(model, x)
        least = least_bytes(lambda budget: cs.plan(chain, budget=budget, solver="anode"))
        return cs.checkpointed(model, cs.plan(chain, budget=least, solver="anode"))
    for name, layer in model.named_children():
        if isinstance(layer, cs.ODEBlock):
            setattr(model, name, Solved(layer, method, gradient))
    return model


def train(
    network: Network,
    images: Images,
    method: str,
    gradient: str,
    epochs: int,
    args: argparse.Namespace,
) -> Run:
    """Train as the paper does: SGD, a tenth of the rate after 3/7 and 5/7 of the epochs."""
    batch = min(network.batch, len(images.train))
    x = torch.stack([images.train[k][0] for k in range(batch)])
    model = build(network, images, method, gradient, x, args.seed)
    optimizer = torch.optim.SGD(model.parameters(), network.rate, momentum=0.9, weight_decay=5e-4)
    drops = [-(-epochs * sevenths // 7) for sevenths in (3, 5)]  # rounded up
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
    probe = build(network, images, method, "backsolve", x, args.seed)
    labels = torch.tensor([images.train[k][1] for k in range(batch)])
    torch.manual_seed(args.seed)  # planning may have drawn numbers
    batches = DataLoader(images.train, batch, shuffle=True, drop_last=True)
    run = Run()
    for _ in range(epochs):
        if gradient == "ANODE":
            run.errors.append(backsolve_error(probe, model, x, labels))
        try:
            run.losses.append(train_epoch(model, optimizer, batches))
            if not math.isfinite(run.losses[-1]):
                run.stopped = "the loss is not finite"
                break
            run.accuracies.append(evaluate(model, DataLoader(images.held_out, 256)))
        except IntegrationError as error:
            run.stopped = str(error).split(";")[0]
            break
        schedule.step()
    return run


def backsolve_error(
    probe: nn.Module, model: nn.Module, x: Tensor, labels: Tensor
) -> tuple[float, float]:
    """How far backsolve's gradient is off at a model's weights: relative error and cosine.

    Args:
        probe: A network like the model whose blocks are solved by `odeint`.
        model: The model, which is left as it is.
        x: A batch.
        labels: Its labels.
    """
    pairs = zip(
        (*probe.parameters(), *probe.buffers()),
        (*model.parameters(), *model.buffers()),
        strict=True,
    )
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(other)
    blocks = [module for module in probe.modules() if isinstance(module, Solved)]
    found = []
    for gradient in ("exact", "backsolve"):
        for block in blocks:
            block.how["gradient"] = gradient
        try:
            loss = functional.cross_entropy(probe.train()(x), labels)
            parts = torch.autograd.grad(loss, list(probe.parameters()))
        except IntegrationError:
            return math.inf, math.nan
        found.append(torch.cat([part.reshape(-1) for part in parts]).double())
    exact, other = found
    cosine = float(functional.cosine_similarity(exact, other, dim=0))
    return float((other - exact).norm() / exact.norm()), cosine


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: DataLoader[Any]
) -> float:
    """One pass over the training images; the mean loss, or the first that is not finite."""
    model.train()
    losses = []
    for x, labels in batches:
        loss = functional.cross_entropy(model(x), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return losses[-1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model: nn.Module, batches: DataLoader[Any]) -> float:
    """Share of the images told right."""
    model.eval()
    right = seen = 0
    for x, labels in batches:
        right += int((model(x).argmax(1) == labels).sum())
        seen += len(labels)
    return right / seen


def _line(name: str, method: str, gradient: str, run: Run) -> str:
    losses = " ".join(f"{loss:.3f}" for loss in run.losses)
    stopped = f"; stopped in epoch {len(run.accuracies) + 1}: {run.stopped}" if run.stopped else ""
    line = f"{name}, {METHODS[method]}, {gradient}: loss {losses}{stopped}"
    if run.errors:
        off = " ".join(f"{error:.2g} ({cosine:.2f})" for error, cosine in run.errors)
        line += f"\n  backsolve's gradient at these weights: relative error (cosine) {off}"
    return line


def show(runs: dict[tuple[str, str, str], Run]) -> None:
    """Print loss and accuracy of the last epoch that ended."""
    rows = []
    for (name, method, gradient), run in runs.items():
        ended = len(run.accuracies)
        loss = run.losses[ended - 1] if ended else math.nan
        accuracy = run.accuracies[-1] if ended else math.nan
        state = f"diverged in epoch {ended + 1}" if run.stopped else f"{ended} epochs"
        rows.append([name, METHODS[method], gradient, loss, f"{accuracy:.1%}", state])
    header = ["network", "method", "gradient", "training loss", "held-out accuracy", "ended"]
    print(table(header, rows))


def draw(runs: dict[tuple[str, str, str], Run], path: Path) -> None:
    """Loss above and accuracy below, one column a network."""
    names = list(dict.fromkeys(name for name, *_ in runs))
    figure = new_figure(3.4 * len(names) + 1, 5)
    grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        loss, accuracy = grid[:, column]
        for (other, method, gradient), run in runs.items():
            if other != name:
                continue
            color = f"C{list(METHODS).index(method)}"
            style = "o-" if gradient == "ANODE" else "x--"
            label = f"{METHODS[method]}, {gradient}"
            ended = range(1, len(run.accuracies) + 1)
            loss.semilogy(ended, run.losses[: len(ended)], style, color=color, label=label)
            accuracy.plot(ended, run.accuracies, style, color=color, label=label)
        loss.set(title=name, ylabel="training loss")
        accuracy.set(xlabel="epoch", ylabel="held-out accuracy")
        for axes in (loss, accuracy):
            axes.grid(alpha=0.3)
    grid[0, -1].legend(fontsize=7)
    save(figure, path)


def _load(args: argparse.Namespace, name: str, pixels: int) -> Images:
    if args.data == "digits" or name == "fc":
        images = load_digits(pixels)
    else:
        images = load_cifar(args.data_root, args.data, verify=not args.own_files)
    if not args.limit:
        return images
    train, held_out = (
        Subset(part, range(min(args.limit, len(part)))) for part in (images.train, images.held_out)
    )
    return Images(
        train=train,
        held_out=held_out,
        num_classes=images.num_classes,
        in_channels=images.in_channels,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--networks", nargs="+", choices=tuple(HERE), default=list(HERE))
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    add("--data", choices=("digits", "cifar10", "cifar100"), default="digits")
    add("--data-root", type=Path, default=Path("data"), help="folder that holds CIFAR's folder")
    add("--own-files", action="store_true", help="take files without the published checksums")
    add("--full", action="store_true", help="the paper's widths, batch and 350 epochs")
    add("--epochs", type=int, help="in place of each network's own number")
    add("--limit", type=int, help="use only so many images of each set")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, help="draw the figure into this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
