"""Which modules the next pass must call whole, and why."""

from __future__ import annotations

import sys
from types import CodeType
from typing import final

# Packages whose code is not where a model has gone another way.
_NOT_OF_MODELS = ("torch.", "ckptsched.")


@final
class Marks:
    """Where the model is, and modules in which something happens that a call cannot hold."""

    def __init__(self, outside: CodeType) -> None:
        """There are none yet.

        Args:
            outside: The code that calls the model.
        """
        self.marked: dict[str, str] = {}
        """Modules that the next recording must call whole, by path, and why."""
        self.scopes: list[str] = [""]
        """Paths of the modules whose forward runs, the outermost first."""
        self._outside = outside

    def mark(self, why: str, path: str | None = None) -> None:
        """Have the innermost module called whole the next time.

        Args:
            why: The reason, for people.
            path: Of another module than the innermost.
        """
        where = self.scopes[-1] if path is None else path
        if where not in self.marked:
            self.marked[where] = f"{why}{self.line()}"

    def mark_around(self, why: str, *paths: str) -> None:
        """Have the innermost module called whole that contains others, or is one of them.

        Args:
            why: The reason, for people.
            paths: Those of the others.
        """
        parts = []
        for names in zip(*(path.split(".") for path in paths), strict=False):
            if len({*names}) > 1:
                break
            parts.append(names[0])
        self.mark(why, ".".join(parts))

    def line(self) -> str:
        """Where in its own code the model is, in words; empty once its forward is over."""
        frame, found = sys._getframe(1), ""
        while frame is not None and frame.f_code is not self._outside:
            if not found and not frame.f_globals.get("__name__", "").startswith(_NOT_OF_MODELS):
                found = f" ({frame.f_code.co_filename}, line {frame.f_lineno})"
            frame = frame.f_back  # type: ignore[assignment]
        return found if frame is not None else ""
