"""Several processes: DistributedDataParallel and FSDP2 around a model that follows a plan.

Each test starts two processes with torchrun; what they do is in `support/distributed/checks.py` and
in the example.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

import ckptsched as cs
from ckptsched.recompute.tape_contents import SHOWS_WHAT_IS_SAVED

ROOT = Path(__file__).resolve().parents[2]

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def torchrun(module: str, *arguments: str) -> str:
    """What two processes print; they must end well."""
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone"]
    worker = ["-m", "tests.support.distributed.worker", module]
    command += ["--nproc-per-node", "2", *worker, *arguments]
    # One thread each; and nothing of a GPU, which two processes would have to share.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_gloo
@pytest.mark.slow
def test_two_processes_compute_what_they_would_without_a_plan() -> None:
    cases = 38 if SHOWS_WHAT_IS_SAVED else 36
    assert f"checked {cases} cases" in torchrun("tests.support.distributed.checks")


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DDP", "FSDP2", "FSDP2 block by block"])
def test_the_example_keeps_the_budget_on_every_rank(engine: str) -> None:
    arguments = ["--batch", "8", "--method", "euler", "--steps", "4"]
    arguments += ["--training-steps", "3", "--budget", "50%"]
    arguments += {"FSDP2": ["--fsdp"], "FSDP2 block by block": ["--fsdp-blocks"]}.get(engine, [])
    printed = torchrun("examples.train_distributed", *arguments)
    budget = int(re.findall(r"on 2 processes, budget ([\d,]+)", printed)[0].replace(",", ""))
    ranks = re.findall(r"measured ([\d,]+) with it; .*process (\S+)$", printed, re.MULTILINE)
    assert len(ranks) == 2
    for measured, difference in ranks:
        assert int(measured.replace(",", "")) <= budget
        assert float(difference) < 1e-6
    losses = [float(loss) for loss in re.findall(r"^step \d: loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("copied", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_errors_reach_other_processes(copied: Callable[[Exception], Exception]) -> None:
    errors = [
        cs.InfeasibleBudgetError("too little", budget_bytes=3, least_budget_bytes=5, stage="1"),
        cs.SolverTimeoutError("too long", limit_seconds=1.5),
        cs.InvalidScheduleError(2, "F1", "no input"),
        cs.ExecutionError("no"),
    ]
    for error in errors:
        found = copied(error)
        assert type(found) is type(error)
        assert (str(found), found.__dict__) == (str(error), error.__dict__)
