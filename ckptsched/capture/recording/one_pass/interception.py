"""Lets someone look on while a model runs as it is written.

Six things are told of: what is called of torch, by a `TorchFunctionMode`; calls of modules,
applications of custom Functions, and calls of some functions of the model's code, which are
replaced for the thread; what the model keeps; and every operator that runs, by a
`TorchDispatchMode`, so that nothing happens unseen.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import get_ident
from types import FunctionType
from typing import Any, final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ...policies.keep import kept, told_of_kept

# One recording at a time: what is replaced is replaced for all threads, and passes others by.
_LOCK = threading.RLock()


class Onlooker(ABC):
    """Who is told what a model does."""

    def __init__(self) -> None:
        """Look on in this thread."""
        self._thread, self._depth = get_ident(), 0

    @property
    def is_inside(self) -> bool:
        """Whether what runs now is part of a call that was told of, or of the onlooker's own."""
        return self._depth > 0

    @property
    def is_concerned(self) -> bool:
        """Whether a call that is made now is to be told of."""
        return not self._depth and get_ident() == self._thread

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done here is no call of the model's."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @abstractmethod
    def torch_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Something of torch is called.

        Args:
            func: A function of torch, a method of tensors, or the access to a property.
            args: What it is given.
            kwargs: The same by name.
        """

    @abstractmethod
    def module(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """A module is called.

        Args:
            module: The module.
            call: `nn.Module.__call__`.
            args: What it is given.
            kwargs: The same by name.
        """

    @abstractmethod
    def function(
        self, cls: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A custom autograd Function is applied.

        Args:
            cls: Its class.
            apply: Applies it.
            args: What it is given.
            kwargs: The same by name.
        """

    @abstractmethod
    def whole_function(
        self,
        function: FunctionType,
        original: FunctionType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A function of the model's code is called that is to be called whole.

        Args:
            function: The function.
            original: What it does.
            args: What it is given.
            kwargs: The same by name.
        """

    @abstractmethod
    def hook_removed(self) -> None:
        """A hook is about to be taken off."""

    @abstractmethod
    def operator(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """An operator has run.

        Args:
            func: The operator.
            args: What it was given by position.
            result: What it gave.
        """


@contextmanager
def told_of_calls(onlooker: Onlooker, functions: Iterable[FunctionType] = ()) -> Iterator[None]:
    """Tell someone what is called within a `with` block, one thread at a time.

    Args:
        onlooker: Who is told.
        functions: Of the model's code, those that it is told of.
    """
    call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
    remove = RemovableHandle.remove

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if onlooker.is_concerned:
            return onlooker.module(module, call, args, kwargs)
        return call(module, *args, **kwargs)

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if onlooker.is_concerned:
            return onlooker.function(cls, apply.__get__(None, cls), args, kwargs)
        return apply.__get__(None, cls)(*args, **kwargs)

    def keeps(tensor: torch.Tensor) -> None:
        if onlooker.is_concerned:
            onlooker.torch_function(kept, (tensor,), {})

    def removed(handle: RemovableHandle) -> None:
        if onlooker.is_concerned:
            onlooker.hook_removed()
        remove(handle)

    with ExitStack() as stack:
        stack.enter_context(_LOCK)
        for function in functions:
            stack.enter_context(_told_of(function, onlooker))
        stack.enter_context(told_of_kept(keeps))
        stack.enter_context(_Watch(onlooker))
        stack.enter_context(_Notes(onlooker))
        setattr(nn.Module, "__call__", called)  # noqa: B010 - as a method it has another type
        torch.autograd.Function.apply = classmethod(applied)
        setattr(RemovableHandle, "remove", removed)  # noqa: B010
        try:
            yield
        finally:
            setattr(nn.Module, "__call__", call)  # noqa: B010
            torch.autograd.Function.apply = apply
            setattr(RemovableHandle, "remove", remove)  # noqa: B010


@contextmanager
def _told_of(function: FunctionType, onlooker: Onlooker) -> Iterator[None]:
    """Tell of calls of a function, wherever somebody has it from: its code is replaced."""
    code, defaults, by_name = function.__code__, function.__defaults__, function.__kwdefaults__
    original = FunctionType(code, function.__globals__, function.__name__, defaults)
    original.__kwdefaults__ = by_name

    def called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if onlooker.is_concerned:
            return onlooker.whole_function(function, original, args, kwargs)
        return original(*args, **kwargs)

    instead = _handed_on.__code__
    consts = tuple([called if each == _CALLED else each for each in instead.co_consts])
    function.__defaults__ = function.__kwdefaults__ = None
    function.__code__ = instead.replace(co_consts=consts)
    try:
        yield
    finally:
        function.__code__ = code
        function.__defaults__, function.__kwdefaults__ = defaults, by_name


_CALLED = "what is called instead"


def _handed_on(*args: Any, **kwargs: Any) -> Any:
    called: Any = "what is called instead"
    return called(args, kwargs)


@final
class _Notes(TorchFunctionMode):
    """Tells what is called of torch."""

    def __init__(self, onlooker: Onlooker) -> None:
        super().__init__()
        self._onlooker = onlooker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._onlooker.torch_function(func, args, kwargs or {})


@final
class _Watch(TorchDispatchMode):
    """Tells which operators run."""

    supports_higher_order_operators = True

    def __init__(self, onlooker: Onlooker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._onlooker = onlooker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._onlooker.aside():  # modes below look at tensors, which the model does not
            result = func(*args, **(kwargs or {}))
        self._onlooker.operator(func, args, result)
        return result
