"""torch's settings of the whole process that decide which kernels run, and so numbers and bytes.

Most have a getter and a setter that are public but slow, or a quick one that is private. The quick
one is taken where this version of torch has it, else the public one, and a setting that torch does
not know is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch


@final
@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its name for people, and how it is read and written."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _quick(name: str, what: str, home: Any = None, attribute: str = "") -> list[Setting]:
    """A setting by torch's private functions of two names, else by a public attribute of its home.

    An "@" in `what`, a part of the names of these functions, stands for get and set.
    """
    read, write = (getattr(torch._C, what.replace("@", verb), None) for verb in ("get", "set"))
    if read is not None and write is not None:
        return [Setting(name, read, write)]
    if hasattr(home, attribute):
        return [Setting(name, partial(getattr, home, attribute), partial(setattr, home, attribute))]
    return []


def _public(name: str, home: Any, attribute: str) -> list[Setting]:
    return _quick(name, "", home, attribute)


def _functions(name: str, home: Any, read: str, write: str) -> list[Setting]:
    """A setting by two functions."""
    if not hasattr(home, read) or not hasattr(home, write):
        return []
    return [Setting(name, getattr(home, read), getattr(home, write))]


def _precision(backend: str, operation: str) -> list[Setting]:
    """How float32 is computed with, by one backend for one kind of operation."""
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    write = getattr(torch._C, "_set_fp32_precision_setter", None)
    if read is None or write is None:
        return []
    name = f"fp32_precision ({backend}, {operation})"
    return [Setting(name, partial(read, backend, operation), partial(write, backend, operation))]


def _deterministic() -> tuple[bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _sdpa(name: str) -> list[Setting]:
    return _functions(
        f"{name} attention",
        torch.backends.cuda,
        f"{name}_sdp_enabled",
        f"enable_{name}_sdp",
    )


def _einsum() -> list[Setting]:
    backend: Any = torch.backends.opt_einsum
    if not backend.is_available():
        return []
    # The order of contractions; its strategy can be set only while it is on.
    return [
        *_public("opt_einsum", backend, "enabled"),
        *_public("strategy of opt_einsum", backend, "strategy"),
    ]


# A setting that others follow comes before them: `put` writes in this order, what is right already
# is not written, and so what follows another still does.
EVERYWHERE: tuple[Setting, ...] = (
    Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting(
        "float32 matmul precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    *_precision("generic", "all"),
    *(s for what in ("all", "matmul", "conv", "rnn") for s in _precision("mkldnn", what)),
    Setting("deterministic algorithms (and warn_only)", _deterministic, _set_deterministic),
    *_quick(
        "deterministic.fill_uninitialized_memory",
        "_@_deterministic_fill_uninitialized_memory",
        torch.utils.deterministic,
        "fill_uninitialized_memory",
    ),
    *(s for what in ("flash", "mem_efficient", "math", "cudnn") for s in _sdpa(what)),
    *_functions(
        "overrideable attention",
        torch._C,
        "_get_overrideable_sdp_enabled",
        "_set_sdp_use_overrideable",
    ),
    *_quick("order of attention kernels", "_@_sdp_priority_order"),
    *_functions(
        "reduced precision in math attention",
        torch.backends.cuda,
        "fp16_bf16_reduction_math_sdp_allowed",
        "allow_fp16_bf16_reduction_math_sdp",
    ),
    *_quick("mkldnn", "_@_mkldnn_enabled", torch.backends.mkldnn, "enabled"),
    *_quick(
        "mkldnn.deterministic",
        "_@_mkldnn_deterministic",
        torch.backends.mkldnn,
        "deterministic",
    ),
    *_quick("nnpack", "_@_nnpack_enabled"),
    *_quick("fp16 reduction on the CPU", "_@_cpu_allow_fp16_reduced_precision_reduction"),
    *_einsum(),
)
"""What matters on every device."""

ON_CUDA: tuple[Setting, ...] = (
    *(s for what in ("all", "matmul", "conv", "rnn") for s in _precision("cuda", what)),
    *_quick("cudnn", "_@_cudnn_enabled", torch.backends.cudnn, "enabled"),
    *_quick("cudnn.benchmark", "_@_cudnn_benchmark", torch.backends.cudnn, "benchmark"),
    *_quick("cudnn.deterministic", "_@_cudnn_deterministic", torch.backends.cudnn, "deterministic"),
    *_quick("cudnn.allow_tf32", "_@_cudnn_allow_tf32", torch.backends.cudnn, "allow_tf32"),
    *(
        s
        for what in (
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
            "allow_fp16_accumulation",
        )
        for s in _public(f"cuda.matmul.{what}", torch.backends.cuda.matmul, what)
    ),
    *_quick("cuda.preferred_linalg_library", "_@_linalg_preferred_backend"),
    *_quick("cuda.preferred_blas_library", "_@_blas_preferred_backend"),
)
"""What matters on CUDA besides."""

THREADS = Setting("threads", torch.get_num_threads, torch.set_num_threads)
"""Threads of the CPU, by which sums are cut into parts; a signature names them by itself."""


def settings_of(device: torch.device) -> tuple[Setting, ...]:
    """The settings that matter on a device, in the order in which they are written."""
    return _ON_CUDA if device.type == "cuda" else _ON_CPU


_ON_CPU, _ON_CUDA = (*EVERYWHERE, THREADS), (*EVERYWHERE, *ON_CUDA)


def read(settings: Iterable[Setting]) -> tuple[Any, ...]:
    """The current values; None where torch does not say."""
    try:
        return tuple([setting.read() for setting in settings])
    except RuntimeError:  # of float32 precisions where old and new names of them are mixed
        return tuple([_read(setting) for setting in settings])


def _read(setting: Setting) -> Any:
    try:
        return setting.read()
    except RuntimeError:
        return None


def write(settings: Iterable[Setting], values: Iterable[Any]) -> None:
    """Set the settings that have other values now; None leaves one as it is."""
    for setting, value in zip(settings, values, strict=True):
        if value is not None and _read(setting) != value:
            setting.write(value)


@contextmanager
def written(settings: tuple[Setting, ...], values: tuple[Any, ...]) -> Iterator[None]:
    """A context with other values; torch has them for all threads."""
    before = read(settings)
    try:
        write(settings, values)
        yield
    finally:
        write(settings, before)


def described(settings: Iterable[Setting], values: Iterable[Any]) -> tuple[str, ...]:
    """Text such as "default dtype: torch.float32", one a setting, without the threads."""
    pairs = zip(settings, values, strict=True)
    return tuple(f"{s.name}: {value}" for s, value in pairs if s is not THREADS)


def difference(expected: Iterable[str], found: Iterable[str]) -> tuple[str, str, str] | None:
    """The first setting that differs between two results of `described`, of those that both know.

    Returns its name, what was expected and what is found; None where none differs.
    """
    now = dict(text.split(": ", 1) for text in found)
    for text in expected:
        name, _, value = text.partition(": ")
        if name in now and now[name] != value:
            return name, value, now[name]
    return None
