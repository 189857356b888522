"""The cache of a right-hand side, from call to call: its plans, and bytes of adaptive steps."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, final

from torch import nn

from ...torch_state.locks import LendingLock
from .captures import Closure
from .fingerprint import Identity, fingerprint
from .references import KEPT

_MOST = 32


@final
class FunctionCache:
    """At most 32 entries by key, the least recently used dropped first; a copy begins empty."""

    anywhere: ClassVar[FunctionCache]
    """For functions that read no modules. Its entries hold on to nothing of the user's."""

    def __init__(self) -> None:
        self.found: dict[Hashable, Any] = {}
        self._owner: weakref.ref[Any] | None = None
        self.lock = LendingLock()
        """Held while steps run: they replace parameters that other threads may read."""

    def __reduce__(self) -> tuple[type[FunctionCache], tuple[()]]:
        return FunctionCache, ()

    def belongs_to(self, owner: Any) -> None:
        """Note the module or function that has this cache as an attribute."""
        try:
            self._owner = weakref.ref(owner)
        except TypeError:  # its kind cannot be referred to weakly
            self._owner = None

    def outlives(self, modules: Sequence[nn.Module]) -> bool:
        """Whether modules live as long as this cache, so that its entries may hold them.

        Parts of the module that has the cache do; others would be kept alive by it.
        """
        owner = None if self._owner is None else self._owner()
        parts = {id(m) for m in owner.modules()} if isinstance(owner, nn.Module) else set[int]()
        return all(id(module) in parts for module in modules)

    def find(self, key: Hashable) -> Any:
        """The entry of a key, now the last to be dropped; None where there is none."""
        value = self.found.pop(key, None)
        if value is not None:
            self.found[key] = value
        return value

    def add(self, key: Hashable, value: Any) -> None:
        """Set the entry of a key; a full cache drops the least recently used one."""
        self.found.pop(key, None)
        while len(self.found) >= _MOST:
            del self.found[next(iter(self.found))]
        self.found[key] = value

    def drop(self, key: Hashable) -> None:
        """Remove the entry of a key."""
        self.found.pop(key, None)


FunctionCache.anywhere = FunctionCache()


def cache_of(func: Callable[..., Any], closure: Closure) -> tuple[FunctionCache, Hashable]:
    """The cache of a right-hand side, and the part of its keys that names the function.

    The cache is an attribute of the first module that the function reads, or of the function's own
    object, and lives as long as that; `FunctionCache.anywhere` serves functions without modules.
    """
    made = isinstance(func, (types.FunctionType, functools.partial))
    same = fingerprint(func) if made else None
    owner: Any = func
    if isinstance(func, types.MethodType):  # one is made anew each time
        owner, same = func.__self__, fingerprint(func) or Identity(func.__func__)
    elif same is not None and closure.modules:
        owner = closure.modules[0]
    elif same is not None:
        return FunctionCache.anywhere, same
    attributes = getattr(owner, "__dict__", None)
    if not isinstance(attributes, dict):
        return FunctionCache(), same
    found: FunctionCache = attributes.setdefault(KEPT, FunctionCache())
    found.belongs_to(owner)
    return found, same
