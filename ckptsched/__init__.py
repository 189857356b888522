"""Fits the training of a PyTorch network into a memory budget.

chain = ckptsched.profile(model, sample)
plan = ckptsched.plan(chain, budget="256MiB")
model = ckptsched.checkpointed(model, plan)
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; when it runs, `__getattr__` finds the same names
    from .base.budget import Budget as Budget
    from .base.budget import Link as Link
    from .base.budget import Tier as Tier
    from .base.budget import format_bytes as format_bytes
    from .base.budget import parse_budget as parse_budget
    from .base.errors import BudgetSyntaxError as BudgetSyntaxError
    from .base.errors import BudgetWarning as BudgetWarning
    from .base.errors import CallbackWarning as CallbackWarning
    from .base.errors import CkptschedError as CkptschedError
    from .base.errors import ExecutionError as ExecutionError
    from .base.errors import InfeasibleBudgetError as InfeasibleBudgetError
    from .base.errors import IntegrationError as IntegrationError
    from .base.errors import InvalidScheduleError as InvalidScheduleError
    from .base.errors import PlanMismatchError as PlanMismatchError
    from .base.errors import ProfileError as ProfileError
    from .base.errors import SolverRefusalError as SolverRefusalError
    from .base.errors import SolverTimeoutError as SolverTimeoutError
    from .base.errors import SolverWarning as SolverWarning
    from .base.errors import StorageError as StorageError
    from .base.errors import TimingWarning as TimingWarning
    from .base.errors import WorkloadError as WorkloadError
    from .capture.policies.keep import keep as keep
    from .capture.recording.stages import captured as captured
    from .capture.stage_discovery import ModuleStage as ModuleStage
    from .capture.stage_discovery import StageCall as StageCall
    from .capture.stage_discovery import StagedModule as StagedModule
    from .executor.checkpointed import Checkpointed as Checkpointed
    from .executor.checkpointed import checkpointed as checkpointed
    from .executor.verify import Verification as Verification
    from .executor.verify import verify as verify
    from .fitting.before_a_run.asking import will_it_fit as will_it_fit
    from .fitting.before_a_run.devices import DeviceFigures as DeviceFigures
    from .fitting.before_a_run.forecast import Forecast as Forecast
    from .fitting.compiler_backend import compiler_backend as compiler_backend
    from .fitting.explain_memory import MemoryExplanation as MemoryExplanation
    from .fitting.explain_memory import explain_memory as explain_memory
    from .fitting.fit import fit as fit
    from .fitting.fit import plan_of as plan_of
    from .fitting.fit import unfit as unfit
    from .fitting.largest_that_fits import Largest as Largest
    from .fitting.largest_that_fits import largest as largest
    from .fitting.largest_that_fits import largest_batch as largest_batch
    from .fitting.largest_that_fits import largest_steps as largest_steps
    from .fitting.largest_that_fits import least_budget as least_budget
    from .fitting.planning import plan as plan
    from .fitting.trainers.hugging_face import TransformersCallback as TransformersCallback
    from .fitting.trainers.lightning import LightningCallback as LightningCallback
    from .ode import ODEBlock as ODEBlock
    from .ode import odeint as odeint
    from .ode import solve_adaptive as solve_adaptive
    from .planner.explanation import Explanation as Explanation
    from .planner.plan import Plan as Plan
    from .planner.tradeoff import Tradeoff as Tradeoff
    from .planner.tradeoff import tradeoff as tradeoff
    from .profiler.profile import profile as profile
    from .schedule.language import Schedule as Schedule
    from .schedule.trace import Trace as Trace
    from .simulator.simulator import simulate as simulate
    from .torch_state.replay_context import is_recomputing as is_recomputing
    from .workload.chain import Chain as Chain
    from .workload.graph import Graph as Graph
    from .workload.stage import Block as Block
    from .workload.stage import Stage as Stage
    from .workload.stage import StageLedger as StageLedger
    from .workload.stage import TapeOption as TapeOption

__version__ = "0.1.0"

# Each public name and its module, which is imported when the name is first asked for: whoever
# plans a saved chain does not wait for torch.
_HOMES = {
    "Block": "workload.stage",
    "Budget": "base.budget",
    "BudgetSyntaxError": "base.errors",
    "BudgetWarning": "base.errors",
    "CallbackWarning": "base.errors",
    "captured": "capture.recording.stages",
    "Chain": "workload.chain",
    "Checkpointed": "executor.checkpointed",
    "checkpointed": "executor.checkpointed",
    "CkptschedError": "base.errors",
    "compiler_backend": "fitting.compiler_backend",
    "DeviceFigures": "fitting.before_a_run.devices",
    "ExecutionError": "base.errors",
    "explain_memory": "fitting.explain_memory",
    "Explanation": "planner.explanation",
    "fit": "fitting.fit",
    "format_bytes": "base.budget",
    "Forecast": "fitting.before_a_run.forecast",
    "Graph": "workload.graph",
    "InfeasibleBudgetError": "base.errors",
    "IntegrationError": "base.errors",
    "InvalidScheduleError": "base.errors",
    "is_recomputing": "torch_state.replay_context",
    "keep": "capture.policies.keep",
    "Largest": "fitting.largest_that_fits",
    "largest": "fitting.largest_that_fits",
    "largest_batch": "fitting.largest_that_fits",
    "largest_steps": "fitting.largest_that_fits",
    "least_budget": "fitting.largest_that_fits",
    "Link": "base.budget",
    "MemoryExplanation": "fitting.explain_memory",
    "ModuleStage": "capture.stage_discovery",
    "ODEBlock": "ode",
    "odeint": "ode",
    "parse_budget": "base.budget",
    "plan": "fitting.planning",
    "plan_of": "fitting.fit",
    "Plan": "planner.plan",
    "PlanMismatchError": "base.errors",
    "profile": "profiler.profile",
    "ProfileError": "base.errors",
    "Schedule": "schedule.language",
    "simulate": "simulator.simulator",
    "solve_adaptive": "ode",
    "SolverRefusalError": "base.errors",
    "SolverTimeoutError": "base.errors",
    "SolverWarning": "base.errors",
    "Stage": "workload.stage",
    "StageCall": "capture.stage_discovery",
    "StagedModule": "capture.stage_discovery",
    "StageLedger": "workload.stage",
    "StorageError": "base.errors",
    "TapeOption": "workload.stage",
    "Tier": "base.budget",
    "TimingWarning": "base.errors",
    "Trace": "schedule.trace",
    "Tradeoff": "planner.tradeoff",
    "tradeoff": "planner.tradeoff",
    "unfit": "fitting.fit",
    "Verification": "executor.verify",
    "verify": "executor.verify",
    "will_it_fit": "fitting.before_a_run.asking",
    "WorkloadError": "base.errors",
}
# Each needs the library that it is for, and whoever looks at all names need not have it.
_FOR_TRAINERS = {
    "LightningCallback": "fitting.trainers.lightning",
    "TransformersCallback": "fitting.trainers.hugging_face",
}
_FOLDERS = ("ode",)

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name, or a folder of them, when it is first asked for."""
    if name in _FOLDERS:
        return importlib.import_module(f"{__name__}.{name}")
    home = _HOMES.get(name) or _FOR_TRAINERS.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, imported or not yet."""
    return sorted({*globals(), *_HOMES, *_FOLDERS})


def _compiler_backend(*args: Any, **kwargs: Any) -> Any:
    """The backend of torch's compiler, imported when a first graph comes."""
    return __getattr__("compiler_backend")(*args, **kwargs)


def _offer_backend() -> None:
    """Tell torch's compiler of the backend, where it has been imported before.

    Else it finds the entry point of the installed package, and need not be imported now.
    """
    register = getattr(sys.modules.get("torch._dynamo"), "register_backend", None)
    if register is not None:
        try:
            register(_compiler_backend, name="ckptsched")
        except AssertionError:  # it has found the entry point already
            return


_offer_backend()
