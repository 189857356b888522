"""The counting allocator: threads, and how it is built, kept and done without."""

import shlex
import sys
import tempfile
import threading
from pathlib import Path

import platformdirs
import pytest
import torch
from torch import Tensor

from ckptsched.base.cache_folder import cache_folder
from ckptsched.base.errors import ProfileError
from ckptsched.memory import counting_allocator as memory_allocator
from ckptsched.memory.meters import AllocatorMeter, Measurement, ProfilerMeter, default_meter

needs_compiler = pytest.mark.skipif(
    not AllocatorMeter.available(), reason="no C++ compiler for the counting allocator"
)


# A compiler that fails, on any machine.
FAILS = shlex.join([sys.executable, "-c", "raise SystemExit(1)"])


def block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@needs_compiler
def test_the_allocator_counts_all_threads() -> None:
    kept: list[Tensor] = []

    def program() -> None:
        thread = threading.Thread(target=lambda: kept.append(block(300)))
        thread.start()
        thread.join()

    _, seen = AllocatorMeter().measure(program)
    assert seen == Measurement(peak_bytes=300, final_bytes=300)


@needs_compiler
def test_other_threads_of_pythons_are_left_out_on_request() -> None:
    kept: list[Tensor] = []

    def program() -> None:
        mine = block(1000)
        thread = threading.Thread(target=lambda: kept.extend([mine.clone(), block(300)]))
        thread.start()
        thread.join()
        kept.append(block(20))

    _, seen = AllocatorMeter(own_thread=True).measure(program)
    assert seen == Measurement(peak_bytes=1020, final_bytes=20)
    in_other: list[Measurement] = []
    meter = default_meter("cpu", own_thread=True)
    thread = threading.Thread(target=lambda: in_other.append(meter.measure(lambda: block(7))[1]))
    thread.start()
    thread.join()
    assert in_other == [Measurement(peak_bytes=7, final_bytes=7)]


@needs_compiler
def test_the_allocator_stands_threads_that_never_stop() -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            kept = [block(size) for size in range(1, 200, 7)]
            del kept[::2]

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            _, seen = AllocatorMeter().measure(lambda: block(10))
            # A thread makes its next blocks while it still has half of those before.
            sizes = range(1, 200, 7)
            most = 4 * (sum(sizes) + sum(sizes[1::2])) + 10
            assert 10 <= seen.peak_bytes <= most
            assert 0 <= seen.final_bytes <= seen.peak_bytes
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    _, seen = AllocatorMeter().measure(lambda: block(10))
    assert seen == Measurement(peak_bytes=10, final_bytes=10)


@needs_compiler
def test_the_allocator_works_while_a_profiler_runs() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        _, seen = AllocatorMeter().measure(lambda: block(11))
    assert seen.peak_bytes == 11


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, where this test's builds go: its caches and temporary files are here."""
    folder = tmp_path / "builds"
    folder.mkdir()
    monkeypatch.setenv("CKPTSCHED_CACHE", str(folder / "ckptsched"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def libraries(folder: Path) -> list[Path]:
    return list(folder.rglob("*.so"))


@needs_compiler
def test_the_library_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory_allocator._load()
    (built,) = libraries(cache)
    stamp = built.stat().st_mtime_ns
    monkeypatch.setenv("CXX", "false")  # a second build would fail
    memory_allocator._load()
    assert libraries(cache) == [built]
    assert built.stat().st_mtime_ns == stamp
    assert [path for path in built.parent.iterdir() if path != built] == []


@needs_compiler
def test_a_damaged_library_is_built_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(target: Path) -> None:
        target.write_bytes(b"not a library")

    with monkeypatch.context() as patch:
        patch.setattr(memory_allocator, "_compile", damage)
        with pytest.raises(OSError, match=r"\.so"):
            memory_allocator._load()
    (built,) = libraries(cache)
    assert built.read_bytes() == b"not a library"
    memory_allocator._load()
    assert built.stat().st_size > 1000


@needs_compiler
def test_a_cache_folder_that_others_can_write_to_is_not_used(cache: Path) -> None:
    (cache / "ckptsched").mkdir()
    (cache / "ckptsched").chmod(0o777)
    memory_allocator._load()
    assert libraries(cache) == []


@needs_compiler
def test_nothing_is_kept_where_the_cache_is_off(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTSCHED_CACHE", "off")
    memory_allocator._load()
    assert list(cache.iterdir()) == []


def test_it_lies_where_the_plans_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPTSCHED_CACHE")
    assert cache_folder() == Path(platformdirs.user_cache_dir("ckptsched"))


@pytest.mark.parametrize(
    ("compiler", "path", "reason"),
    [("", "", "no C\\+\\+ compiler was found"), (FAILS, None, "could not build it: exit")],
)
def test_without_a_compiler_the_profiler_takes_over(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiler: str,
    path: str | None,
    reason: str,
) -> None:
    monkeypatch.delenv("CKPTSCHED_METER", raising=False)
    monkeypatch.setenv("CXX", compiler)
    if path is not None:
        monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(memory_allocator, "_installed", memory_allocator._installed.__wrapped__)
    assert not AllocatorMeter.available()
    with pytest.raises(ProfileError, match=f"not available: .*{reason}.*use ProfilerMeter"):
        AllocatorMeter()
    assert isinstance(default_meter("cpu"), ProfilerMeter)
    monkeypatch.setenv("CKPTSCHED_METER", "allocator")
    with pytest.raises(ProfileError, match=reason):
        default_meter("cpu")
