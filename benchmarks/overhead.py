"""What the executor itself costs: tiny steps by a plan beside plain autograd and torch's own.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --methods euler --steps 1000 --rounds 9 --json overhead.json

An MLP of width 16 on a batch of 8 takes next to no time, so what a schedule adds to a step shows.
All rows of a table are timed in turn in one process, on one thread; each figure is the least CPU
time of its rounds. *floor* is plain autograd with the same number of forward evaluations: plain
autograd, and for each further evaluation of a step one without gradients. The second table runs
long chains, each in a process of its own, and shows how much the process grows a step beyond the
bytes of tensors.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckptsched as cs
from ckptsched.capture.stage_discovery import Outline, trace
from models.mlp import ode_mlp

_WIDTH, _BATCH = 16, 8
_KIB = 1024  # Linux counts ru_maxrss in it


def plain_step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward; gradients are let go, as an optimizer would have it."""
    model.zero_grad()
    model(x).sum().backward()


def forward_alone(model: nn.Module, x: Tensor) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        model(x)


def torch_step(stages: list[Any], model: nn.Module, x: Tensor, *, reentrant: bool) -> None:
    """Every stage under torch.utils.checkpoint."""
    model.zero_grad()
    state = x
    for stage in stages:
        state = checkpoint(stage, state, use_reentrant=reentrant, preserve_rng_state=False)
    state.sum().backward()


def plans(chain: cs.Chain, steps: int) -> dict[str, cs.Plan]:
    """Plans by name: with all stored, each state stored, every so many, and few."""
    group = round(steps**0.5)
    found = {
        name: cs.plan(chain, budget=2**50, solver=name)
        for name in ("store_all", "every_stage", f"every_{group}")
    }
    roomy = found[f"every_{group}"].peak_bytes
    for budget in (roomy, roomy * 3 // 5):
        found[f"run_dp in {budget >> 10} KiB"] = cs.plan(chain, budget=budget, solver="run_dp")
    return found


def cpu_seconds(work: Callable[[], None]) -> float:
    """Of this process and its threads, as the backward runs on one of autograd's own on CUDA."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(method: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One table: a row a way to run a step."""
    torch.manual_seed(0)
    model = ode_mlp(_WIDTH, method, steps)
    x = torch.randn(_BATCH, _WIDTH, requires_grad=True)  # the reentrant kind asks for it
    chain = cs.profile(model, x)
    made = plans(chain, steps)
    stages = [stage for block in trace(Outline.of(model)) for stage in block.stages]
    ways: dict[str, Callable[[], None]] = {
        "plain autograd": functools.partial(plain_step, model, x),
        "forward alone": functools.partial(forward_alone, model, x),
    }
    for name, plan in made.items():
        ways[name] = functools.partial(plain_step, cs.checkpointed(model, plan), x)
    for reentrant in (True, False):
        name = f"torch.utils.checkpoint, {'' if reentrant else 'not '}reentrant"
        ways[name] = functools.partial(torch_step, stages, model, x, reentrant=reentrant)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            gc.collect()
            gc.disable()
            best[name] = min(best[name], cpu_seconds(work))
            gc.enable()
    plain, alone = best.pop("plain autograd"), best.pop("forward alone")
    rows = [{"way": "plain autograd", "evaluations": 1.0, "seconds": plain, "floor": plain}]
    for name, seconds in best.items():
        evaluations = made[name].forwards / len(chain) if name in made else 2.0
        floor = plain + (evaluations - 1) * alone
        rows.append({"way": name, "evaluations": evaluations, "seconds": seconds, "floor": floor})
    return [row | {"plain": plain, "method": method, "steps": steps} for row in rows]


def _grow(path: str, steps: int, queue: Any) -> None:
    """In a process of its own: bytes that the executor makes of a plan, and then for a step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warm, x = ode_mlp(_WIDTH, "euler", 50), torch.randn(_BATCH, _WIDTH)
    plain_step(cs.checkpointed(warm, cs.plan(cs.profile(warm, x), budget=2**50)), x)
    model, plan = ode_mlp(_WIDTH, "euler", steps), cs.Plan.load(path)
    tracemalloc.start()
    trained = cs.checkpointed(model, plan)
    gc.collect()
    made, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    plain_step(trained, x)
    queue.put({"made": made, "step": _status("VmHWM") - before, "tensors": plan.peak_bytes})


def _status(name: str) -> int:
    """Bytes that Linux says of this process: VmRSS now in memory, VmHWM the most so far."""
    text = Path("/proc/self/status").read_text()
    return _KIB * int(text.split(f"{name}:")[1].split()[0])


def growth(steps: int, solver: str) -> dict[str, Any]:
    """Bytes a step of bookkeeping on a long chain."""
    model, x = ode_mlp(_WIDTH, "euler", steps), torch.randn(_BATCH, _WIDTH)
    plan = cs.plan(cs.profile(model, x), budget=2**50, solver=solver)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "plan.json")
        plan.save(path)
        process = context.Process(target=_grow, args=(path, steps, queue))
        process.start()
        found: dict[str, Any] = queue.get()
        process.join()
    rest = found["made"] + max(0, found["step"] - found["tensors"])
    return found | {"solver": solver, "steps": steps, "bytes_per_step": rest / steps}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--methods", nargs="*", default=["euler", "rk4"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", type=int, default=100_000, help="steps of the second table")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method in options.methods:
        found = compare(method, options.steps, options.rounds)
        rows += found
        print(f"\n{method}, {options.steps} steps, torch {torch.__version__}, 1 thread\n")
        print("| way | evaluations a step | µs a step | over plain | over floor |")
        print("|---|---|---|---|---|")
        for row in found:
            print(
                f"| {row['way']} | {row['evaluations']:.2f} "
                f"| {row['seconds'] / options.steps * 1e6:.1f} "
                f"| {row['seconds'] / row['plain']:.2f} | {row['seconds'] / row['floor']:.2f} |",
                flush=True,
            )
    long = []
    if options.long:
        print(f"\n{options.long} Euler steps: bytes a step\n")
        print("| plan | made of the plan | growth in a step | of it tensors | bookkeeping |")
        print("|---|---|---|---|---|")
        for solver in (f"every_{round(options.long**0.5)}", "every_stage"):
            found_long = growth(options.long, solver)
            long.append(found_long)
            cells = [found_long[key] / options.long for key in ("made", "step", "tensors")]
            cells.append(found_long["bytes_per_step"])
            print(f"| {solver} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"steps": rows, "long": long}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
