"""Random generators that are not torch's: Python's and numpy's.

Nothing puts them back when a stage runs again, so a stage that draws from one is refused. Measuring
leaves them as they were.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable
from typing import Any, final

import numpy as np


@final
class ForeignGenerators:
    """The generators of Python and numpy that a program and its modules have, as they are now.

    Lists, tuples and dicts among the values that a program keeps are looked into.
    """

    def __init__(self, values: Iterable[object]) -> None:
        values = [*values]
        inside: list[Any] = []
        for value in values:
            if isinstance(value, (list, tuple)):
                inside += value
            elif isinstance(value, dict):
                inside += value.values()
        kinds = (random.Random, np.random.Generator, np.random.RandomState)
        found = {
            id(value): value
            for value in (*values, *inside)
            if isinstance(value, kinds) and not isinstance(value, random.SystemRandom)  # no state
        }
        self._found: list[Any] = [random, np.random, *found.values()]
        self._states = [_state_of(generator) for generator in self._found]

    @classmethod
    def of(cls, modules: Iterable[object]) -> ForeignGenerators:
        """Those that are attributes of modules, their submodules not among them."""
        return cls(value for module in modules for value in vars(module).values())

    def moved(self) -> bool:
        """Whether any of them has been drawn from since."""
        return [*map(_comparable, self._found)] != [*map(pickle.dumps, self._states)]

    def restore(self) -> None:
        """Put them to where they were."""
        for generator, state in zip(self._found, self._states, strict=True):
            if _comparable(generator) == pickle.dumps(state):
                continue
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = state
            elif hasattr(generator, "setstate"):
                generator.setstate(state)
            else:
                generator.set_state(state)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if hasattr(generator, "getstate") else generator.get_state()


def _comparable(generator: Any) -> bytes:
    return pickle.dumps(_state_of(generator))
