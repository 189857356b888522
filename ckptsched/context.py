"""What a run of a stage sees besides its input: random state, autocast, and the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class RandomState:
    """A snapshot of the default random generators."""

    cpu: Tensor
    """State of the CPU's generator; a tensor of about 5 kB, which counts as memory."""
    cuda: tuple[tuple[int, Tensor], ...]
    """State of CUDA generators by device index; small tensors on the CPU."""

    @classmethod
    def take(cls, device: torch.device) -> RandomState:
        """Read the generators that a stage on this device may draw from."""
        cuda: tuple[tuple[int, Tensor], ...] = ()
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            cuda = ((index, torch.cuda.get_rng_state(index)),)
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put the generators back to where they were."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda:
            torch.cuda.set_rng_state(state, index)

    def __eq__(self, other: object) -> bool:
        """Whether both would give the same numbers."""
        return (
            isinstance(other, RandomState)
            and torch.equal(self.cpu, other.cpu)
            and len(self.cuda) == len(other.cuda)
            and all(
                mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])
                for mine, theirs in zip(self.cuda, other.cuda, strict=True)
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def to_bytes(self) -> bytes:
        """The state as Python's bytes, to compare."""
        return b"".join(t.numpy().tobytes() for t in (self.cpu, *(t for _, t in self.cuda)))

    @property
    def counted_bytes(self) -> int:
        """Bytes on the device that the meter sees: the CPU's own state, on the CPU only."""
        return 0 if self.cuda else self.cpu.nbytes


@final
@dataclass(frozen=True, slots=True)
class Autocast:
    """Autocast as it was: on or off and to which dtype, by device type."""

    modes: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def take(cls, device: torch.device) -> Autocast:
        """Read the modes that matter on this device."""
        return cls(
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in dict.fromkeys(("cpu", device.type))
                if torch.amp.is_autocast_available(kind)
            )
        )

    def __str__(self) -> str:
        """Such as "cpu to torch.bfloat16"; "off" where it is."""
        on = [f"{kind} to {dtype}" for kind, enabled, dtype in self.modes if enabled]
        return ", ".join(on) or "off"

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run under the same modes, without the cache of cast weights.

        The cache would tie the weights of one run of a stage to those of another, and a cached
        weight that was cast without gradients would lose them.
        """
        with ExitStack() as stack:
            for kind, enabled, dtype in self.modes:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield


@contextmanager
def one_kernel() -> Iterator[None]:
    """Keep attention to the kernels that it takes under gradients.

    Without gradients, in eval mode, torch's transformer layers take a fused path that rounds
    differently; a stage would then give one result with its tape and another without.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
