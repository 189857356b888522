"""Does a step by a plan of many fine stages take the time that was projected?

    python -m benchmarks.executor.fine_chains
    python -m benchmarks.executor.fine_chains --models gpt2_6 --rounds 5 --json fine.json

Models are recorded and cut finely. Each is run by plain autograd, by a plan that stores all,
and by plans in 30, 50 and 70 % of what that takes, in turn in one process, on one thread.
*measured* is the median, over the rounds, of a step's processor seconds over plain autograd's
in the same round, less one; *over store-all* is the same beside the plan that stores all, which
is what the projection is relative to. *faults* are pages that a step asks the kernel for: memory
that the allocator has given back meanwhile. The second table says where a step's seconds go: in the
calls of stages, first and again; in autograd's engine; in what else the executor does.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

import ckptsched as cs
from benchmarks.each_model import measure_each
from benchmarks.recorded.any_model import CASES, Case, gpt2, step
from ckptsched.executor.step import interpreter
from ckptsched.recompute.tape import Tape

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

SHARES = (30, 50, 70, 100)
MODELS: dict[str, Callable[[], Case]] = {
    "gpt2_6": lambda: gpt2(6),
    "gpt2_12": lambda: gpt2(12),
    "resnet50": CASES["resnet50"],
}


@dataclass(frozen=True)
class Row:
    """One way to run a step of a model."""

    model: str
    way: str
    projected: float | None
    """Projected overhead; None for plain autograd."""
    measured: float
    over_store_all: float
    spread: float
    """Half the distance between the quartiles of the rounds' ratios to plain autograd."""
    faults: float
    forwards: int


def _faults() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def cost_of(model: nn.Module, case: Case) -> tuple[float, int]:
    """Processor seconds of a step, and the pages that it asks for."""
    gc.collect()
    gc.disable()
    try:
        before, start = _faults(), time.process_time()
        step(model, case)
        return time.process_time() - start, _faults() - before
    finally:
        gc.enable()


def measure(name: str, case: Case, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """All rows of a model, what its chain is like, and where the seconds go."""
    chain = cs.profile(case.model, kwargs=case.batch, loss=case.loss)
    whole = cs.plan(chain, budget="100%").store_all_bytes
    least = cs.plan(chain, budget="100%").least_budget_bytes
    budgets = {f"{s} %": max(least, whole * s // 100) for s in SHARES}
    plans = {way: cs.plan(chain, budget=budget) for way, budget in budgets.items()}
    models: dict[str, nn.Module] = {"plain": case.model}
    models |= {way: cs.checkpointed(case.model, plan) for way, plan in plans.items()}
    for model in models.values():
        step(model, case)
    costs = [{way: cost_of(model, case) for way, model in models.items()} for _ in range(rounds)]
    rows = []
    for way in models:
        ratios = [cost[way][0] / cost["plain"][0] for cost in costs]
        quarters = statistics.quantiles(ratios, n=4)
        rows.append(
            Row(
                model=name,
                way=way,
                projected=plans[way].overhead if way in plans else None,
                measured=statistics.median(ratios) - 1,
                over_store_all=statistics.median(c[way][0] / c["100 %"][0] for c in costs) - 1,
                spread=(quarters[2] - quarters[0]) / 2,
                faults=statistics.median(cost[way][1] for cost in costs),
                forwards=plans[way].forwards if way in plans else len(chain),
            )
        )
    facts = {
        "stages": len(chain),
        "store_all_bytes": whole,
        "forward_share": sum(s.forward_seconds for s in chain.stages) / chain.store_all_seconds,
        "of_timing": chain.seconds_spread,
        "split": {way: split_of(models[way], case, rounds) for way in plans},
    }
    return rows, facts


# -- where the seconds go


@contextmanager
def _timed(owner: Any, name: str, key: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add up the processor seconds of calls of a function, its own name kept."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[key] = seconds.get(key, 0.0) + time.thread_time() - start

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def split_of(model: nn.Module, case: Case, rounds: int) -> dict[str, float]:
    """Shares of a step's seconds: in stages, in the engine, in the executor, around it."""
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        seconds: dict[str, float] = {}
        with (
            _timed(interpreter.Interpreter, "run", "executor", seconds),
            _timed(interpreter, "run_stage", "stages", seconds),
            _timed(interpreter, "run_alone", "stages", seconds),
            _timed(interpreter, "run_under", "stages", seconds),
            _timed(Tape, "backward", "engine", seconds),
        ):
            start = time.thread_time()
            step(model, case)
            whole = time.thread_time() - start
        seconds["around"] = whole - seconds["executor"]
        seconds["executor"] -= seconds["stages"] + seconds["engine"]
        found.append({key: value / whole for key, value in seconds.items()})
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


def show(rows: list[Row], facts: dict[str, Any]) -> None:
    """Print two tables in Markdown."""
    print(f"\n{rows[0].model}: {facts['stages']} stages\n")
    print("| budget | stages run | projected | measured | over store-all | ± | faults |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        said = "" if row.projected is None else f"{row.projected:+.3f}"
        print(
            f"| {row.way} | {row.forwards} | {said} | {row.measured:+.3f} "
            f"| {row.over_store_all:+.3f} | {row.spread:.3f} | {row.faults:.0f} |"
        )
    print("\n| budget | stages | engine | executor | around it |\n|---|---|---|---|---|")
    for way, split in facts["split"].items():
        cells = [f"{split[key]:.1%}" for key in ("stages", "engine", "executor", "around")]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


def measured(name: str, case: Case, rounds: int) -> dict[str, Any]:
    """Measure a model and print it; facts and rows as JSON data."""
    rows, facts = measure(name, case, max(2, rounds))
    show(rows, facts)
    return {**facts, "rows": [asdict(row) for row in rows]}


def main() -> None:
    """Measure, print, and write what was measured if asked to."""
    measure_each(MODELS, measured, __doc__, rounds=7, ignored=cs.TimingWarning)


if __name__ == "__main__":
    main()
