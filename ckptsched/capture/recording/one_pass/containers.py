"""Lists, dicts and sets that a model keeps, and who changes them in a pass."""

from __future__ import annotations

from collections import deque
from typing import Any, final

from torch import nn

from ..calls import is_plain_object
from .owned import OF_EVERY_MODULE

_DEPTH = 2  # of containers in containers
_LONGEST = 1000  # longer ones count by their length


@final
class Containers:
    """Tells which containers are changed both by calls and by lines between them.

    A call that is made again, such as that of a module whose hook appends to a list, changes them
    again. Lines between calls are not run again: a list that they empty would grow at each step.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at what they hold before a pass.

        Args:
            model: The model.
        """
        self._all = [
            (path, name, value)
            for path, module in model.named_modules()
            for name, value in _attributes(module)
            if isinstance(value, list | dict | set | deque)
        ]
        self._held = [_content(value) for _, _, value in self._all]
        self._by_calls: dict[int, str] = {}
        self._between: set[int] = set()

    def look_between_calls(self) -> None:
        """What is another since the last look, lines of the model have changed."""
        self._between.update(self._changed())

    def look_after_call(self, scope: str) -> None:
        """What is another since the last look, a call has changed.

        Args:
            scope: Path of the module that has made the call.
        """
        for k in self._changed():
            self._by_calls.setdefault(k, scope)

    def changed_by_both(self) -> list[tuple[str, str, str]]:
        """Of each the path of its module, its name there, and the scope of the first such call."""
        both = self._by_calls.keys() & self._between
        return [(*self._all[k][:2], self._by_calls[k]) for k in sorted(both)]

    def _changed(self) -> list[int]:
        found = []
        for k, (_, _, value) in enumerate(self._all):
            now = _content(value)
            if now != self._held[k]:
                self._held[k] = now
                found.append(k)
        return found


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Those of a module, and of plain objects among them, each with its name."""
    found = []
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE:
            found.append((name, value))
            if is_plain_object(value):
                found += [(f"{name}.{inner}", part) for inner, part in vars(value).items()]
    return found


def _content(value: Any, depth: int = _DEPTH) -> object:
    """What a container holds, by identity."""
    if not depth or not isinstance(value, list | dict | set | deque):
        return id(value)
    if len(value) > _LONGEST:
        return len(value)
    if isinstance(value, dict):
        return tuple([(id(key), _content(part, depth - 1)) for key, part in value.items()])
    if isinstance(value, set):
        return frozenset(map(id, value))
    return tuple([_content(part, depth - 1) for part in value])
