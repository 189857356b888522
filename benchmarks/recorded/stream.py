"""A stream of batches of many lengths: what a fitted model takes beside plain training.

    python -m benchmarks.recorded.stream
    python -m benchmarks.recorded.stream --batches 60 --lengths 6

A GPT-2 of four layers is fitted twice, on the longest batch and on the first that comes, and
trained on the same batches, in the same random order, as a twin by plain autograd. One step of
each length is measured and compared: its peak with the budget, its gradients with those of plain
autograd, bit by bit; a broken budget or another gradient ends in an error. Printed are the plans
and recordings that were made, and processor seconds over those of plain training: of everything,
of all but the first fit, and of the steps of lengths that were seen before, beside what the plan
projects.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.meters import default_meter

_ROWS, _WORDS, _LONGEST = 4, 256, 128


def language(layers: int = 4) -> nn.Module:
    """GPT-2 of some layers and width 64."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=_WORDS,
        n_positions=_LONGEST,
        n_embd=64,
        n_head=4,
        n_layer=layers,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        loss_type="ForCausalLM",
    )
    return transformers.GPT2LMHeadModel(config)


def stream(batches: int, lengths: int) -> list[Tensor]:
    """Batches of so many lengths up to the longest, in random order."""
    draw, drawn = random.Random(0), torch.Generator().manual_seed(0)
    sizes = [_LONGEST * (k + 1) // lengths for k in range(lengths)]
    chosen = [sizes[k % lengths] for k in range(batches)]
    draw.shuffle(chosen)
    return [torch.randint(_WORDS, (_ROWS, size), generator=drawn) for size in chosen]


class Lines(logging.Handler):
    """Counts what the log says of recordings and plans."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded, self.planned = 0, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a line."""
        self.recorded += "recorded anew" in record.getMessage()
        self.planned += "planned anew" in record.getMessage()


def step(model: nn.Module, ids: Tensor, seed: int) -> None:
    """One forward and backward, with random numbers of its own."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    model(input_ids=ids, labels=ids).loss.backward()


def peak_of(model: nn.Module, ids: Tensor) -> int:
    """Bytes of a step at its peak."""
    model.zero_grad(set_to_none=True)
    with default_meter(ids.device).window() as window:
        model(input_ids=ids, labels=ids).loss.backward()
        window.mark()
    return window.phases[0].peak_bytes


def check(model: nn.Module, plain: nn.Module, ids: Tensor, seed: int, budget: int) -> None:
    """Compare a step of a kind that was seen before with one by plain autograd.

    Raises:
        SystemExit: Its peak exceeds the budget, or a gradient differs.
    """
    found = peak_of(model, ids)
    if found > budget:
        raise SystemExit(f"a batch of {list(ids.shape)} takes {found} bytes, over {budget}")
    for net in (model, plain):
        step(net, ids, seed)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        same = one.grad is other.grad or (
            one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
        )
        if not same:
            raise SystemExit(f"the gradient of {name} differs on a batch of {list(ids.shape)}")


def run(name: str, plain: nn.Module, batches: list[Tensor], sample: Tensor, budget: Any) -> None:
    """Train by a fitted copy and by plain autograd, in turn, and print what it took."""
    lines, log = Lines(), logging.getLogger("ckptsched")
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    model = copy.deepcopy(plain)
    start = time.process_time()
    cs.fit(model, kwargs={"input_ids": sample, "labels": sample}, budget=budget)
    fitting = time.process_time() - start
    seconds = {"fitted": 0.0, "plain": 0.0, "fitted again": 0.0, "plain again": 0.0}
    seen = set[int]()
    for k, ids in enumerate(batches):
        known = ids.shape[1] in seen
        for way, net in (("fitted", model), ("plain", plain)):
            start = time.process_time()
            step(net, ids, k)
            taken = time.process_time() - start
            seconds[way] += taken
            seconds[f"{way} again"] += taken * known
        if not known:  # each length once, which the steps of the others follow
            check(model, plain, ids, k, cs.plan_of(model).budget_bytes)
        seen.add(ids.shape[1])
    log.removeHandler(lines)
    whole = (fitting + seconds["fitted"]) / seconds["plain"]
    again = seconds["fitted again"] / max(seconds["plain again"], 1e-9)
    print(
        f"{name:22}{lines.planned + 1:7}{lines.recorded:12}{fitting:10.2f}{whole:12.3f}"
        f"{seconds['fitted'] / seconds['plain']:12.3f}{again:12.3f}"
        f"{cs.plan_of(model).overhead:+11.3f}",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--lengths", type=int, default=20)
    parser.add_argument(
        "--share", type=int, default=60, help="budget, of storing everything, in %%"
    )
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", cs.TimingWarning)
    torch.manual_seed(0)
    plain, batches = language(), stream(asked.batches, asked.lengths)
    longest = max(batches, key=lambda ids: ids.shape[1])
    whole = cs.plan(plain, kwargs={"input_ids": longest, "labels": longest}, budget="100%")
    budget = max(whole.store_all_bytes * asked.share // 100, whole.least_budget_bytes)
    print(f"{asked.batches} batches of {asked.lengths} lengths, budget {budget} bytes")
    print(
        f"{'fitted on':22}{'plans':>7}{'recordings':>12}{'fit, s':>10}{'all / plain':>12}"
        f"{'no fit':>12}{'seen before':>12}{'projected':>11}"
    )
    for name, sample in (("the longest batch", longest), ("the first that comes", batches[0])):
        run(name, plain, batches, sample, budget)


if __name__ == "__main__":
    main()
