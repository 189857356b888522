"""Train an ODE network within a byte budget by Hugging Face's Trainer: wrapping it is all it takes.

From the root of the repository, with transformers and accelerate installed:

    python -m examples.train_hf_trainer

A Trainer calls its model with the batch by name and wants the loss back. A network that follows a
plan is a part of such a model as any other module is.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

import ckptsched as cs
from examples.data import load_digits
from models import ode_resnet_small


class Classifier(nn.Module):
    """What a Trainer trains: it does not know how its network runs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Digits(Dataset[dict[str, Any]]):
    """Images under the names by which the model takes them."""

    def __init__(self, limit: int) -> None:
        self.pairs = load_digits().train
        self.limit = limit

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.pairs[index]
        return {"pixel_values": image, "labels": label}


def main(argv: Sequence[str] | None = None) -> transformers.Trainer:
    """Train as the arguments say.

    Args:
        argv: Arguments as on the command line; None takes those of the process.

    Returns:
        The Trainer, with the model and the log of losses.
    """
    args = _parse(argv)
    torch.manual_seed(args.seed)
    model, images = ode_resnet_small(method=args.method, steps=args.steps), Digits(args.limit)

    # The one line: "none" leaves the model as it is.
    sample = torch.stack([images[k]["pixel_values"] for k in range(args.batch)])
    network = model if args.budget == "none" else cs.fit(model, sample, budget=args.budget)

    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=Classifier(network),
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=args.batch,
                dataloader_drop_last=True,  # a plan holds for the batch that it was made for
                dataloader_pin_memory=False,
                num_train_epochs=args.epochs,
                learning_rate=args.lr,
                seed=args.seed,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=images,
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if isinstance(network, cs.Checkpointed):
        print(network.plan)
    print(f"loss {float(losses[0]):.4f} at first, {float(losses[-1]):.4f} at last")
    return trainer


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.train_hf_trainer")
    add = parser.add_argument
    add("--budget", default="40%", help='such as "8MiB", "40%%" (the default) or "none"')
    add("--method", default="rk4", help="euler, midpoint, heun or rk4")
    add("--steps", type=int, default=8, help="time steps of each ODE block")
    add("--batch", type=int, default=64)
    add("--epochs", type=int, default=2)
    add("--limit", type=int, default=1408, help="use only so many images")
    add("--lr", type=float, default=0.003)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
