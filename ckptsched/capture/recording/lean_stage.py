"""A stage of a recorded model with a lean tape."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from ...recompute.lean_tape import Call, LeanTape
from ...torch_state.replay_context import Autocast, Recomputing
from ..stage_discovery import StageCall
from .recording import Span


@final
class LeanStage(StageCall):
    """The calls between two cuts, with a tape that leaves out what cheap calls made."""

    __slots__ = ("_again", "_lean_calls", "_named", "_plain", "_span")

    def __init__(
        self, plain: StageCall, span: Span, cheap: Sequence[bool], named: Sequence[str] = ()
    ) -> None:
        """Take the calls of a stage.

        Args:
            plain: The stage with its own tape.
            span: The calls.
            cheap: For each whether a backward may make it again.
            named: For each what people call it; empty for one that computes nothing.
        """
        self.prefix, self._plain, self._span = "", plain, span
        self._again: tuple[int, ...] = ()
        self._named = tuple(named)
        self._lean_calls = tuple(
            [
                Call(call.values, call.makes, call.writes, again)
                for call, again in zip(span.calls, cheap, strict=True)
            ]
        )

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """What has the parameters and buffers that the calls use."""
        return self._plain.module

    @property
    def label(self) -> str:
        """That of the stage."""
        return self._plain.label

    @property
    def name(self) -> str:
        """That of the stage."""
        return self._plain.name

    @property
    def key(self) -> Hashable:
        """That of the stage: it computes the same."""
        return self._plain.key

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the calls; without gradients there is no tape, and so none that is lean."""
        if not torch.is_grad_enabled():
            return self._plain(x)
        span = self._span
        values = dict(zip(span.enters, x, strict=True))
        tape = LeanTape(self._lean_calls, _Remaking(self, x[0].device))
        del x
        tape.note(values, span.enters)
        with tape.saving():
            for k, call, spent in zip(span.indices, self._lean_calls, span.spent, strict=True):
                span.bound.run(k, values)
                tape.note(values, call.makes)
                for number in spent:
                    values.pop(number, None)
                tape.forget_all_but(values)
        self._again = tape.settle(span.enters, span.leaves)
        return tuple([values[number] for number in span.leaves])

    @property
    def made_again(self) -> tuple[int, ...]:
        """The calls that the last tape is to make again."""
        return self._again

    def names_of(self, calls: Sequence[int]) -> tuple[str, ...]:
        """What people call some calls, each once; those that compute nothing have no name.

        Args:
            calls: Which, counted from 0 in this stage.
        """
        return tuple(dict.fromkeys(self._named[k] for k in calls if self._named[k]))

    def make_again(
        self, calls: Sequence[int], spent: Sequence[Sequence[int]], values: dict[int, Tensor]
    ) -> None:
        """Make some of the calls again, and put what they make among the values.

        Args:
            calls: Which, counted from 0 in this stage.
            spent: For each the numbers of the values that are let go after it.
            values: What they read, by number.
        """
        for k, gone in zip(calls, spent, strict=True):
            self._span.bound.run(self._span.indices[k], values)
            for number in gone:
                values.pop(number, None)


@final
class _Remaking:
    """Makes calls of a stage again as they were made: under its autocast, and in its modes."""

    __slots__ = ("_autocast", "_modes", "_stage")

    def __init__(self, stage: LeanStage, device: torch.device) -> None:
        self._stage, self._autocast = stage, Autocast.take(device)
        self._modes = [(module, module.training) for module in stage.module.modules()]

    def __call__(
        self, calls: Sequence[int], spent: Sequence[Sequence[int]], values: dict[int, Tensor]
    ) -> None:
        with torch.no_grad(), self._autocast.again(), Recomputing(), self._as_it_was():
            self._stage.make_again(calls, spent, values)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Modules in their modes then, and with copies of their buffers, which may change."""
        now = [(module, module.training, module._buffers) for module, _ in self._modes]
        try:
            for module, mode in self._modes:
                module.training = mode
                if mode and module._buffers:
                    module._buffers = {
                        name: None if buffer is None else buffer.clone()
                        for name, buffer in module._buffers.items()
                    }
            yield
        finally:
            for module, mode, buffers in now:
                module.training = mode
                module._buffers = buffers
