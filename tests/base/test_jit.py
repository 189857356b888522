"""Machine code on disk is read and written in turn."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ckptsched.base import jit as module
from ckptsched.base.jit import turn

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
            with turn(tmp_path / "not there yet"):
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
    with turn(tmp_path / "file" / "folder"):
        pass
    with turn(tmp_path), pytest.raises(KeyError), turn(tmp_path / "other"):
        raise KeyError


def test_a_lock_that_is_never_let_go_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.02)
    with turn(tmp_path), turn(tmp_path):
        pass


def test_a_process_forked_meanwhile_does_not_keep_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a worker that loads data: it has all open files, for as long as it lives."""
    fcntl = pytest.importorskip("fcntl")
    lock, copies = module._lock, []
    monkeypatch.setattr(module, "_lock", lambda x: (copies.append(os.dup(x)), lock(x)))
    with turn(tmp_path):
        pass
    try:
        with open(next(tmp_path.iterdir()), "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(*copies)


def test_machine_code_is_read_and_written_under_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caching = pytest.importorskip("numba.core.caching")
    held, seen = [0], []

    @contextlib.contextmanager
    def noted(folder: Path) -> Iterator[None]:
        held[0] += 1
        with turn(folder):
            yield
        held[0] -= 1

    for name in ("save", "load"):
        method = getattr(caching.IndexDataCacheFile, name)
        monkeypatch.setattr(
            caching.IndexDataCacheFile,
            name,
            lambda *a, m=method, n=name: seen.append((n, held[0])) or m(*a),
        )
    monkeypatch.setattr(module, "turn", noted)
    (tmp_path / "kernel_of_test.py").write_text(KERNEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    total = importlib.import_module("kernel_of_test").total
    try:
        assert total(np.arange(10.0)) == 45
        assert total(np.arange(20.0)[::2]) == 90
    finally:
        del sys.modules["kernel_of_test"]
    assert seen == [("load", 1), ("save", 1)] * 2
    assert len(list(tmp_path.rglob("*.nbc"))) == 2
