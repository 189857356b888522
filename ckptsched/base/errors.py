"""The exceptions of ckptsched: one tree, and messages that say what would work."""

from __future__ import annotations

from typing import Any


class CkptschedError(Exception):
    """Every error that ckptsched raises on purpose is one of these; other processes can get it."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python's own way calls the class with the message alone, and some take more.
        return _again, (type(self), self.args), self.__dict__


def _again(cls: type[CkptschedError], args: tuple[object, ...]) -> CkptschedError:
    error = cls.__new__(cls)
    error.args = args
    return error


class BudgetSyntaxError(CkptschedError, ValueError):
    """A budget that cannot be read as a number of bytes."""


class InfeasibleBudgetError(CkptschedError, ValueError):
    """No schedule of the solver's class fits the budget.

    Attributes:
        budget_bytes: What was asked for.
        least_budget_bytes: The least budget that works; None where it is unknown.
        stage: Name of the stage that binds at the least budget; empty where unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        budget_bytes: int,
        least_budget_bytes: int | None = None,
        stage: str = "",
    ) -> None:
        """Keep the figures beside the sentence, for programs that retry."""
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.least_budget_bytes = least_budget_bytes
        self.stage = stage


class SolverTimeoutError(CkptschedError, TimeoutError):
    """A solver's time limit ended before it found a schedule, or proved that there is none.

    Attributes:
        limit_seconds: The limit.
    """

    def __init__(self, message: str, *, limit_seconds: float) -> None:
        """Keep the limit beside the sentence, for programs that retry."""
        super().__init__(message)
        self.limit_seconds = limit_seconds


class InvalidScheduleError(CkptschedError, ValueError):
    """A schedule that breaks a rule of the chain model.

    Attributes:
        position: Index of the offending operation; the schedule's length for a fault
            that shows only at its end, such as a leak.
        operation: The operation as text; empty at the end of the schedule.
        reason: What the operation lacks or breaks.
    """

    def __init__(self, position: int, operation: str, reason: str) -> None:
        """Say where, what and why in one line."""
        where = f"operation {position} {operation}" if operation else "end of schedule"
        super().__init__(f"invalid schedule at {where}: {reason}")
        self.position = position
        self.operation = operation
        self.reason = reason


class WorkloadError(CkptschedError, ValueError):
    """A chain, or an ODE block to make one of, that is empty, damaged or has impossible values."""


class SolverRefusalError(WorkloadError):
    """A chain or graph that a solver does not take: too long for it, or of another kind."""


class ProfileError(CkptschedError, RuntimeError):
    """A model that cannot be measured or cut into stages."""


class PlanMismatchError(CkptschedError, ValueError):
    """A plan, plan file, model or input that do not belong together."""

    before_step = False
    """Whether a call was refused before anything of it ran."""


class ExecutionError(CkptschedError, RuntimeError):
    """A training step that cannot go on without giving wrong gradients."""


class IntegrationError(ExecutionError):
    """An ordinary differential equation that cannot be solved further.

    Attributes:
        time: The time that was reached, in the equation's units.
        step: How many steps were accepted before.
    """

    def __init__(self, message: str, *, time: float, step: int = 0) -> None:
        """Keep the figures beside the sentence, for programs that retry."""
        super().__init__(message)
        self.time = time
        self.step = step


class StorageError(CkptschedError, RuntimeError):
    """A checkpoint that could not be written or read back."""


class BudgetWarning(UserWarning):
    """A call that gives the right result, and does not keep the budget of its plan."""


class CallbackWarning(UserWarning):
    """A method of a right-hand side that is meant to be called on the way, and is not."""


class SolverWarning(UserWarning):
    """A solver failed by a fault of its own; the plan is right, and may be dearer than need be."""


class TimingWarning(UserWarning):
    """Seconds that were measured on a busy machine, and differ from round to round."""
