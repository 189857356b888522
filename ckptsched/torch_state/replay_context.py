"""Random state and autocast of a run of a stage, restored when it runs again; a clock."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from threading import get_ident
from typing import Any, ClassVar, TypeAlias, final

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..base.errors import ExecutionError
from .foreign_generators import Foreign
from .locks import LendingLock, in_forked_process

_AS_IT_IS = nullcontext()

_recomputing: ContextVar[bool] = ContextVar("ckptsched_recomputing", default=False)


def is_recomputing() -> bool:
    """Whether the stage that calls this is being run again, and not for the first time in a step.

    A checkpointed model runs a stage again in its backward, and `profile` runs each stage many
    times. What a stage does besides computing its output (count, log, append to a list) should
    then be left out. The answer holds for the calling thread.

    Returns:
        True while ckptsched runs a stage again or measures it; False in the first run of a step,
        under plain autograd and outside of stages.

    Example:
        >>> class Counting(torch.nn.Linear):
        ...     seen = 0
        ...
        ...     def forward(self, x):
        ...         if not is_recomputing():
        ...             self.seen += len(x)
        ...         return super().forward(x)
    """
    return _recomputing.get()


@final
class Recomputing:
    """A `with` block in which `is_recomputing()` is True; a class, as it is entered every step."""

    __slots__ = ("_token",)

    _token: Token[bool]

    def __enter__(self) -> None:
        self._token = _recomputing.set(True)

    def __exit__(self, *exception: object) -> None:
        _recomputing.reset(self._token)


ContextFn: TypeAlias = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Gives what is around the first run of stages, and what is around those that run again."""


def contexts(context_fn: ContextFn) -> tuple[AbstractContextManager[Any], ...]:
    """The two contexts that a user's function gives, made anew; it may give nothing else."""
    found = context_fn()
    if (
        isinstance(found, tuple | list)
        and len(found) == 2
        and all(hasattr(type(c), "__enter__") and hasattr(type(c), "__exit__") for c in found)
    ):
        return tuple(found)
    raise ExecutionError(
        "context_fn must return two context managers, one for the first run of stages and one for "
        f"running them again; found {found!r}"
    )


@final
@dataclass(frozen=True, slots=True)
class RandomState:
    """A snapshot of random generators: the default ones, and others by request."""

    cpu: Tensor
    """State of the CPU's generator; a tensor of about 5 kB, which counts as memory."""
    cuda: tuple[tuple[int, Tensor], ...]
    """State of CUDA generators by device index; small tensors on the CPU."""
    own: tuple[tuple[torch.Generator, Tensor], ...] = ()
    """Generators of the model or the caller, each with its state, a tensor on the CPU."""
    foreign: tuple[tuple[Foreign, bytes], ...] = ()
    """Generators that are not torch's, each with its state."""

    @classmethod
    def take(cls, device: torch.device, own: Iterable[AnyGenerator] = ()) -> RandomState:
        """Read the generators that a stage on this device may draw from, and further ones."""
        cuda: tuple[tuple[int, Tensor], ...] = ()
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            cuda = ((index, torch.cuda.get_rng_state(index)),)
        mine, foreign = _apart(own)
        return cls(
            torch.get_rng_state(),
            cuda,
            tuple([(g, g.get_state()) for g in mine]),
            tuple([(g, g.get_state()) for g in foreign]),
        )

    def restore(self) -> None:
        """Put the generators back to where they were."""
        torch.set_rng_state(self.cpu)
        for index, state in self.cuda:
            torch.cuda.set_rng_state(state, index)
        for generator, state in self.own:
            generator.set_state(state)
        for foreign, values in self.foreign:
            foreign.set_state(values)

    def __eq__(self, other: object) -> bool:
        """Whether both would give the same numbers."""
        return (
            isinstance(other, RandomState)
            and self._homes == other._homes
            and self.to_bytes() == other.to_bytes()
        )

    __hash__ = None  # type: ignore[assignment]

    def to_bytes(self) -> bytes:
        """The state as Python's bytes, to compare."""
        states = [t.numpy().tobytes() for t in (self.cpu, *(state for _, state in self._others))]
        return b"".join([*states, *(state for _, state in self.foreign)])

    @property
    def _homes(self) -> list[Any]:
        return [home for home, _ in (*self._others, *self.foreign)]

    @property
    def _others(self) -> tuple[tuple[Any, Tensor], ...]:
        return (*self.cuda, *self.own)

    @property
    def counted_bytes(self) -> int:
        """Bytes on the device that the meter sees: states lie on the CPU."""
        return 0 if self.cuda else self.cpu.nbytes + sum(state.nbytes for _, state in self.own)


AnyGenerator: TypeAlias = torch.Generator | Foreign
"""A random generator besides torch's default ones."""


def _apart(own: Iterable[AnyGenerator]) -> tuple[list[torch.Generator], list[Foreign]]:
    """Those of torch's kind, and others."""
    mine: list[torch.Generator] = []
    foreign: list[Foreign] = []
    for generator in own:
        if isinstance(generator, Foreign):
            foreign.append(generator)
        else:
            mine.append(generator)
    return mine, foreign


@final
class Generators:
    """Copies of random generators: a state that is kept without a tensor."""

    lock: ClassVar[LendingLock] = LendingLock()
    """Held by who draws random numbers that must come again: all threads share a generator."""

    def __init__(self, device: torch.device, own: Iterable[AnyGenerator] = ()) -> None:
        """Copy the generators that a stage on this device may draw from, and further ones."""
        mine, foreign = _apart(own)
        self._own = [(generator, generator.clone_state()) for generator in mine]
        self._foreign = [(generator, generator.get_state()) for generator in foreign]
        self._cpu = torch.default_generator.clone_state()
        self._cuda: torch.Generator | None = None
        if device.type == "cuda":
            self._index = torch.cuda.current_device() if device.index is None else device.index
            self._cuda = torch.cuda.default_generators[self._index].clone_state()

    def restore(self) -> None:
        """Put the generators to where they were."""
        torch.set_rng_state(self._cpu.get_state())
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda.get_state(), self._index)
        for generator, copied in self._own:
            generator.set_state(copied.get_state())
        for other, state in self._foreign:
            other.set_state(state)


@final
@dataclass(frozen=True, slots=True)
class Autocast:
    """Autocast as it was: on or off and to which dtype, by device type."""

    modes: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def take(cls, device: torch.device) -> Autocast:
        """Read the modes that matter on this device."""
        kinds = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        return cls(
            tuple(
                [
                    (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                    for kind in kinds
                    if torch.amp.is_autocast_available(kind)
                ]
            )
        )

    @classmethod
    def off(cls, device: torch.device) -> Autocast:
        """No autocast, which is how torch asks for a backward to be run."""
        return cls(tuple((kind, False, dtype) for kind, _, dtype in cls.take(device).modes))

    def __str__(self) -> str:
        """Such as "cpu to torch.bfloat16"; "off" where it is."""
        on = [f"{kind} to {dtype}" for kind, enabled, dtype in self.modes if enabled]
        return ", ".join(on) or "off"

    @property
    def is_on(self) -> bool:
        """Whether it is on for any device type."""
        return any(enabled for _, enabled, _ in self.modes)

    def again(self, *, cached: bool = False) -> AbstractContextManager[None]:
        """Run under the same modes, without the cache of cast weights but for plain autograd.

        The cache would tie the weights of one run of a stage to those of another, and a cached
        weight that was cast without gradients would lose them.
        """
        for kind, enabled, _ in self.modes:
            if enabled or torch.is_autocast_enabled(kind):
                return self._entered(cached)
        return _AS_IT_IS

    @contextmanager
    def _entered(self, cached: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in self.modes:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached)
                    )
            yield


@final
class OneWay:
    """A `with` block in which a stage computes one way, with its tape and without, each time.

    Attention keeps to the kernels that it takes under gradients. Without gradients, in eval mode,
    torch's transformer layers take a fused path that rounds differently; a stage would then give
    one result with its tape and another without. torch has one switch for all threads: the first
    one in turns it, the last one out turns it back.

    Parametrized weights are computed where they are read, also under `parametrize.cached()`: what
    a run without tape, or with stand-ins for parameters, left in torch's cache would be taken by
    others, who would lose gradients; and what others left there leads out of a stage's tape.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _inside: ClassVar[list[int]] = []
    """The threads that are inside, each as often as it has come in."""
    _before: ClassVar[bool] = True

    __slots__ = ("_cached",)

    _cached: tuple[int, Any]

    def __enter__(self) -> None:
        cls = type(self)
        with cls._lock:
            if not cls._inside:
                cls._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            cls._inside.append(get_ident())
        self._cached = (depth := caching()), parametrize._cache if depth else None
        if depth:
            parametrize._cache_enabled, parametrize._cache = 0, {}

    def __exit__(self, *exception: object) -> None:
        cls = type(self)
        depth, cache = self._cached
        if depth:
            # Others may have come or gone meanwhile: who was last to go has emptied the cache.
            parametrize._cache_enabled += depth
            parametrize._cache = cache if parametrize._cache_enabled else {}
        with cls._lock:
            cls._inside.remove(get_ident())
            if not cls._inside:
                torch.backends.mha.set_fastpath_enabled(cls._before)

    @classmethod
    def keep_own(cls) -> None:
        """In a forked process: forget the threads that are not there."""
        cls._lock = threading.Lock()
        if cls._inside:
            cls._inside[:] = [thread for thread in cls._inside if thread == get_ident()]
            if not cls._inside:
                torch.backends.mha.set_fastpath_enabled(cls._before)


in_forked_process(OneWay.keep_own)


def caching() -> int:
    """How many `torch.nn.utils.parametrize.cached()` are in force, for all threads.

    torch's names for it are private: where it has them no more, the answer is 0.
    """
    found: int = getattr(parametrize, "_cache_enabled", 0)
    return found if hasattr(parametrize, "_cache") else 0


def uncompiled() -> AbstractContextManager[object]:
    """Let compiled code run as it is written: among modes torch would give it up for good."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
