"""Machine code on disk is read and written in turn."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsched.base import jit as module
from ckptsched.base.errors import InfeasibleBudgetError
from ckptsched.base.jit import compiled, count_steps, folder_lock, is_interpreted, suited
from ckptsched.base.progress import listening
from ckptsched.solvers import ChainDp, Solution
from ckptsched.workload.chain import Chain
from tests.support.shared_chains import instance
from tests.support.strategies import (
    chains_with_options,
    ledger_chains,
    parted_chains,
    scaled_chains,
)

KERNEL = """
from ckptsched.base.jit import compiled

@compiled
def total(x):
    s = x[0]
    for i in range(1, len(x)):
        s += x[i]
    return s
"""


def test_one_after_the_other(tmp_path: Path) -> None:
    """Without the lock, a thread would find another inside."""
    inside, most, start = [0], [0], threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(50):
            with folder_lock(tmp_path / "not there yet"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                sum(range(2000))
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 or module.fcntl is None


def test_a_folder_without_locks_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with folder_lock(tmp_path / "file" / "folder"):
        pass
    with folder_lock(tmp_path), pytest.raises(KeyError), folder_lock(tmp_path / "other"):
        raise KeyError


def test_a_lock_that_is_never_let_go_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.02)
    inside = threading.Event()

    def enter() -> None:
        with folder_lock(tmp_path):
            inside.set()

    with folder_lock(tmp_path):
        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        assert inside.wait(5), "it waits for a lock that is never let go"
        thread.join()


def test_a_process_forked_meanwhile_does_not_keep_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a worker that loads data: it has all open files, for as long as it lives."""
    fcntl = pytest.importorskip("fcntl")
    lock, copies = module._lock, []
    monkeypatch.setattr(module, "_lock", lambda x: (copies.append(os.dup(x)), lock(x)))
    with folder_lock(tmp_path):
        pass
    (copy,) = copies
    try:
        with open(next(tmp_path.iterdir()), "ab") as file:
            assert os.path.sameopenfile(copy, file.fileno()), "the lock was of another file"
            assert _is_free(fcntl, file)
    finally:
        os.close(copy)


def _is_free(fcntl: Any, file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_machine_code_is_read_and_written_under_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caching = pytest.importorskip("numba.core.caching")
    held, seen, told = [0], [], []

    @contextlib.contextmanager
    def noted(folder: Path) -> Iterator[None]:
        held[0] += 1
        with folder_lock(folder):
            yield
        held[0] -= 1

    for name in ("save", "load"):
        method = getattr(caching.IndexDataCacheFile, name)
        monkeypatch.setattr(
            caching.IndexDataCacheFile,
            name,
            lambda *a, m=method, n=name: seen.append((n, held[0])) or m(*a),
        )
    monkeypatch.setattr(module, "folder_lock", noted)
    (tmp_path / "kernel_of_test.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    total = importlib.import_module("kernel_of_test").total
    try:
        with listening(lambda what, share: told.append(what)):
            assert total(np.arange(10.0)) == 45
            assert total(np.arange(20.0)[::2]) == 90
    finally:
        del sys.modules["kernel_of_test"]
    assert seen == [("load", 1), ("save", 1)] * 2
    assert len(list(tmp_path.rglob("*.nbc"))) == 2
    assert told == ["compiling total: done once on this machine"] * 2


@compiled
def _twice(x: int) -> int:
    return 2 * x


@compiled
def _four_times(x: int) -> int:
    return _twice(_twice(x))


def test_few_steps_are_interpreted_and_many_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until together they have cost about as much as compiling does; then machine code is used."""
    monkeypatch.setattr(module, "INTERPRETED_STEPS", 1000)
    monkeypatch.setattr(module, "LOADED_STEPS", 10)
    for kernel in (_four_times, suited(_four_times, 400), suited(_four_times, 500)):
        if kernel is not _four_times:
            assert not hasattr(kernel, "signatures")
            assert kernel(3) == 12
    assert is_interpreted(_four_times, 100)
    assert not is_interpreted(_four_times, 101)
    count_steps(_four_times, 50)
    assert not is_interpreted(_four_times, 100)
    machine = suited(_four_times, 100)
    assert machine(3) == 12
    assert len(machine.signatures) == 1  # type: ignore[attr-defined]
    assert is_interpreted(_four_times, 10)
    assert not is_interpreted(_four_times, 11)


def _sum_by_elements(x: np.ndarray) -> float:
    total = 0.0
    for k in range(len(x)):
        total += x[k]
    return total


def _sum_by_numpy(x: np.ndarray) -> float:
    return float(np.cumsum(x)[-1])


_sum = compiled(_sum_by_elements, interpreted=_sum_by_numpy)


@compiled
def _mean(x: np.ndarray) -> float:
    return _sum(x) / len(x)


def test_a_loop_may_be_another_function_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where another kernel calls it."""
    monkeypatch.setattr(module, "INTERPRETED_STEPS", 10)
    x = np.arange(5.0)
    assert suited(_sum, 5).__code__ is _sum_by_numpy.__code__
    assert suited(_mean, 5).__globals__["_sum"].__code__ is _sum_by_numpy.__code__
    machine = suited(_mean, 11)
    assert machine.py_func.__globals__["_sum"].py_func.__code__ is _sum_by_elements.__code__
    assert suited(_mean, 5)(x) == machine(x) == 2.0


def _solved(
    chain: Chain, budgets: list[int], steps: float
) -> list[Solution | InfeasibleBudgetError]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "INTERPRETED_STEPS", steps)
        patch.setattr(module, "LOADED_STEPS", steps)
        return ChainDp().solve_each(chain, budgets)


def _check_same(chain: Chain, budgets: list[int]) -> None:
    pairs = zip(*(_solved(chain, budgets, steps) for steps in (0, float("inf"))), strict=True)
    for one, other in pairs:
        if isinstance(one, Solution):
            assert isinstance(other, Solution)
            assert one.schedule == other.schedule
            assert one.lower_bound_seconds == other.lower_bound_seconds
            assert one.least_budget_bytes == other.least_budget_bytes
        else:
            assert str(one) == str(other)


@settings(max_examples=25)
@given(
    st.one_of(scaled_chains(9), chains_with_options(6), ledger_chains(8), parted_chains(6)),
    st.lists(st.floats(0, 1.05), min_size=1, max_size=3),
)
def test_plans_and_certificates_are_the_same_compiled_or_interpreted(
    chain: Chain, shares: list[float]
) -> None:
    whole = ChainDp().solve(chain, 2**62).trace.peak_bytes
    _check_same(chain, [max(1, int(share * whole)) for share in shares])


@pytest.mark.parametrize("name", ["random_n20_s0", "resnet50_b32", "random_n50_s0"])
def test_instances_are_solved_to_the_same_bits(name: str) -> None:
    chain = instance(name)
    whole = ChainDp().solve(chain, 2**62).trace.peak_bytes
    _check_same(chain, [int(share * whole) for share in (0.2, 0.5, 0.8)])
