"""Train an ODE network within a byte budget by Lightning's Trainer: a callback is all it takes.

From the root of the repository, with Lightning installed: python -m examples.train_lightning
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

import ckptsched as cs
from examples.data import load_digits
from examples.planned_step import show
from models import ode_resnet_small


class Digits(lightning.LightningModule):
    """Any LightningModule: it does not know how its network runs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.losses: list[float] = []
        self.verification: cs.Verification | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        x, labels = batch
        loss = cross_entropy(self.network(x), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(argv: Sequence[str] | None = None) -> Digits:
    """Train as the arguments say.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        The trained module.
    """
    args = _parse(argv)
    torch.manual_seed(args.seed)
    module = Digits(ode_resnet_small(method=args.method, steps=args.steps))
    images = Subset(load_digits().train, range(args.limit))
    batches: DataLoader[Any] = DataLoader(images, args.batch, shuffle=True)

    # The one line: "none" trains the network as it is.
    callback = None if args.budget == "none" else cs.LightningCallback(budget=args.budget)

    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[callback] if callback else None,
    )
    trainer.fit(module, batches)
    if callback:
        x, labels = next(iter(batches))
        module.verification = show(
            module.network, callback.plan, x, loss=lambda y: cross_entropy(y, labels)
        )
    print(f"loss {module.losses[0]:.4f} at first, {module.losses[-1]:.4f} at last")
    return module


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.train_lightning")
    add = parser.add_argument
    add("--budget", default="40%", help='such as "8MiB", "40%%" (the default) or "none"')
    add("--method", default="rk4", help="euler, midpoint, heun or rk4")
    add("--steps", type=int, default=8, help="time steps of each ODE block")
    add("--batch", type=int, default=64)
    add("--epochs", type=int, default=2)
    add("--limit", type=int, default=1408, help="use only so many images")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
