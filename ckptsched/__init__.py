"""Fits the training of a PyTorch network into a memory budget.

chain = ckptsched.profile(model, sample)
plan = ckptsched.plan(chain, budget="256MiB")
model = ckptsched.checkpointed(model, plan)
"""

from .budget import Budget as Budget
from .budget import Link as Link
from .budget import Tier as Tier
from .budget import format_bytes as format_bytes
from .budget import parse_budget as parse_budget
from .context import is_recomputing as is_recomputing
from .errors import BudgetSyntaxError as BudgetSyntaxError
from .errors import BudgetWarning as BudgetWarning
from .errors import CallbackWarning as CallbackWarning
from .errors import CkptschedError as CkptschedError
from .errors import ExecutionError as ExecutionError
from .errors import InfeasibleBudgetError as InfeasibleBudgetError
from .errors import InvalidScheduleError as InvalidScheduleError
from .errors import PlanMismatchError as PlanMismatchError
from .errors import ProfileError as ProfileError
from .errors import SolverRefusalError as SolverRefusalError
from .errors import SolverTimeoutError as SolverTimeoutError
from .errors import SolverWarning as SolverWarning
from .errors import StorageError as StorageError
from .errors import TimingWarning as TimingWarning
from .errors import WorkloadError as WorkloadError
from .executor import Checkpointed as Checkpointed
from .executor import checkpointed as checkpointed
from .explain import Explanation as Explanation
from .fitting import fit as fit
from .frontier import Tradeoff as Tradeoff
from .frontier import tradeoff as tradeoff
from .graph import Graph as Graph
from .inverse import Largest as Largest
from .inverse import largest as largest
from .inverse import largest_batch as largest_batch
from .inverse import largest_steps as largest_steps
from .inverse import least_budget as least_budget
from .ode import ODEBlock as ODEBlock
from .ode import odeint as odeint
from .ode import solve_adaptive as solve_adaptive
from .planning import plan as plan
from .plans import Plan as Plan
from .profiler import profile as profile
from .schedule import Schedule as Schedule
from .simulator import simulate as simulate
from .stages import Block as Block
from .stages import Stage as Stage
from .stages import StageLedger as StageLedger
from .stages import TapeOption as TapeOption
from .trace import Trace as Trace
from .tracing import ModuleStage as ModuleStage
from .tracing import StageCall as StageCall
from .tracing import StagedModule as StagedModule
from .verifier import Verification as Verification
from .verifier import verify as verify
from .workload import Chain as Chain

__version__ = "0.1.0"
