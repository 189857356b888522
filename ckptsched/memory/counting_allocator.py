"""The counting CPU allocator: `counting_allocator.cpp`, compiled on first use and installed once.

The library is kept in the user's cache folder, by the versions that it depends on. PyTorch loads
`libc10` before it, so that it needs no search path of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import final

import torch

from ..base.cache_folder import cache_folder, private_folder
from ..base.errors import ProfileError
from ..torch_state.locks import in_forked_process

_SOURCE = Path(__file__).with_name("counting_allocator.cpp")
_COMPILER_SECONDS = 120


@final
class CountingAllocator:
    """The installed allocator. Get it from `counting_allocator`; there is one in a process.

    A ProfileError where the library cannot be installed, or then does not count.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        library.ckptsched_mark.argtypes = [ctypes.POINTER(ctypes.c_int64)] * 2
        library.ckptsched_mark.restype = None
        library.ckptsched_close.restype = ctypes.c_int64
        self._library = library
        library.ckptsched_install.argtypes = [ctypes.c_void_p]
        library.ckptsched_open.argtypes = [ctypes.c_int]
        thread_state = ctypes.cast(ctypes.pythonapi.PyGILState_GetThisThreadState, ctypes.c_void_p)
        if library.ckptsched_install(thread_state):
            raise ProfileError("the CPU allocator in use cannot be wrapped")
        self.open()
        block = torch.empty(1000, dtype=torch.uint8, device="cpu")
        live, _ = self.read()
        self.close()
        if live != block.numel():
            raise ProfileError(f"it counted {live} bytes for a tensor of {block.numel()} bytes")

    def open(self, *, own_thread: bool = False) -> None:
        """Start counting from zero, on request without blocks that other threads of Python's make.

        A ProfileError where another allocator has been installed since.
        """
        if self._library.ckptsched_open(int(own_thread)):
            raise ProfileError(
                "another library has replaced PyTorch's CPU allocator since the counting one was "
                "installed, so that nothing would be counted; use ProfilerMeter"
            )

    def read(self) -> tuple[int, int]:
        """Return the live bytes, and the largest number of them since the last call or `open`."""
        live, peak = ctypes.c_int64(), ctypes.c_int64()
        self._library.ckptsched_mark(ctypes.byref(live), ctypes.byref(peak))
        return live.value, peak.value

    def close(self) -> int:
        """Stop counting; return how many blocks could not be counted (0 unless others meddle)."""
        return int(self._library.ckptsched_close())


_ONE_BUILDER = threading.Lock()


def _renew() -> None:
    global _ONE_BUILDER
    _ONE_BUILDER = threading.Lock()


in_forked_process(_renew)


def counting_allocator() -> CountingAllocator:
    """Build and install the allocator if need be; a ProfileError if that does not work here."""
    with _ONE_BUILDER:  # functools.cache alone lets two threads install it twice
        found = _installed()
    if isinstance(found, str):
        raise ProfileError(found)
    return found


@functools.cache
def _installed() -> CountingAllocator | str:
    """The allocator, or the reason why there is none: a failed build is not tried again."""
    try:
        return CountingAllocator(_load())
    except (OSError, subprocess.SubprocessError, ProfileError) as error:
        return str(error)


def _load() -> ctypes.CDLL:
    key = hashlib.sha256(_SOURCE.read_bytes())
    for part in (torch.__version__, torch.version.git_version, sys.platform, platform.machine()):
        key.update(f"\n{part}".encode())
    with _folder() as folder:
        built = folder / f"{_SOURCE.stem}-{key.hexdigest()[:20]}.so"
        if built.exists():
            with contextlib.suppress(OSError):  # damaged: build it anew
                return ctypes.CDLL(str(built))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / built.name
            _compile(fresh)
            fresh.replace(built)  # in one step, for processes that start together
        return ctypes.CDLL(str(built))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """The user's cache folder, or one for this once where there is none or others could write."""
    if sys.platform not in ("linux", "darwin"):
        raise ProfileError(f"it is built on Linux and macOS, and this is {sys.platform}")
    folder = cache_folder()
    if folder is not None and private_folder(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ckptsched-") as once:
        yield Path(once)  # a loaded library outlives its file


def _compiler() -> list[str]:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    raise ProfileError("no C++ compiler was found as $CXX, c++, g++ or clang++")


def _compile(target: Path) -> None:
    compiler = _compiler()
    home = Path(torch.__file__).parent
    flags = ["-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += ["-isystem", str(home / "include"), f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}"]
    for standard in ("c++20", "c++17"):  # what PyTorch's headers ask for rises with its version
        command = [*compiler, f"-std={standard}", *flags, str(_SOURCE), "-o", str(target), "-lc10"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILER_SECONDS, check=False
        )
        if done.returncode == 0:
            return
    said = [line for line in done.stderr.splitlines() if "error" in line]
    reason = said[0] if said else f"exit status {done.returncode}"
    raise ProfileError(f"{shlex.join(compiler)} could not build it: {reason}")
