"""The profiler's memory events: how a trace is read, and what a window leaves of it."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckptsched.base.errors import ProfileError
from ckptsched.memory import profiler_trace as memory_trace
from ckptsched.memory.meters import Measurement, ProfilerMeter


def block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def in_thread(fn: Callable[[], object]) -> None:
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


def event(time: float, address: int, size: int, device: tuple[int, int] = (0, -1)) -> dict:
    where = {"Addr": address, "Device Type": device[0], "Device Id": device[1]}
    return {"name": "[memory]", "ts": time, "args": {"Bytes": size, **where}}


def test_a_trace_is_replayed_in_order_of_time_and_by_address() -> None:
    events = [
        {"name": memory_trace._MARK, "ts": 4.0, "args": {}},
        event(2.0, 0xA, 100),
        event(1.0, 0xB, 7),
        event(3.0, 0xA, 50),  # what was there has been freed in another thread
        event(3.5, 0xC, -900),  # born before the trace
        {"name": memory_trace._MARK, "ts": 6.0, "args": {}},
        event(5.0, 0xB, -7),
        event(7.0, 0xD, 1000),
    ]
    assert memory_trace._replay(events, torch.device("cpu")) == [(57, 107), (50, 57)]


def test_a_trace_is_read_for_one_device_only() -> None:
    end = {"name": memory_trace._MARK, "ts": 9.0, "args": {}}
    events = [event(1, 1, 10), event(2, 2, 200, (1, 0)), event(3, 3, 3000, (1, 1)), end]
    for device, size in [("cpu", 10), ("cuda", 3200), ("cuda:0", 200), ("cuda:1", 3000)]:
        assert memory_trace._replay(events, torch.device(device)) == [(size, size)]


def test_the_profiler_counts_its_own_thread_only() -> None:
    kept: list[Tensor] = []

    def program() -> Tensor:
        in_thread(lambda: kept.append(block(300)))
        return block(20)

    _, seen = ProfilerMeter().measure(program)
    assert seen == Measurement(peak_bytes=20, final_bytes=20)


def test_a_running_profiler_is_not_spoilt() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as users:
        torch.ones(3).exp()
        with pytest.raises(ProfileError, match=r"a profiler is running.*AllocatorMeter"):
            ProfilerMeter().measure(lambda: None)
    assert "aten::exp" in {event.key for event in users.key_averages()}


def test_a_profiler_started_inside_the_window_is_an_error() -> None:
    def program() -> None:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            block(3)

    with pytest.raises(ProfileError, match="another profiler was started inside"):
        ProfilerMeter().measure(program)
    _, seen = ProfilerMeter().measure(lambda: block(5))
    assert seen.peak_bytes == 5


def test_the_profiler_misses_marks_of_other_threads_and_says_so() -> None:
    with pytest.raises(ProfileError, match="in another thread"), ProfilerMeter().window() as window:
        in_thread(window.mark)


def test_odd_names_of_ranges_do_no_harm() -> None:
    def program() -> Tensor:
        with torch.autograd.profiler.record_function('a "b" \\ \n\t{é}[,]'):
            return block(6)

    _, seen = ProfilerMeter().measure(program)
    assert seen.peak_bytes == 6


FRESH_PROCESS = """
import os, sys, torch
from ckptsched.memory.meters import ProfilerMeter
old = [torch.empty(9)]
def program():
    old.clear()
    print("by python", file=sys.stderr)
    os.write(2, b"by the system\\n")
    return torch.empty(5)
for _ in range(2):
    seen = ProfilerMeter().measure(program)[1]
print(seen.peak_bytes, seen.final_bytes)
"""


@pytest.mark.slow
def test_only_chatter_is_kept_from_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "20 20\n"
    assert done.stderr == "by python\nby the system\n" * 2


def test_stderr_is_back_in_place_after_a_window(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        ProfilerMeter().measure(lambda: (os.write(2, b"inside\n"), 1 // 0))
    os.write(2, b"outside\n")
    assert capfd.readouterr().err == "inside\noutside\n"


def test_no_files_are_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ProfilerMeter().measure(lambda: block(3))
    with pytest.raises(ZeroDivisionError):
        ProfilerMeter().measure(lambda: 1 // 0)
    assert list(tmp_path.iterdir()) == []
