"""What a step by a plan takes in Python: a model so small that its kernels take next to nothing.

    python -m benchmarks.executor.python_cost

GPT-2 of 12 layers and width 16, recorded, as a plain model, by a plan that stores all, and by the
same plan where each call goes through `Captured.take`, which looks through the whole model.
Processor milliseconds of a step, the lower quartile of rounds in turn, in one process, on one
thread.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch import nn

import ckptsched as cs
from benchmarks.recorded.any_model import Case, step
from ckptsched.capture.recording.stages import Captured
from ckptsched.profiler.profile import loss_of_tensors

ROUNDS = 11


class Taken(nn.Module):
    """A recorded model by a plan, with the tensors of each call taken out by the recording."""

    def __init__(self, captured: Captured, plan: cs.Plan) -> None:
        super().__init__()
        self.captured, self.runs = captured, cs.checkpointed(captured, plan)

    def forward(self, **batch: torch.Tensor) -> Any:
        """What the model gives.

        Args:
            batch: Its arguments.
        """
        return self.captured.give(self.runs(self.captured.take(**batch)))


def case() -> Case:
    """The model and its batch."""
    import transformers

    sizes = {"vocab_size": 64, "n_layer": 12, "n_embd": 16, "n_head": 2, "n_positions": 16}
    tokens = {"bos_token_id": 1, "eos_token_id": 1}
    config = transformers.GPT2Config(use_cache=False, **sizes, **tokens)
    ids = torch.randint(64, (2, 16))
    batch = {"input_ids": ids, "labels": ids.clone()}
    return Case(transformers.GPT2LMHeadModel(config), batch, lambda out: out.loss, lambda net: ())


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiny = case()
    captured = cs.captured(tiny.model, kwargs=tiny.batch)
    loss = loss_of_tensors(captured, tiny.loss)
    chain = cs.profile(captured, captured.take(**tiny.batch), loss=loss)
    plan = cs.plan(chain, budget="100%")
    models: dict[str, nn.Module] = {
        "plain": tiny.model,
        "a plan that stores all": cs.checkpointed(tiny.model, plan),
        "the same by Captured.take": Taken(captured, plan),
    }
    seconds: dict[str, list[float]] = {way: [] for way in models}
    for turn in range(ROUNDS + 3):
        for way, model in models.items():
            gc.collect()
            gc.disable()
            start = time.thread_time()
            step(model, tiny)
            if turn >= 3:
                seconds[way].append(time.thread_time() - start)
            gc.enable()
    print(f"{len(chain)} stages")
    for way, found in seconds.items():
        print(f"{way:28}{1e3 * sorted(found)[len(found) // 4]:8.1f} ms")


if __name__ == "__main__":
    main()
