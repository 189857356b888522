"""Train a language model within a byte budget by Hugging Face's Trainer, by giving it a callback.

From the root of the repository, with transformers and accelerate installed:

    python -m examples.train_hf_trainer

The model is a small GPT-2 with random weights, on random text: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

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
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=args.length,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model, texts = GPT2LMHeadModel(config), _texts(args.limit, args.length)

    # The one line: "none" trains the model as it is.
    callback = None if args.budget == "none" else cs.TransformersCallback(budget=args.budget)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=args.batch,
                dataloader_pin_memory=False,
                num_train_epochs=args.epochs,
                learning_rate=0.003,
                seed=args.seed,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=texts,
            callbacks=[callback] if callback else None,
        )
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    verification = None
    if callback:
        batch = {key: torch.stack([row[key] for row in texts[: args.batch]]) for key in texts[0]}
        # The Trainer tells the model how many words the loss is the mean of.
        batch["num_items_in_batch"] = torch.tensor(args.batch * (args.length - 1.0))
        verification = show(model, callback.plan, kwargs=batch)
    print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    return Outcome(model, losses, verification)


def _texts(count: int, length: int) -> list[dict[str, Any]]:
    """Rows in which each word follows from the one before."""
    first = torch.randint(WORDS, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = (first + 7 * torch.arange(length)) % WORDS
    return [{"input_ids": row, "labels": row} for row in ids]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.train_hf_trainer")
    add = parser.add_argument
    add("--budget", default="60%", help='such as "2MiB", "60%%" (the default) or "none"')
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
