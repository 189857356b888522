"""What the callbacks of all trainers do: fit a module for one training, and see that it follows."""

from __future__ import annotations

from typing import Any, TypedDict, final

from torch import nn

from ...base.budget import Budget, parse_budget
from ...base.errors import PlanMismatchError
from ...planner.plan import Plan
from ...profiler.stage_kind import Loss
from ...torch_state.replay_context import ContextFn
from ..fit import fit, unfit
from ..in_place import Fitted, OnNewInput


class FitOptions(TypedDict, total=False):
    """What `fit` takes besides a model, a batch and a budget."""

    solver: str
    loss: Loss | None
    context_fn: ContextFn | None
    capture: bool | None
    on_new_input: OnNewInput


@final
class Followed:
    """A module that follows plans from the start of a training to its end."""

    def __init__(self, budget: int | float | str | Budget, options: FitOptions) -> None:
        """Note how to plan.

        Args:
            budget: As `fit` takes it.
            options: Likewise.

        Raises:
            BudgetSyntaxError: The budget cannot be read.
        """
        parse_budget(budget)
        self._budget, self._options = budget, options
        self._module: nn.Module | None = None
        self._name = ""
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan for the first batch of the last training; None before there is one."""
        return self._fitted_plan() or self._plan

    def begin(self, module: nn.Module, name: str, **defaults: Any) -> None:
        """Fit a module, which is planned on its first call.

        Args:
            module: The module, as the trainer has prepared it.
            name: What messages call it.
            defaults: Options of `fit` for what the user has not given.
        """
        given = {key: value for key, value in self._options.items() if value is not None}
        self._module, self._name, self._plan = module, name, None
        fit(module, budget=self._budget, **{**defaults, **given})

    def check(self) -> None:
        """See that a training step that has run its forward has followed a plan.

        Raises:
            PlanMismatchError: It has not.
        """
        if self._module is not None and self.plan is None:
            name = self._name
            self.end()
            raise PlanMismatchError(
                f"a training step has run without a call of {name} with gradients on, so that "
                "nothing keeps the budget; name the module that the step calls, and let it be "
                "called itself, not methods of its own"
            )

    def end(self) -> None:
        """Take off what was fitted; the plan can still be asked for."""
        if self._module is not None:
            self._plan = self._fitted_plan()
            unfit(self._module)
            self._module = None

    def _fitted_plan(self) -> Plan | None:
        found = None if self._module is None else vars(self._module).get("forward")
        return found.plan if isinstance(found, Fitted) else None

    def __getstate__(self) -> dict[str, Any]:
        """How to plan: what is fitted stays in this process."""
        return {**self.__dict__, "_module": None, "_plan": None}
