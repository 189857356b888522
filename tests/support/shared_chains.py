"""Chains and figures that several tests of the planner share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptsched.schedule.language import Schedule
from ckptsched.schedule.trace import Trace
from ckptsched.simulator.simulator import simulate
from ckptsched.solvers.chain.solver import Effort
from ckptsched.workload.chain import Chain
from ckptsched.workload.stage import Block, Stage, StageLedger

DATA = Path(__file__).resolve().parent / "data"
INSTANCES = Path(__file__).resolve().parents[2] / "benchmarks" / "instances"

# The worked examples of the chain model: chain, and for each budget from which on it holds the
# least seconds over persistent schedules; below the first nothing fits.
EXAMPLES: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    "E1": (
        {"u_f": [1, 1], "u_b": [2, 2], "w_a": [1, 1, 1], "w_t": [3, 3]},
        {7: 7, 9: 6},
    ),
    "E2": (
        {
            "u_f": [1, 2, 1],
            "u_b": [2, 4, 2],
            "w_a": [2, 1, 1, 1],
            "w_t": [2, 4, 2],
            "o_b": [0, 1, 0],
        },
        {10: 15, 11: 13, 12: 12},
    ),
    "E3": (
        {"u_f": [3, 7, 6], "u_b": [4, 2, 2], "w_a": [1, 1, 1, 1], "w_t": [2, 2, 2]},
        {6: 37, 7: 34, 8: 27, 9: 24},
    ),
    "E4": (
        {
            "u_f": [10, 4, 4, 8],
            "u_b": [6, 16, 11, 9],
            "w_a": [1, 1, 5, 5, 2],
            "w_t": [8, 12, 8, 8],
        },
        {24: 110, 25: 90, 27: 86, 29: 82, 32: 80, 34: 76, 37: 72, 44: 68},
    ),
    "E5": (
        {
            "u_f": [1, 2, 4],
            "u_b": [1, 2, 4],
            "w_a": [1, 2, 2, 1],
            "w_t": [3, 3, 3],
            "o_f": [0, 2, 0],
        },
        {10: 18, 11: 17, 12: 15, 13: 14},
    ),
    "E5 with o_b": (
        {
            "u_f": [1, 2, 4],
            "u_b": [1, 2, 4],
            "w_a": [1, 2, 2, 1],
            "w_t": [3, 3, 3],
            "o_f": [0, 2, 0],
            "o_b": [0, 0, 3],
        },
        {12: 17, 15: 15, 16: 14},
    ),
}


def example(name: str) -> Chain:
    """A worked example as a chain."""
    return Chain.from_json(EXAMPLES[name][0])


def tiny_cases() -> list[dict[str, Any]]:
    """The 120 tiny chains with their optima."""
    cases: list[dict[str, Any]] = json.loads((DATA / "tiny.json").read_text())["cases"]
    return cases


def instance(name: str) -> Chain:
    """A large chain by name."""
    return Chain.load(INSTANCES / f"{name}.json")


def reference(name: str) -> list[dict[str, Any]]:
    """Budgets of a large chain with a lower bound and the best schedule known."""
    data = json.loads((INSTANCES / "reference.json").read_text())
    rows: list[dict[str, Any]] = data["instances"][name]
    return rows


def uniform(
    n: int, *, state: int = 1, tape: int = 4, blocks: tuple[Block, ...] = (), seconds: float = 1.0
) -> Chain:
    """Equal stages."""
    stage = Stage(
        forward_seconds=seconds,
        backward_seconds=2 * seconds,
        state_bytes=state,
        tape_bytes=tape,
        gradient_bytes=state,
    )
    return Chain(stages=(stage,) * n, input_bytes=state, input_gradient_bytes=state, blocks=blocks)


def exact_stage(**changes: Any) -> Stage:
    """A stage with a ledger: 10 bytes of state, 3 of tape, the input saved."""
    figures: dict[str, Any] = {
        "state_bytes": 10,
        "output_is_view": False,
        "tape_bytes": 3,
        "input_saved": True,
        "output_saved": False,
        "forward_peak_bytes": 12,
        "taped_peak_bytes": 14,
        "backward_peak_bytes": (20, 24, 21, 25, 22, 26, 23, 27),
    }
    parameters = changes.pop("parameter_gradient_bytes", 0)
    return Stage(
        forward_seconds=1.0,
        backward_seconds=2.0,
        state_bytes=10,
        tape_bytes=13,
        gradient_bytes=10,
        forward_overhead_bytes=4,
        backward_overhead_bytes=20,
        parameter_gradient_bytes=parameters,
        ledger=StageLedger(**(figures | changes)),
    )


def run(chain: Chain, text: str, **options: Any) -> Trace:
    """Simulate a schedule written as words."""
    return simulate(chain, Schedule.from_text(text), **options)


def levels(chain: Chain, text: str) -> list[int]:
    """Bytes while each operation of a schedule runs."""
    trace = run(chain, text)
    return [int(x) for x in trace.timeline]


def steps(pairs: Sequence[tuple[int, float]], last: int) -> list[tuple[int, float]]:
    """Every budget from the first to `last` with its value, from those where it changes."""
    found = []
    for budget in range(pairs[0][0], last + 1):
        value = next(value for start, value in reversed(pairs) if start <= budget)
        found.append((budget, value))
    return found


WITHOUT_SEARCH = Effort(looks=0, least_looks=0)
"""Leaves the schedules and bound of chain_dp's table as they are, without its exact search."""
