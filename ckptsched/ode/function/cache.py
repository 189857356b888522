"""What is kept with a right-hand side from call to call: plans, and what adaptive steps take."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, final

from torch import nn

from ...torch_state.locks import Turn
from .captures import Closure
from .fingerprint import Identity, fingerprint
from .references import KEPT

_MOST = 32


@final
class Kept:
    """Findings by what they are for; a copy of what holds them begins anew."""

    anywhere: ClassVar[Kept]
    """For functions that read no modules. These findings hold on to nothing of the user's."""

    def __init__(self) -> None:
        self.found: dict[Hashable, Any] = {}
        self._owner: weakref.ref[Any] | None = None
        self.lock = Turn()
        """Of who runs steps again: they replace what the same modules and functions read."""

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def belongs_to(self, owner: Any) -> None:
        """Note what holds this."""
        try:
            self._owner = weakref.ref(owner)
        except TypeError:  # its kind cannot be referred to weakly
            self._owner = None

    def outlives(self, modules: Sequence[nn.Module]) -> bool:
        """Whether modules live as long as this anyway, so that what is kept may hold them.

        Args:
            modules: Those that a right-hand side reads; parts of the module that holds this do, and
                others would be kept alive by it.
        """
        owner = None if self._owner is None else self._owner()
        parts = {id(m) for m in owner.modules()} if isinstance(owner, nn.Module) else set[int]()
        return all(id(module) in parts for module in modules)

    def find(self, key: Hashable) -> Any:
        """What was found for a key, which is then the last to go; None where nothing was."""
        value = self.found.pop(key, None)
        if value is not None:
            self.found[key] = value
        return value

    def add(self, key: Hashable, value: Any) -> None:
        """Keep something, in the place of what was used longest ago if there is much."""
        self.found.pop(key, None)
        while len(self.found) >= _MOST:
            del self.found[next(iter(self.found))]
        self.found[key] = value

    def drop(self, key: Hashable) -> None:
        """Forget what was found for a key."""
        self.found.pop(key, None)


Kept.anywhere = Kept()


def kept_with(func: Callable[..., Any], closure: Closure) -> tuple[Kept, Hashable]:
    """Where what was found about a right-hand side is, and how it is told from others there.

    With a module that it reads, so that it lives as long as that.

    Args:
        func: The right-hand side.
        closure: What it reads.
    """
    made = isinstance(func, (types.FunctionType, functools.partial))
    same = fingerprint(func) if made else None
    owner: Any = func
    if isinstance(func, types.MethodType):  # one is made anew each time
        owner, same = func.__self__, fingerprint(func) or Identity(func.__func__)
    elif same is not None and closure.modules:
        owner = closure.modules[0]
    elif same is not None:
        return Kept.anywhere, same
    attributes = getattr(owner, "__dict__", None)
    if not isinstance(attributes, dict):
        return Kept(), same
    found: Kept = attributes.setdefault(KEPT, Kept())
    found.belongs_to(owner)
    return found, same
