"""Records the settings, modes and hooks around a forward pass, and restores them.

Autocast, torch's settings of the process, the modes that see every call of torch or every
operation, hooks on what autograd saves, and context variables, in which libraries keep flags of
their own. torch takes some of it off in a backward, such as the default device, and callers end
others with the forward pass.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as dispatch

from ..base.json_files import printable
from .replay_context import Autocast
from .saved_hooks import Hooks, describe_hooks, hooks_now, only_hooks
from .settings import described, read, settings_of, written

_MISSING = object()

# Modes and hooks that are at home here are not entered again once they are off: the first only
# counts, and the second plans a recomputation of its own.
_PASSING = ("torch.utils.flop_counter", "torch.utils.checkpoint")
# Modes that are at home here keep no tensor and make none: they count, or choose a device.
_FREE = ("torch.utils.flop_counter", "torch.utils._device")
_OURS = __name__.partition(".")[0]


@final
@dataclass(frozen=True, slots=True)
class Ambient:
    """Settings, autocast, modes, hooks and context variables at one point of a program."""

    device: torch.device
    autocast: Autocast
    settings: tuple[Any, ...]
    """Values of `settings_of(device)`."""
    functions: tuple[Any, ...]
    """Modes that see every call of torch's functions, the outermost first; with the default
    device, which is one of them."""
    operations: tuple[Any, ...]
    """Modes that see every operation, the outermost first."""
    overrides: Any
    """Whether tensor subclasses see calls of torch's functions; None where torch does not say."""
    hooks: Hooks | None
    """Hooks on what autograd saves."""
    variables: contextvars.Context

    @classmethod
    def take(cls, device: torch.device) -> Ambient:
        """Record everything, for stages on a device."""
        return cls(
            device,
            Autocast.take(device),
            read(settings_of(device)),
            _FUNCTIONS.now(),
            _OPERATIONS.now(),
            _overrides(),
            hooks_now(),
            contextvars.copy_context(),
        )

    def described(self) -> tuple[str, ...]:
        """The settings in words, as a signature keeps them."""
        return described(settings_of(self.device), self.settings)

    def key(self) -> tuple[Hashable, ...]:
        """A key of all that kernels and bytes depend on."""
        modes = tuple([type(m) for m in (*self.functions, *self.operations) if not _passes(m)])
        return str(self.autocast), self.described(), describe_hooks(self.hooks), modes

    def costly_modes(self, *, in_backward: bool = False) -> tuple[str, ...]:
        """Classes of the modes that may compute or keep something of their own.

        A backward calls no function of torch's, so that modes of these do not matter in one.
        """
        seen = self.operations if in_backward else (*self.functions, *self.operations)
        kinds = [type(mode) for mode in seen]
        return tuple(
            [printable(f"{k.__module__}.{k.__qualname__}") for k in kinds if not _is_free(k)]
        )

    def counts_flops_of(self, backward: Ambient) -> bool:
        """Whether a `FlopCounterMode` is around this forward and a backward."""
        both = (mode for mode in self.operations if mode in backward.operations)
        return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in both)

    def __eq__(self, other: object) -> bool:
        """Whether both are the same to what runs among them."""
        return (
            isinstance(other, Ambient)
            and self.settings == other.settings
            and self.autocast == other.autocast
            and _same(self.functions, other.functions)
            and _same(self.operations, other.operations)
            and self.overrides == other.overrides
            and self.hooks == other.hooks
            and not self._variables_unlike(other)
        )

    __hash__ = None  # type: ignore[assignment]

    def found_from(self, outer: Ambient) -> Ambient:
        """The same, as a backward that is surrounded by `outer` must restore it."""
        operations = [m for m in self.operations if m in outer.operations or not _passes(m)]
        hooks = self.hooks
        if hooks is not None and _passes(hooks[0]):
            hooks = outer.hooks
        return replace(self, operations=tuple(operations), hooks=hooks)

    def again(self, now: Ambient) -> AbstractContextManager[None]:
        """A context in which this is restored, where something else than `now` is around.

        Where nothing differs, that is this object itself. Autocast runs without its cache, whatever
        is around: see `Autocast.again`.
        """
        return self.autocast.again() if now is self else self._entered(now)

    def going_back_to(self, outer: Ambient) -> AbstractContextManager[None]:
        """Inside a context of `again`, one in which what is around that is restored.

        Args:
            outer: What is around.
        """
        return nullcontext() if outer is self else outer.again(self)

    @contextmanager
    def _entered(self, now: Ambient) -> Iterator[None]:
        with ExitStack() as stack:
            if self.settings != now.settings:
                stack.enter_context(written(settings_of(self.device), self.settings))
            if self.hooks != now.hooks:
                stack.enter_context(only_hooks(self.hooks))
            for variable, value in self._variables_unlike(now):
                stack.callback(variable.reset, variable.set(value))
            stack.enter_context(self.autocast.again())
            if not _same(self.operations, now.operations):
                stack.enter_context(_in_force(_OPERATIONS, self.operations))
            if not _same(self.functions, now.functions):
                stack.enter_context(_in_force(_FUNCTIONS, self.functions))
            if self.overrides != now.overrides:
                stack.enter_context(_overriding(self.overrides))
            yield

    def _variables_unlike(self, other: Ambient) -> list[tuple[contextvars.ContextVar[Any], Any]]:
        """Variables that have another value there, with their values here.

        One that is set there alone has its default here. None can be given back its having none.
        """
        mine, others = self.variables, other.variables
        if not mine and not others:
            return []
        unlike = [(v, x) for v, x in mine.items() if others.get(v, _MISSING) is not x]
        for variable in others:
            if variable not in mine:
                with suppress(LookupError):
                    unlike.append((variable, contextvars.Context().run(variable.get)))
        return unlike


def _same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _passes(thing: Any) -> bool:
    """Whether a mode or a hook is not to be entered again once it is off."""
    home = getattr(thing, "__module__", None) or type(thing).__module__
    return home in _PASSING


def _is_free(kind: type) -> bool:
    return kind.__module__ in _FREE or kind.__module__.partition(".")[0] == _OURS


# -- modes: torch keeps a stack of them, which a guarded look into its private parts shows


@final
@dataclass(frozen=True, slots=True)
class _ModeStack:
    """One of torch's stacks of modes: those in force, and the class that enters one.

    That class's own: what a mode does besides when its user enters it, such as to set a counter
    to zero, is not done again.
    """

    look: Callable[[], list[Any]]
    base: Any

    def now(self) -> tuple[Any, ...]:
        return tuple(self.look())


_FUNCTIONS = _ModeStack(
    getattr(torch.overrides, "_get_current_function_mode_stack", list), TorchFunctionMode
)
_OPERATIONS = _ModeStack(
    getattr(dispatch, "_get_current_dispatch_mode_stack", list), dispatch.TorchDispatchMode
)


@contextmanager
def _in_force(kind: _ModeStack, modes: tuple[Any, ...]) -> Iterator[None]:
    """Have these modes in force and no others, and those that are now at the end."""
    before = kind.now()
    common = 0
    while common < min(len(before), len(modes)) and before[common] is modes[common]:
        common += 1
    _exchange(kind, before[common:], modes[common:])
    try:
        yield
    finally:
        _exchange(kind, modes[common:], before[common:])


def _exchange(kind: _ModeStack, off: tuple[Any, ...], on: tuple[Any, ...]) -> None:
    for mode in reversed(off):
        kind.base.__exit__(mode, None, None, None)
    for mode in on:
        kind.base.__enter__(mode)


def _overrides() -> Any:
    look = getattr(torch._C, "_get_torch_function_state", None)
    return None if look is None else look()


@contextmanager
def _overriding(state: Any) -> Iterator[None]:
    write: Any = getattr(torch._C, "_set_torch_function_state", None)
    before = _overrides()
    if write is None or state is None:
        yield
        return
    write(state)
    try:
        yield
    finally:
        write(before)
