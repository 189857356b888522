"""Random generators that are not torch's: Python's and numpy's, and those that modules keep.

A stage that draws from one runs again from the state that its first run began with, as it does with
torch's. They are read where stages are measured, and in steps of models that were found to draw
from them: to read them in every step would cost all models time.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable
from typing import Any, final

import numpy as np


@final
class Foreign:
    """A random generator that is not torch's, with the names that torch has for what it can do."""

    __slots__ = ("_generator",)

    def __init__(self, generator: Any) -> None:
        """Take a generator.

        Args:
            generator: The module `random` or `numpy.random`, for the generator of the process, or
                an object of a class of theirs.
        """
        self._generator = generator

    def __eq__(self, other: object) -> bool:
        """Whether both are the same generator."""
        return isinstance(other, Foreign) and self._generator is other._generator

    def __hash__(self) -> int:
        """By identity."""
        return id(self._generator)

    def get_state(self) -> bytes:
        """Its state, to compare and to put back; no tensor, whose bytes would count."""
        found: Any = self._generator
        if isinstance(found, np.random.Generator):
            return pickle.dumps(found.bit_generator.state)
        return pickle.dumps(found.getstate() if hasattr(found, "getstate") else found.get_state())

    def set_state(self, state: bytes) -> None:
        """Put it to where it was.

        Args:
            state: What `get_state` gave.
        """
        found, value = self._generator, pickle.loads(state)
        if isinstance(found, np.random.Generator):
            found.bit_generator.state = value
        elif hasattr(found, "setstate"):
            found.setstate(value)
        else:
            found.set_state(value)

    def manual_seed(self, seed: int) -> None:
        """Put it to a state that follows from a number.

        Args:
            seed: The number.
        """
        found = self._generator
        if isinstance(found, np.random.Generator):
            found.bit_generator.state = type(found.bit_generator)(seed).state
        else:
            found.seed(seed)


_EVERYBODYS = Foreign(random), Foreign(np.random)


def foreign_generators(holders: Iterable[object] = ()) -> tuple[Foreign, ...]:
    """Python's generator and numpy's, and others that are attributes.

    Args:
        holders: Objects such as modules, whose attributes are looked at; lists, tuples and dicts
            among these are looked into.
    """
    return *_EVERYBODYS, *generators_of(holders)


def generators_of(holders: Iterable[object]) -> tuple[Foreign, ...]:
    """The generators that are attributes, without those of the process.

    Args:
        holders: As for `foreign_generators`.
    """
    return tuple(_among(value for holder in holders for value in vars(holder).values()))


def _among(values: Iterable[object]) -> Iterable[Foreign]:
    """Those among some values."""
    values = [*values]
    inside: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            inside += value
        elif isinstance(value, dict):
            inside += value.values()
    kinds = (random.Random, np.random.Generator, np.random.RandomState)
    return dict.fromkeys(
        Foreign(value)
        for value in (*values, *inside)
        if isinstance(value, kinds) and not isinstance(value, random.SystemRandom)  # no state
    )


@final
class ForeignGenerators:
    """The generators of Python and numpy that a program and its modules have, as they are now.

    Lists, tuples and dicts among the values that a program keeps are looked into.
    """

    def __init__(self, values: Iterable[object]) -> None:
        """Note their states.

        Args:
            values: What the program keeps; lists, tuples and dicts among it are looked into.
        """
        self._states = [(found, found.get_state()) for found in (*_EVERYBODYS, *_among(values))]

    @classmethod
    def of(cls, modules: Iterable[object]) -> ForeignGenerators:
        """Those that are attributes of modules, their submodules not among them."""
        return cls(value for module in modules for value in vars(module).values())

    def moved(self) -> bool:
        """Whether any of them has been drawn from since."""
        return any(found.get_state() != state for found, state in self._states)

    def restore(self) -> None:
        """Put them to where they were."""
        for found, state in self._states:
            if found.get_state() != state:
                found.set_state(state)
