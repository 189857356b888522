"""Runs a plan: autograd that follows a schedule.

The outer graph has one node a block, so that each parameter's gradient arrives once and as
early as in plain autograd, and one node that hands out the output. All nodes of one call
share a `TrainingStep`, which owns what is stored and runs the schedule: a block's forward node
runs the operations up to the next block, its backward node those up to its first stage's
Backward. Between nodes travel empty tokens, never states, so that the outer graph keeps no
data alive.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from ...base.errors import BudgetWarning, ExecutionError, PlanMismatchError
from ...capture.signature import first_by_position, without_first
from ...capture.wrappers import plain_forward
from ...planner.plan import Plan
from ...recompute.fsdp import call_as_forward, is_sharded
from ...recompute.graph_holds import Hold, keep
from ...recompute.parameter_swap import take_out_what_was_left
from ...tensors.pytree import Extras, State
from ...torch_state.locks import LendingLock
from ...torch_state.replay_context import ContextFn, is_recomputing
from ...torch_state.saved_hooks import no_hooks
from ...torch_state.surroundings import Ambient
from ...torch_state.torch_modes import (
    hidden_from_torch_checkpoint,
    inside_backward,
    only_plain,
    outside_of_compiled_code,
    refuse_batched_gradients,
)
from ..prepared_plan import PreparedPlan
from .double_backward import Gradients
from .forward_snapshot import ForwardSnapshot
from .fsdp_step import TOKEN
from .training_step import TrainingStep

_HIGHER = "_ckptsched_gradients"  # attribute of a token


@final
class PlannedCalls:
    """Runs calls of a model that is a chain of stages by a plan."""

    def __init__(self, prepared: PreparedPlan, *, before: Callable[..., Any] | None = None) -> None:
        """Take a plan.

        Args:
            prepared: The plan, bound to its model.
            before: The forward of a model whose place this takes, which its `__call__` runs with
                its hooks around it; None where the model itself is called for that.
        """
        self.prepared, self._before = prepared, before

    @property
    def plan(self) -> Plan:
        """The plan that is followed."""
        return self.prepared.plan

    @property
    def context_fn(self) -> ContextFn | None:
        """The function that gives the contexts of first runs and recomputations, or None."""
        return self.prepared.context_fn

    def share_lock(self, lock: LendingLock) -> None:
        """Run in turn with other models that hold the lock; see `Checkpointed.share_lock`."""
        self.prepared.lock = lock

    def first_context(self) -> AbstractContextManager[Any]:
        """The context for first runs of stages."""
        return self.prepared.first_context()

    def plainly(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as it is, in the context of a first run."""
        model = self.prepared.inspection.model
        with self.first_context():
            if self._before is not None:
                return self._before(*args, **kwargs)
            with plain_forward(model):
                return model(*args, **kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the model; a backward from the output follows the plan.

        Args:
            args: What it is called with.
            kwargs: The same by name.

        Raises:
            PlanMismatchError: The batch, the mode or what is trained is not as planned.
            ExecutionError: A stage cannot be run again with the same result.
        """
        model = self.prepared.inspection.model
        given, options = first_by_position(model, args, kwargs)
        if not given:
            wrong = without_first(model, kwargs)
            raise PlanMismatchError(f"the model was called without its batch, {wrong}")
        return self._follow_plan(given[0], given[1:], options)

    @outside_of_compiled_code
    def _follow_plan(self, x: Any, extras: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        prepared = self.prepared
        inputs, given = _apart(x, Extras(extras, options))
        tensors = [*inputs.leaves, *given.leaves, *prepared.inspection.slots.parameters()]
        trained = prepared.asks or any(tensor.requires_grad for tensor in tensors)
        if not trained and not prepared.inspection.trains_something_new():
            return _without_graph(self.plainly(x, *extras, **options))
        if only_plain(tensors, "the model", stacklevel=2):
            return self.plainly(x, *extras, **options)
        model = prepared.inspection.model
        if self._before is None and is_sharded(model):
            return call_as_forward(model, partial(_call, prepared), x, *extras, **options)
        # A stage of another plan was measured with what this one takes.
        if inside_backward() and not is_recomputing():
            _warn_of_two(prepared)
        with hidden_from_torch_checkpoint():
            return _step(prepared, inputs, given)


def _without_graph(output: Any) -> Any:
    """The output of a model in which nothing seems to be trained, if that is so."""
    found = State.of(output, opaque=True).leaves
    if any(leaf.requires_grad for leaf in found):
        raise PlanMismatchError(
            "the output depends on something trained that is neither a parameter of the model nor "
            "an argument of the call, and nothing that was planned is trained any more: the plan "
            "does not provide for it; register it in the model, profile and plan again"
        )
    return output


def _warn_of_two(prepared: PreparedPlan) -> None:
    """Say what it takes that a model is run while a backward is at work, as by torch's checkpoint.

    Then there may be an earlier run of it with what that has stored, or at least its output.
    """
    plan = prepared.plan
    first = plan.trace.timeline[: prepared.script.segments.turn].max(initial=0)
    more = int(first) + plan.chain.held_bytes + plan.chain.input_gradient_bytes
    warnings.warn(
        "a model that follows a plan is called inside a backward, as torch.utils.checkpoint calls "
        f"what it runs again: {plan.peak_bytes} bytes were projected, and together with an earlier "
        f"call of it up to {plan.peak_bytes + more} may be taken; call the model outside of "
        "torch.utils.checkpoint",
        BudgetWarning,
        stacklevel=4,
    )


def _call(prepared: PreparedPlan, x: Any, *extras: Any, **options: Any) -> Any:
    """A step of a model that is sharded itself, called as FSDP passes the arguments on."""
    return _step(prepared, *_apart(x, Extras(extras, options)))


def _apart(x: Any, extras: Extras) -> tuple[State, State]:
    """The arguments of a call, taken apart."""
    try:
        inputs = State.of(x)
    except ExecutionError as error:
        raise PlanMismatchError(f"the model's first argument is {error}") from None
    if not inputs.leaves:
        raise PlanMismatchError(
            f"the model's first argument is what its first stage takes, found a "
            f"{type(x).__name__} without tensors"
        )
    return inputs, extras.apart()


def _step(prepared: PreparedPlan, inputs: State, given: State) -> Any:
    """One forward pass whose backward follows the schedule."""
    take_out_what_was_left()
    within = prepared.made_within()
    device = inputs.leaves[0].device
    ambient, inside = Ambient.take(device), None
    with prepared.alone(forward=True), prepared.first_context():
        if prepared.context_fn is not None:
            inside = Ambient.take(device)
        try:
            prepared.check_batch(inputs, given)
            prepared.expected.check(inside or ambient, prepared.inspection)
        except PlanMismatchError as error:
            error.before_step = True
            raise
        seen = ForwardSnapshot(prepared, given, ambient, inside, within)
        run = TrainingStep(seen, inputs)
        run.let_ask(inputs)
        hold = Hold(run)
        entry = inputs.leaves
        if run.gathering is not None:
            entry = run.gathering.run(partial(_run_block, hold), run.state_before, entry)
        else:
            for k in range(len(prepared.slots)):
                entry = _run_block(hold, k, entry)
        # Inside a tuple: the output node keeps the inputs for one more backward, and is no way to
        # them.
        with no_hooks():
            output = _OutputNode.apply(hold, *entry, (inputs, given))
    leaves = output if isinstance(output, tuple) else (output,)
    if run.prepared.has_sides:
        count = len(run.prepared.facts.carries[-1])
        leaves, sides = leaves[:count], list(leaves[count:])
        del output
        run.graft(sides)
    if run.gathering is not None and entry[0].dtype != TOKEN:  # FSDP would have cast it
        cast = entry[0].dtype
        leaves = tuple([y.to(cast) if y.is_floating_point() else y for y in leaves])
    return run.output.replaced(leaves).value()


def _run_block(hold: Hold, k: int, entry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The forward of one block, as a node of the outer graph."""
    run: TrainingStep = hold.value
    run.begin(k)
    return (_BlockNode.apply(hold, k, len(entry), *entry, *run.tensors_of(k)),)


class _BlockNode(torch.autograd.Function):
    """One block in the outer graph; its parameters are inputs, so gradients reach them.

    The first block's node takes the tensors of the input, and those that every stage is given. The
    run is held by the output's node alone, without which no backward comes here.
    """

    @staticmethod
    def forward(ctx: Any, hold: Hold, k: int, entries: int, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        run: TrainingStep = hold.value
        ctx.hold, ctx.k, ctx.entries = weakref.ref(hold), k, entries
        run.forward(run.prepared.script.segments.forward[k])
        # Whatever the default dtype is then and now: a token that must be cast is copied.
        dtype = torch.float32 if run.gathering is None else TOKEN
        return torch.empty(0, dtype=dtype, device=run.device)

    @staticmethod
    @outside_of_compiled_code
    def backward(ctx: Any, *grads: Any) -> Any:
        hold, k = ctx.hold(), ctx.k
        run: TrainingStep | None = None if hold is None else hold.value
        if hold is None or run is None:
            raise ExecutionError(
                "this forward pass has been released: its backward was done; run the model again"
            )
        wanted = ctx.needs_input_grad[3 : 3 + ctx.entries]
        higher = _handed_on(grads[0])
        if higher is None:
            lowest = k == 0 or not wanted[0]
            gradients = run.backward(run.prepared.script.segments.backward[-1 - k], lowest=lowest)
        else:
            gradients = run.differentiable(higher, k)
        if k == 0 or not wanted[0]:
            hold.end()
        before: tuple[Tensor | None, ...]
        if k > 0:
            before = (_token(run, higher) if wanted[0] else None,)
        elif higher is None:
            before, run.input_gradients = run.input_gradients, ()
            before = before or (None,) * ctx.entries
        else:
            before = higher.inputs
        return None, None, None, *before, *gradients


def _token(run: TrainingStep, higher: Gradients | None) -> Tensor:
    """What a backward hands to the node before it: no data, and gradients that have a graph.

    The run must not hold those: they lead to the output, and the output to the run, a circle that
    nothing would ever collect. Here they are gone with the backward, however it ends.
    """
    dtype = torch.float32 if run.gathering is None else TOKEN
    token = torch.empty(0, dtype=dtype, device=run.device)
    if higher is not None:
        setattr(token, _HIGHER, higher)
    return token


def _handed_on(token: Tensor | None) -> Gradients | None:
    found: Gradients | None = getattr(token, _HIGHER, None)
    return found


class _OutputNode(torch.autograd.Function):
    """Hands out the output, and takes its gradient before any block's backward begins.

    A node of its own: what the engine passes to a node it holds until the node is done.
    """

    @staticmethod
    def forward(ctx: Any, hold: Hold, token: Tensor, inputs: tuple[State, State]) -> Any:
        ctx.set_materialize_grads(False)
        run: TrainingStep = hold.value
        keep(ctx, hold)
        if run.prepared.has_sides:  # which lead to this node, too
            ctx.always = hold
        run.trees = tuple([State((), state.tree) for state in inputs])
        ctx.count = len(inputs[0].leaves)
        ctx.save_for_backward(*inputs[0].leaves, *inputs[1].leaves, hold.fuse())
        leaves = run.turn()
        carries = run.prepared.facts.carries[-1]
        # The further ones, which stages have left by another way, carry a gradient.
        ctx.mark_non_differentiable(
            *[leaf for leaf, carried in zip(leaves, carries, strict=True) if not carried]
        )
        if run.prepared.has_sides:
            leaves += run.sides.outputs()
        return leaves if len(leaves) > 1 else leaves[0]

    @staticmethod
    @outside_of_compiled_code
    def backward(ctx: Any, *grads: Any) -> Any:
        hold = ctx.hold()
        run: TrainingStep | None = None if hold is None else hold.value
        if hold is None or run is None:
            raise _second_backward("its graph is gone")
        refuse_batched_gradients(grads)
        trees = run.trees
        hold.begin()
        try:
            count = len(run.prepared.facts.carries[-1])
            higher = run.start_backward(grads[:count], lambda: _saved(ctx, trees), grads[count:])
        except BaseException:
            hold.end()
            raise
        return None, _token(run, higher), None


def _saved(ctx: Any, trees: tuple[State, ...]) -> tuple[State, State]:
    """What a node saved; autograd lets it go after a backward without `retain_graph`."""
    try:
        leaves = ctx.saved_tensors[:-1]
    except RuntimeError as error:
        raise _second_backward(f"torch: {error}") from error
    inputs, given = trees
    return inputs.replaced(leaves[: ctx.count]), given.replaced(leaves[ctx.count :])


def _second_backward(why: str) -> ExecutionError:
    return ExecutionError(
        "a second backward through one forward pass: pass retain_graph=True to the first, so "
        "that its input is kept (the forward then runs once more), or run the model again "
        f"({why})"
    )
