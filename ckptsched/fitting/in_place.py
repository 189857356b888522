"""Lets a model train by plans as it is: plans for each kind of call, in place of its forward."""

from __future__ import annotations

import copy
import functools
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from torch import nn

from ..base.budget import format_bytes, parse_budget
from ..base.errors import (
    BudgetWarning,
    ExecutionError,
    InvalidScheduleError,
    PlanMismatchError,
    ProfileError,
    WorkloadError,
)
from ..capture.inspection import Inspection
from ..capture.policies.policy import NO_POLICY, Policy
from ..capture.recording.opening import Opened, is_one_stage
from ..capture.recording.recording import described
from ..capture.recording.stages import Captured, capture_as_before
from ..capture.wrappers import InPlace, PlainForward, Unbound, in_place
from ..executor.checkpointed import Calls
from ..executor.prepared_plan import PreparedPlan
from ..executor.recorded import RecordedCalls
from ..executor.step.outer_graph import PlannedCalls
from ..planner.plan import Plan
from ..planner.planner import certified_again
from ..profiler.alike.twins import Alike
from ..profiler.profile import measure_opened, open_for_measuring
from ..profiler.stage_kind import Loss
from ..recompute.fsdp import is_sharded
from ..simulator.simulator import simulate
from ..tensors.pytree import State
from ..torch_state.locks import LendingLock
from ..torch_state.replay_context import ContextFn, contexts
from ..torch_state.torch_modes import (
    hidden_from_torch_checkpoint,
    is_exporting,
    only_plain,
    outside_of_compiled_code,
)
from ..workload.chain import Chain
from ..workload.graph import Graph
from .arguments import ArgumentNames, Call, Extent, Form, Kind
from .pending import Pending
from .planning import plan_opened

_LOG = logging.getLogger("ckptsched")

OnNewInput: TypeAlias = Literal["plan", "refuse", "plain"]
"""What happens to a call that no plan is for."""

MOST_KINDS = 64
"""Kinds of calls that a model keeps plans for; the one used longest ago is given up."""

MOST_WAYS = 4
"""Plans that are kept for calls of one kind, whose values may lead different ways."""


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """How plans are made for a fitted model."""

    budget: Any
    solver: str
    loss: Loss | None
    context_fn: ContextFn | None
    capture: bool | None
    on_new_input: OnNewInput
    policy: Policy = NO_POLICY

    def __post_init__(self) -> None:
        if self.on_new_input not in get_args(OnNewInput):
            raise ExecutionError(
                f"on_new_input is {self.on_new_input!r}; give 'plan', 'refuse' or 'plain'"
            )


@final
@dataclass(frozen=True, eq=False, slots=True)
class Served:
    """What runs calls of one kind."""

    calls: Calls
    form: Form | None
    """How the call that they were made for gave its arguments."""
    extent: Extent
    """Structure and layouts of that call."""


@final
class Fitted(InPlace):
    """Runs calls of a model by plans, and plans for calls of a new kind within the same budget."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        """Take the place of nothing yet.

        Args:
            model: The model, not fitted.
            options: How plans are made.
        """
        super().__init__(model)
        self._options = options
        self._names = ArgumentNames(self.before)
        self._known: OrderedDict[Kind, list[Served]] = OrderedDict()
        self._plans: dict[bool, Plan] = {}  # the first for each mode of the model
        self._table, self._turn, self._pending = threading.RLock(), LendingLock(), Pending()

    def __deepcopy__(self, memo: dict[int, Any]) -> Fitted:
        """That of the copy of the model, which plans anew when it is first called."""
        # Not by `or`: a container that is still being copied has no length to be true by.
        model = memo[id(self.model)] if id(self.model) in memo else copy.deepcopy(self.model, memo)
        own = in_place(model)
        if isinstance(own, Fitted):
            return own
        other = Fitted.__new__(Fitted)
        memo[id(self)] = other
        other.__dict__.update(self.__dict__)
        other.model, other.attribute = model, copy.deepcopy(self.attribute, memo)
        other.before = other.attribute or type(model).forward.__get__(model)
        functools.update_wrapper(other, other.before)
        other.__func__ = Unbound(other)
        other._known, other._plans = OrderedDict(), dict(self._plans)
        other._off, other._pending = threading.local(), Pending()
        other._table, other._turn = threading.RLock(), LendingLock()
        return other

    @property
    def plan(self) -> Plan | None:
        """The plan that was made first; None before there is one."""
        return next(iter(self._plans.values()), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; where gradients are on, and in a mode that is planned, by a plan.

        Args:
            args: What it is called with.
            kwargs: The same by name.

        Raises:
            PlanMismatchError: No plan is for such a call, and none is to be made.
            InfeasibleBudgetError: There is none within the budget.
            ProfileError: The model cannot be measured on such a call.
        """
        if is_exporting():
            return self._into_a_program(args, kwargs)
        evaluates = not self.model.training and self._plans and False not in self._plans
        if evaluates or not torch.is_grad_enabled():
            return self._plainly(args, kwargs)
        return self._follow_plan(args, kwargs)

    def _plainly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with self._first_context():
            return self.before(*args, **kwargs)

    def _into_a_program(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.model.training and torch.is_grad_enabled():
            warnings.warn(
                f"the {type(self.model).__name__} is exported in training mode: the program that "
                "torch.export makes follows no plan, so training it takes the memory of plain "
                "autograd; train the fitted model itself, or export it in eval mode to infer",
                BudgetWarning,
                stacklevel=2,
            )
        return self.before(*args, **kwargs)

    @outside_of_compiled_code
    def _follow_plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.is_off():
            return self.before(*args, **kwargs)
        call = self._names.call(args, kwargs)
        kind, why = call.kind(), None
        with self._table:
            known = list(self._known.get(kind, ()))
        for served in known:
            arguments = call.put_into(served.form)
            if arguments is None:
                continue
            try:
                found = served.calls.run(*arguments)
            except PlanMismatchError as error:
                if not error.before_step:
                    raise
                why = error
            else:
                self._keep(kind, served)
                self._pending.note(found, served.calls.plan)
                return found
        tensors = [*State.of((args, dict(kwargs)), opaque=True).leaves, *self.model.parameters()]
        if only_plain(tensors, "the model", stacklevel=5):
            return self._plainly(args, kwargs)
        others = self._options.on_new_input if self._all() else "plan"  # the first is no other
        if others == "refuse":
            raise why or self._unlike(kind)
        if others == "plain":
            self._warn(why or self._unlike(kind))
            return self._plainly(args, kwargs)
        calls = self.make(args, kwargs, why or self._unlike(kind))
        found = calls.run(args, kwargs)
        self._pending.note(found, calls.plan)
        return found

    # -- plans

    def make(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        why: PlanMismatchError | None = None,
        inspection: Inspection | None = None,
    ) -> Calls:
        """Plan for a call, and for others of its kind.

        Args:
            args: What the model is called with.
            kwargs: The same by name.
            why: Why the plans that there are do not serve; None for the first.
            inspection: The model, if it has been looked at.

        Returns:
            What runs such calls.

        Raises:
            TypeError: The forward has no such arguments.
            InfeasibleBudgetError: Nothing fits; the message names the least budget that works.
            ProfileError: The model cannot be measured on such a call.
        """
        if not self._names.takes(args, kwargs):
            self.before(*args, **kwargs)
        call = self._names.call(args, kwargs)
        if why is not None and any(map(is_sharded, self.model.modules())):
            raise PlanMismatchError(
                f"{why}. A model that fully_shard has sharded cannot be measured: fit it on each "
                "kind of batch before it is sharded, and shard a recorded model as a whole"
            )
        # What measuring saves is none of what torch's checkpoint around the call is to keep.
        apart = hidden_from_torch_checkpoint()
        with self._turn, apart, self._first_context(), self.off(), self.innermost():
            again = self._from_larger(call) if why is not None else None
            inspection = inspection or Inspection.of(self.model)
            calls = again or self._planned(inspection, args, kwargs)
        calls.share_lock(self._turn)
        self._plans.setdefault(self.model.training, calls.plan)
        kind = call.kind()
        self._keep(kind, Served(calls, call.form, Extent.of(call.given)))
        if why is not None:
            self._tell(calls, kind, anew=again is None)
        return calls

    def _planned(
        self,
        inspection: Inspection,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Calls:
        """Measure the model on a call, and plan it."""
        options = self._options
        opened = open_for_measuring(
            inspection, args, kwargs, options.loss, options.capture, self._policy()
        )
        if opened.captured is None and is_one_stage(inspection):
            inspection = Inspection.of(PlainForward(self))
        alike = Alike(outlives=True)

        def measured(way: Opened) -> Chain:
            chain = self._measure(way, inspection, args, kwargs, alike=alike)
            if chain.signature is not None and chain.signature.unfit:
                raise PlanMismatchError(chain.signature.unfit)
            return chain

        plan, captured = plan_opened(
            opened,
            measured,
            self._budget(),
            solver=options.solver,
        )
        if captured is not None:
            return self._recorded(plan, captured, inspection)
        prepared = PreparedPlan(inspection, plan, "glance", options.context_fn)
        return PlannedCalls(prepared, before=self.before)

    def _policy(self) -> Policy:
        """What is never or always made again; a second kind of batch need not call all of it."""
        return replace(self._options.policy, strict=not self._plans)

    def _budget(self) -> Any:
        """What every plan must keep: a share is one of the first."""
        asked = parse_budget(self._options.budget)
        return self.plan.budget_bytes if asked.share is not None and self.plan else asked

    def _from_larger(self, call: Call) -> Calls | None:
        """The schedule of a larger call for one that is recorded and weighed anew, if it fits.

        Also of one in which arguments are one tensor that are two in this, or the other way round.
        """
        args, kwargs = call.given
        inputs = State.of((args, dict(kwargs)), opaque=True)
        tried = set[tuple[int, ...]]()  # what was recorded with the same cuts would fare the same
        for served in self._served():
            calls, arguments = served.calls, call.put_into(served.form)
            captured = calls.captured if isinstance(calls, RecordedCalls) else None
            by_value = calls.plan.chain if isinstance(calls.plan.chain, Graph) else None
            chain = by_value.lined if by_value else calls.plan.chain
            if captured is None or captured.cuts in tried:
                continue
            if arguments is None or not served.extent.covers(Extent.of(arguments)):
                continue
            tried.add(captured.cuts)
            assert isinstance(calls, RecordedCalls)
            assert isinstance(chain, Chain)
            try:
                cuts, policy, like = captured.cuts, self._policy(), captured.recording
                again = capture_as_before(calls.inspection, inputs, cuts, policy, like)
                weighed = self._measure(Opened(again), calls.inspection, args, kwargs, chain)
            except ProfileError:  # it goes another way
                continue
            try:
                again_by_value = Graph.of_values(weighed) if by_value else weighed
                trace = simulate(again_by_value, calls.plan.schedule)
            except (InvalidScheduleError, WorkloadError):  # a stage takes other paths or tapes
                continue
            if trace.peak_bytes <= calls.plan.budget_bytes:
                plan = replace(calls.plan, chain=again_by_value, trace=trace)
                return self._recorded(certified_again(plan, search=False), again, calls.inspection)
        return None

    def _measure(
        self,
        opened: Opened,
        inspection: Inspection,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        like: Chain | None = None,
        alike: Alike | None = None,
    ) -> Chain:
        """Measure the model on a call, with the user's loss if that takes its output."""
        loss = self._options.loss
        try:
            return measure_opened(opened, inspection, args, kwargs, loss, like=like, alike=alike)
        except Exception:
            if loss is None or not self._plans:
                raise
        # It may have targets for the first batch alone: then bytes as for a cross-entropy, and for
        # a batch that is nowhere larger no less than those that were measured.
        chain = measure_opened(opened, inspection, args, kwargs, like=like, alike=alike)
        if like is not None:
            return replace(
                chain,
                held_bytes=max(chain.held_bytes, like.held_bytes),
                loss_overhead_bytes=max(chain.loss_overhead_bytes, like.loss_overhead_bytes),
            )
        self._warn_of_loss(chain)
        return chain

    def _warn_of_loss(self, chain: Chain) -> None:
        """Say that the bytes of the loss are not those of the user's."""
        assert self.plan is not None
        first = self.plan.chain
        warnings.warn(
            "the loss that fit was given fails on this batch, as one that has its targets for the "
            f"first batch alone: {chain.held_bytes + chain.loss_overhead_bytes} bytes are provided "
            f"for output and loss, as for a cross-entropy ({first.held_bytes} and "
            f"{first.loss_overhead_bytes} were measured on the first batch); a loss that takes "
            "more exceeds the budget. Fit on the largest batch, or give a loss that takes any "
            "output",
            BudgetWarning,
            stacklevel=2,
        )

    def _recorded(self, plan: Plan, captured: Captured, inspection: Inspection) -> Calls:
        context_fn = self._options.context_fn
        return RecordedCalls(inspection, plan, "glance", context_fn, captured, is_forward=True)

    # -- what is known

    def _all(self) -> list[Calls]:
        return [served.calls for served in self._served()]

    def _served(self) -> list[Served]:
        with self._table:
            return [served for some in self._known.values() for served in some]

    def _keep(self, kind: Kind, served: Served) -> None:
        """Note the use of what runs calls of a kind."""
        with self._table:
            others = [other for other in self._known.pop(kind, ()) if other is not served]
            self._known[kind] = [served, *others][:MOST_WAYS]
            while len(self._known) > MOST_KINDS:
                self._known.popitem(last=False)

    def _first_context(self) -> AbstractContextManager[Any]:
        context_fn = self._options.context_fn
        return nullcontext() if context_fn is None else contexts(context_fn)[0]

    def _unlike(self, kind: Kind) -> PlanMismatchError:
        with self._table:
            known = [described(other.layouts) for other in self._known]
        return PlanMismatchError(
            f"the model is called with {described(kind.layouts)}, and was planned for "
            f"{' or for '.join(known[-3:])}; fit it again with such a batch, or with "
            'on_new_input="plan"'
        )

    def _tell(self, calls: Calls, kind: Kind, *, anew: bool) -> None:
        """Log what a call of a new kind follows."""
        what, plan = described(kind.layouts), calls.plan
        name = type(self.model).__name__
        if not anew:
            _LOG.info("%s: recorded anew for %s, with the same schedule", name, what)
            return
        _LOG.warning(
            "%s: planned anew for %s: peak %s, %.1f %% more time than storing everything",
            *(name, what, format_bytes(plan.peak_bytes), 100 * plan.overhead),
        )

    def _warn(self, why: PlanMismatchError) -> None:
        plan = self.plan
        assert plan is not None
        warnings.warn(
            f"a call runs by plain autograd, for which no plan is ({why}): plans have a peak of "
            f"{plan.peak_bytes} bytes, and plain autograd took {plan.store_all_bytes} on the first "
            'batch; fit with on_new_input="plan" to keep the budget',
            BudgetWarning,
            stacklevel=5,
        )
