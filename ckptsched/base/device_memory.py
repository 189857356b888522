"""What a device has free, and what training will take of it besides the step that is planned.

torch is imported when a device is asked for, and no earlier. Models, optimizers and batches are
looked at by what they offer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import BudgetSyntaxError

# Tensors of the size of a parameter that the optimizers of torch.optim keep for each.
_OPTIMIZERS = {
    "sgd": 0,
    "asgd": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "rprop": 2,
    "momentum": 1,
    "adadelta": 2,
    "adam": 2,
    "adamax": 2,
    "adamw": 2,
    "nadam": 2,
    "radam": 2,
}
_ALIASES = {"sgd with momentum": "momentum"}
_SAME = {"the device": "device", "the gpu": "cuda", "gpu": "cuda", "the cpu": "cpu"}
# Options of an optimizer that have it keep one more.
_ONE_MORE = ("momentum", "amsgrad", "centered")
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_REMEDY = 'give bytes, such as "8GiB", or a device that is there, such as "90% of cpu"'


def available_bytes(device: Any = None) -> int:
    """What a step could take of a device now, in bytes.

    Args:
        device: Such as "cuda", "cuda:1", "cpu" or a torch.device; None for the current CUDA
            device where there is one, else the CPU.

    Returns:
        On CUDA what the driver has free and what torch's allocator holds and does not use; on the
        CPU what the system and the process's control group say is available.

    Raises:
        BudgetSyntaxError: There is no such device, or it does not say.
    """
    kind, number = _kind(device), str(device or "").partition(":")[2]
    if kind == "cpu":
        return _cpu_bytes()
    if kind != "cuda" or (number and not number.isdecimal()):
        raise BudgetSyntaxError(f"what {str(device)!r} has free cannot be told; {_REMEDY}")
    cuda = _cuda()
    count = 0 if cuda is None else cuda.device_count()
    if cuda is None or int(number or 0) >= count:
        raise BudgetSyntaxError(
            f"the device {str(device or kind)!r} is not there: torch finds {count} CUDA devices; "
            + _REMEDY
        )
    index = int(number) if number else cuda.current_device()
    free, _ = cuda.mem_get_info(index)
    return int(free) + int(cuda.memory_reserved(index)) - int(cuda.memory_allocated(index))


def bytes_beside(
    device: Any, model: Any = None, optimizer: Any = None, batch: Any = None
) -> dict[str, int]:
    """What training will put on a device besides a step, in bytes, by what it is.

    What is there already is not free any more, and is not counted again. Gradients of parameters
    are no part of it: the step has them.

    Args:
        device: As `available_bytes` takes it.
        model: A module, whose parameters and buffers will be there.
        optimizer: Bytes of its state; one of torch.optim; or a name, such as "adamw", for the
            model's trained parameters.
        batch: Bytes, or the tensors of a batch, in lists, tuples or mappings.

    Raises:
        BudgetSyntaxError: An optimizer of unknown state, or a name without a model.
    """
    return {
        "parameters and buffers": sum(_new_bytes(x, device) for x in _tensors_of(model)),
        "optimizer state": _optimizer_bytes(optimizer, model),
        "batch": _whole_bytes(batch, "a batch")
        if isinstance(batch, int)
        else sum(_new_bytes(x, device) for x in _leaves(batch)),
    }


def _kind(device: Any) -> str:
    """The type of a device, such as "cuda"; that of the default where none is named."""
    kind = str(device or "device").strip().lower().partition(":")[0]
    kind = _SAME.get(kind, kind)
    if kind == "device":
        return "cuda" if _cuda() is not None else "cpu"
    return kind


def _cuda() -> Any:
    """torch.cuda where there is a device."""
    with contextlib.suppress(ImportError):
        import torch

        return torch.cuda if torch.cuda.is_available() else None
    return None


def _cpu_bytes() -> int:
    """What the system has available, within what the control group of the process may take."""
    known = [size for size in (_system_bytes(), _group_bytes()) if size is not None]
    if not known:
        raise BudgetSyntaxError(f"this system does not say how much memory is free; {_REMEDY}")
    return max(0, min(known))


def _system_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_bytes() -> int | None:
    """What is left of a container's limit; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        return limit - int((_CGROUP / "memory.current").read_text())
    return None


def _optimizer_bytes(optimizer: Any, model: Any) -> int:
    if optimizer is None:
        return 0
    if isinstance(optimizer, int):
        return _whole_bytes(optimizer, "an optimizer")
    if isinstance(optimizer, str):
        name = optimizer.strip().lower()
        if model is None:
            raise BudgetSyntaxError(
                f"the state of {optimizer!r} depends on the parameters: give model= as well, or "
                "its bytes"
            )
        parameters = (x for x in model.parameters() if x.requires_grad)
        return _copies(_ALIASES.get(name, name), optimizer) * sum(map(_size, parameters))
    if getattr(optimizer, "state", None):
        return 0  # it is there already
    total = 0
    for group in optimizer.param_groups:
        copies = _copies(type(optimizer).__name__.lower(), type(optimizer).__name__)
        copies += sum(bool(group.get(name)) for name in _ONE_MORE)
        total += copies * sum(_size(x) for x in group["params"] if x.requires_grad)
    return total


def _copies(name: str, shown: str) -> int:
    if name not in _OPTIMIZERS:
        raise BudgetSyntaxError(
            f"what the optimizer {shown!r} keeps is not known; give its bytes, or one of "
            + ", ".join(sorted(_OPTIMIZERS))
        )
    return _OPTIMIZERS[name]


def _whole_bytes(size: int, what: str) -> int:
    if isinstance(size, bool) or size < 0:
        raise BudgetSyntaxError(f"{what} of {size!r} bytes cannot be reserved: give 0 or more")
    return size


def _tensors_of(model: Any) -> Iterator[Any]:
    if model is not None:
        yield from model.parameters()
        yield from model.buffers()


def _leaves(batch: Any) -> Iterator[Any]:
    """The tensors of a batch."""
    if hasattr(batch, "element_size"):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, Iterable) and not isinstance(batch, str):
        for value in batch:
            yield from _leaves(value)


def _new_bytes(tensor: Any, device: Any) -> int:
    """What a tensor will take on a device; 0 where it is there."""
    return 0 if tensor.device.type == _kind(device) else _size(tensor)


def _size(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.element_size())
