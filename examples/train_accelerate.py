"""Train a masked language model within a byte budget in a loop of accelerate's: one line more.

From the root of the repository, with transformers and accelerate installed:

    python -m examples.train_accelerate

The model is a small BERT with random weights, on random text: nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

import ckptsched as cs
from examples.planned_step import show

WORDS = 64


@dataclass(frozen=True)
class Outcome:
    """What a training came to."""

    model: nn.Module
    losses: list[float]
    verification: cs.Verification | None


def main(argv: Sequence[str] | None = None) -> Outcome:
    """Train as the arguments say.

    Args:
        argv: Arguments as on the command line; None takes those of the process.
    """
    args = _parse(argv)
    torch.manual_seed(args.seed)
    accelerator = Accelerator(
        cpu=True, mixed_precision=args.precision, gradient_accumulation_steps=args.accumulate
    )
    model: Any = BertForMaskedLM(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=2,
            intermediate_size=2 * args.width,
            max_position_embeddings=args.length,
        )
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.003)
    batches: Any = DataLoader(_texts(args.limit, args.length), args.batch)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    # The one line, after prepare: "none" trains the model as it is.
    if args.budget != "none":
        cs.fit(model, budget=args.budget)

    model.train()
    losses: list[float] = []
    for _ in range(args.epochs):
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    verification = None
    if args.budget != "none":
        verification = show(model, cs.plan_of(model), kwargs=next(iter(batches)))
    print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    return Outcome(model, losses, verification)


def _texts(count: int, length: int) -> list[dict[str, Any]]:
    """Rows in which each word follows from the one before, and every fourth is hidden."""
    first = torch.randint(WORDS - 1, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = 1 + (first + 7 * torch.arange(length)) % (WORDS - 1)
    hidden = torch.arange(length) % 4 == 3
    shown, labels = ids.masked_fill(hidden, 0), ids.masked_fill(~hidden, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(shown, labels, strict=True)]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.train_accelerate")
    add = parser.add_argument
    add("--budget", default="60%", help='such as "2MiB", "60%%" (the default) or "none"')
    add("--precision", default="no", help='"no" or "bf16"')
    add("--accumulate", type=int, default=1, help="batches to a step of the optimizer")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=32)
    add("--length", type=int, default=32, help="words of a text")
    add("--batch", type=int, default=16)
    add("--limit", type=int, default=200, help="so many texts; the last batch may be smaller")
    add("--epochs", type=int, default=2)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
