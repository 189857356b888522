"""Checks that a model lies on one device, where bytes are counted and random states kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .pytree import State

KNOWN = ("cpu", "cuda")
"""Types of devices whose bytes can be counted and whose random state can be put back."""


def matters(tensor: Tensor) -> bool:
    """Whether a tensor decides where a model is.

    Operations on a GPU take numbers without dimensions, lengths and indices from the CPU.
    """
    small = tensor.device.type == "cpu" and not (
        tensor.is_floating_point() or tensor.is_complex() or tensor.requires_grad
    )
    return tensor.dim() > 0 and not small


def several_devices(named: Iterable[tuple[str, Tensor]]) -> str:
    """Where named tensors are, in words, if they are on more than one device; else nothing."""
    found: dict[torch.device, str] = {}
    for name, tensor in named:
        if matters(tensor):
            found.setdefault(tensor.device, name)
    places = [f"{name} on {device}" for device, name in found.items()]
    return ", ".join(places) if len(places) > 1 else ""


def what_is_wrong(owned: Iterable[tuple[str, Tensor]], inputs: State, given: State) -> str:
    """Say why a model cannot be measured where it lies; empty if it can.

    `owned` are its parameters and buffers, each with what it is.
    """
    owned = list(owned)
    sample = [
        *(("the sample", leaf) for leaf in inputs.leaves),
        *(("what every stage is given", leaf) for leaf in given.leaves),
    ]
    where = several_devices([*owned, *sample])
    first = inputs.leaves[0].device
    if not where:  # a sample of numbers on the CPU is told apart from where the model is
        there = [(name, t) for name, t in owned if matters(t) and t.device != first][:1]
        where = "".join(f"the sample on {first}, {name} on {t.device}" for name, t in there)
    if not where:
        return ""
    return (
        f"the model and its sample are on more than one device ({where}), and bytes are counted "
        "and random states kept on one: put all of them there (model.to(device), x.to(device)); "
        "numbers without dimensions and integers may stay on the CPU"
    )


def drawn_elsewhere(device: torch.device) -> tuple[bytes, ...]:
    """States of the random generators of GPUs other than a device, to compare."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ()
    own = device.index if device.type == "cuda" else None
    if device.type == "cuda" and own is None:
        own = torch.cuda.current_device()
    others = (k for k in range(torch.cuda.device_count()) if k != own)
    return tuple([torch.cuda.get_rng_state(k).numpy().tobytes() for k in others])
