"""Time steps, or the slopes of Runge-Kutta steps, as stages of a chain.

A stage that is a slope evaluates f once, so that one evaluation's tape is kept at a time. Between
two slopes flow the state at the start of the step, the weighted sum of slopes so far, and the
slopes that later arguments need: tensors that are handed on and not copied.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable, Iterable
from typing import Any, final

from torch import Tensor

from ...capture.stage_discovery import StageCall, StagedModule
from ..methods.explicit import Slope, Time, add, last_uses, slope_at, weighted_sum
from ..methods.tableau import ButcherTableau


class SteppedModule(StagedModule, abc.ABC):
    """A module whose stages are time steps, or slopes of these."""

    @abc.abstractmethod
    def step(self, index: int, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Advance state z by step `index`; other arguments are those of the module's call."""

    @abc.abstractmethod
    def step_part(self, index: int, part: int, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Do slope `part` of step `index`; states are those of `slope_step`."""


@final
class StepStage(StageCall):
    """Time step `index`, from 0, or slope `part` of it; so many outputs leave the chain there."""

    __slots__ = ("index", "module", "outputs", "part")

    module: SteppedModule

    def __init__(
        self, module: SteppedModule, index: int, part: int | None = None, outputs: int = 1
    ) -> None:
        self.prefix = ""
        self.module, self.index, self.part, self.outputs = module, index, part, outputs

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Advance the state by this step, or this slope of it."""
        if self.part is None:
            return self.module.step(self.index, x, *args, **kwargs)
        return self.module.step_part(self.index, self.part, x, *args, **kwargs)

    @property
    def label(self) -> str:
        """The index as in "step[7]", or "slope 2 of step[7]"."""
        prefix = "" if self.part is None else f"slope {self.part} of "
        return f"{prefix}step[{self.index}]"

    @property
    def key(self) -> Hashable:
        """Equal for steps that give equally many outputs: they differ in the time only."""
        return ("step", id(self.module), self.part, self.outputs)


def step_stages(
    module: SteppedModule, outputs: Iterable[int], slopes: int | None
) -> list[StageCall]:
    """All stages of a module whose steps are taken apart into so many slopes; None for whole steps.

    Steps from which no output leaves count as those with one, so that equal steps make one long
    run, whichever of them give outputs: all are planned as if they did, which takes at most two
    states more than needed.
    """
    parts = (None,) if slopes is None else range(slopes)
    return [
        StepStage(module, index, part, max(1, count))
        for index, count in enumerate(outputs)
        for part in parts
    ]


def slope_step(f: Slope, tableau: ButcherTableau, t: Time, h: Time, k: int, state: Any) -> Any:
    """Do part k of a step; all parts in order make `runge_kutta_step`, in the same additions.

    The first is given the state at time t, each other one what the one before returned; the last
    returns the state at time t + h. Raises as `runge_kutta_step` does.
    """
    last_use = last_uses(tableau)
    needed = list(last_use)
    i = needed[k]
    z, result, *slopes = (state, state) if k == 0 else state
    kept = dict(zip(_alive(last_use, k), slopes, strict=True))
    argument = weighted_sum(z, h, tableau.a[i], kept)
    slope = slope_at(f, t + tableau.c[i] * h, argument)
    if tableau.b[i] != 0.0:
        result = add(result, slope, h * tableau.b[i])
    if k == len(needed) - 1:
        return result
    kept[i] = slope
    return z, result, *(kept[j] for j in _alive(last_use, k + 1))


def start_of(state: Any) -> Tensor:
    """The state at the start of the step, from the input of any of its parts."""
    found: Tensor = state[0] if isinstance(state, tuple) else state
    return found


def _alive(last_use: dict[int, int], k: int) -> list[int]:
    """The slopes that part k or a later one reads."""
    needed = list(last_use)
    return [j for j in needed[:k] if last_use[j] >= needed[k]]
