"""What a model may do between the calls of a recording, where no call shows it.

It seeds torch's generator, or sets it; it draws from Python's or numpy's; it changes settings of
torch; it enters a mode, or a hook on what autograd saves, that gives others than torch itself.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, final

import torch
from torch import nn
from torch.utils import _python_dispatch

from ..torch_state.foreign_generators import generators_of
from ..torch_state.replay_context import RandomState
from ..torch_state.saved_hooks import innermost_hooks
from ..torch_state.settings import EVERYWHERE

# Modes that look on would see each look at the generators, which is most of what there is to see.
_without_functions: Any = getattr(torch._C, "DisableTorchFunction", nullcontext)
# torch's checkpoint gives what there is without it.
_HARMLESS = ("torch.utils.checkpoint",)


@final
class Unseen:
    """Tells what has changed outside of calls."""

    def __init__(self, device: torch.device, modules: Iterable[nn.Module] = ()) -> None:
        """Look at how all is before a forward pass.

        Args:
            device: Where the model lies.
            modules: Its modules, of which some may have generators that are not torch's.
        """
        self._device, self._own = device, generators_of(modules)
        self._modes, self._hooks = _mode(), innermost_hooks()
        self._settings = _settings()
        self.pass_over()

    def pass_over(self) -> None:
        """What has changed until now, a call has done."""
        self._python = self._python_random()
        self.pass_over_torch()

    def pass_over_torch(self) -> None:
        """The same of torch's own generators, which most calls leave alone."""
        self._torch = self._random()

    def _random(self) -> bytes:
        with _without_functions():
            return RandomState.take(self._device).to_bytes()

    def between_calls(self) -> str:
        """What has been done since the last call; empty for nothing."""
        if _settings() != self._settings:
            return "it changes settings of torch in its forward"
        if self._random() != self._torch:
            return "it seeds torch's random generator, or sets it"
        mode, hooks = _mode(), innermost_hooks()
        if mode is not self._modes and not _is_harmless(type(mode)):
            return f"it enters {type(mode).__name__}, a mode that a stage would run without"
        if hooks != self._hooks and not (hooks and all(map(_is_harmless, hooks))):
            return "it hooks what autograd saves, which a stage would save without"
        return ""

    def has_drawn(self) -> bool:
        """Whether anyone has drawn from a generator that is not torch's since the last time."""
        now = self._python_random()
        drawn, self._python = now != self._python, now
        return drawn

    def _python_random(self) -> int:
        return hash((_python_random(), *[generator.get_state() for generator in self._own]))


def _is_harmless(found: Any) -> bool:
    return getattr(found, "__module__", "") in _HARMLESS


def _mode() -> Any:
    """The innermost dispatch mode; None where torch does not tell."""
    stack: Any = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list)()
    return stack[-1] if stack else None


def _settings() -> tuple[Any, ...]:
    return tuple([setting.read() for setting in EVERYWHERE])


def _python_random() -> int:
    """What changes whenever somebody draws from Python's or numpy's own generator."""
    numpy: Any = sys.modules.get("numpy")
    drawn = () if numpy is None else numpy.random.get_state()
    numpys = tuple(part.tobytes() if k == 1 else part for k, part in enumerate(drawn))
    return hash((random.getstate(), numpys))
