"""Settings for all tests: whatever the machine, its load and its habits, a verdict is the same."""

import contextlib
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from ckptsched.base.cache_folder import cache_folder
from ckptsched.base.errors import CkptschedError
from ckptsched.memory import counting_allocator as memory_allocator
from ckptsched.profiler import stage_time as timing

# Tiny networks gain nothing from a second thread, and lose much where tests run side by side.
torch.set_num_threads(1)

# The first example may compile a kernel; how long things take is for benchmarks. The same examples
# are drawn each time: `--hypothesis-profile=explore` draws others, by `--hypothesis-seed` if given.
settings.register_profile(
    "ckptsched", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "explore", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ckptsched")

# No verdict depends on a clock, whatever the scope of a fixture.
timing.MOST_SPREAD = float("inf")

# What decides how wide and how colourful text is, which a user's shell or a CI machine may set.
_OF_TERMINALS = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
# What ckptsched itself reads.
_OURS = ("CKPTSCHED_METER",)


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what the caller's shell has set."""
    for name in (*_OF_TERMINALS, *_OURS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture(scope="session")
def built_libraries() -> list[Path]:
    """The counting allocator, built once for all tests where there is a compiler."""
    with contextlib.suppress(CkptschedError, OSError, subprocess.SubprocessError):
        memory_allocator._load()
    folder = cache_folder()
    return [] if folder is None else list(folder.glob("*.so"))


@pytest.fixture(autouse=True)
def cache_of_its_own(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    built_libraries: list[Path],
) -> Path:
    """Each test has an empty cache of plans, and whether it keeps one is no matter of speed."""
    folder = tmp_path_factory.mktemp("cache")
    for library in built_libraries:
        (folder / library.name).symlink_to(library)
    monkeypatch.setenv("CKPTSCHED_CACHE", str(folder))
    monkeypatch.setenv("CKPTSCHED_CACHE_SECONDS", "1e9")
    return folder


def a_clock(seed: int) -> Callable[[object], float]:
    """A clock whose readings are 0.1 to 0.3 s apart, drawn with this seed."""
    source, seconds = random.Random(seed), 0.0

    def now(device: object) -> float:
        nonlocal seconds
        seconds += source.uniform(0.1, 0.3)
        return seconds

    return now


@pytest.fixture(autouse=True)
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages take the same seconds each time, so that each time the same plans are made.

    What must hold whatever the seconds is tested with clocks of all kinds
    (`profiler/test_stage_time.py`).
    """
    now = a_clock(0)
    monkeypatch.setattr(timing, "now", now)
    monkeypatch.setattr(timing, "thread_seconds", lambda: 0.0)
    monkeypatch.setattr("ckptsched.executor.verify.now", now)
