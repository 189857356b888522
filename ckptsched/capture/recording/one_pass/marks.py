"""Which modules and functions the next pass must call whole, and why."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any, final

from torch import nn

from ..calls import is_plain_object, tensors_inside

# Packages whose code is not where a model has gone another way.
_NOT_OF_MODELS = ("torch.", "ckptsched.")
_COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")


@final
class Marks:
    """Where the model is, and modules in which something happens that a call cannot hold."""

    def __init__(
        self,
        outside: CodeType,
        calls_module: CodeType | None = None,
        opens: Callable[[str], bool] = lambda path: False,
    ) -> None:
        """There are none yet.

        Args:
            outside: The code that calls the model.
            calls_module: The code that calls a module, and knows its path if the model has it.
            opens: Whether a module has parts that are worth opening, so that rather a function that
                its forward calls is called whole; by its path.
        """
        self.marked: dict[str, str] = {}
        """Modules that the next recording must call whole, by path, functions by name, and why."""
        self.scopes: list[str] = [""]
        """Paths of the modules whose forward runs, the outermost first."""
        self._outside, self._calls_module, self._opens = outside, calls_module, opens

    def mark(self, why: str, path: str | None = None) -> None:
        """Have the innermost module called whole the next time, or a function that it calls.

        Args:
            why: The reason, for people.
            path: Of another module than the innermost.
        """
        where = path
        if where is None:
            where = self.scopes[-1]
            if self._opens(where):
                where = next(self._functions(), where)
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

    def _calls_the_innermost(self, frame: FrameType) -> bool:
        if frame.f_code is self._calls_module:
            return frame.f_locals.get("path") is not None  # others were made on the way
        return frame.f_code is self._outside

    def _functions(self) -> Iterator[str]:
        """Names of the functions that the innermost module's forward has called, outermost first.

        Only of those that are given all that they compute with, as far as can be seen.
        """
        frames: list[FrameType] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not self._calls_the_innermost(frame):
            frames.append(frame)
            frame = frame.f_back
        if frame is None:  # the forward is over
            return
        forward = False  # whether the frame is one of its own, or below it
        for frame in reversed(frames):
            given = list(_given(frame))
            home = frame.f_globals.get("__name__", "")
            of_model = not home.startswith(_NOT_OF_MODELS)
            if any(isinstance(value, nn.Module) for value in given):
                forward = forward or of_model  # or a method of it
            elif not forward:
                continue  # what is around it
            elif not of_model or any(map(_may_hide, given)):
                return
            elif frame.f_code.co_name not in _COMPREHENSIONS:
                name = f"{home}:{frame.f_code.co_qualname}"
                function = function_named(name)
                if function is not None and function.__code__ is frame.f_code:
                    yield name


def _given(frame: FrameType) -> Iterator[Any]:
    """What a function was given, as far as its names still say it."""
    code = frame.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    for name in code.co_varnames[:count]:
        value = frame.f_locals.get(name)
        yield value
        if isinstance(value, tuple | list):
            yield from value
        elif isinstance(value, dict):
            yield from value.values()


def _may_hide(value: Any) -> bool:
    """Whether tensors may lie in an argument where a recording does not see them."""
    return inspect.isroutine(value) or (is_plain_object(value) and any(tensors_inside(value)))


def is_function(name: str) -> bool:
    """Whether something that is called whole is a function, and not the path of a module."""
    return ":" in name


def function_named(name: str) -> FunctionType | None:
    """The function of a name; None where there is no such, or one that closes over something.

    Args:
        name: The module's name and the function's in it, such as "package.losses:box_loss".
    """
    home, _, path = name.partition(":")
    found: Any = sys.modules.get(home)
    for part in path.split("."):
        found = inspect.getattr_static(found, part, None)
    found = inspect.unwrap(getattr(found, "__func__", found)) if callable(found) or found else None
    return found if isinstance(found, FunctionType) and not found.__closure__ else None
