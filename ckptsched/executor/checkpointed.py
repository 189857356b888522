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
from collections.abc import Mapping
from functools import partial
from typing import Any, cast, final, get_args

import torch
from torch import Tensor, nn

from ..base.errors import BudgetWarning, ExecutionError, PlanMismatchError
from ..capture.inspection import Inspection, inspect_model
from ..capture.signature import first_by_position, without_first
from ..capture.wrappers import StandsFor
from ..planner.plan import Plan
from ..recompute.fsdp import call_as_forward, is_sharded
from ..recompute.graph_holds import Hold, keep
from ..recompute.parameter_swap import take_out_what_was_left
from ..tensors.pytree import Extras, State
from ..torch_state.locks import LendingLock
from ..torch_state.replay_context import ContextFn, is_recomputing
from ..torch_state.saved_hooks import no_hooks
from ..torch_state.surroundings import Ambient
from ..torch_state.torch_modes import (
    hidden_from_torch_checkpoint,
    inside_backward,
    outside_of_compiled_code,
    refuse_batched_gradients,
    transform_at_work,
)
from ..workload.chain import Chain
from .double_backward import Gradients
from .forward_snapshot import ForwardSnapshot
from .fsdp_step import TOKEN
from .prepared_plan import Check, PreparedPlan
from .training_step import TrainingStep

_HIGHER = "_ckptsched_gradients"  # attribute of a token


def checkpointed(
    model: nn.Module,
    plan: Plan,
    *,
    check: Check = "glance",
    context_fn: ContextFn | None = None,
) -> Checkpointed:
    """Make a model train by a plan.

    Args:
        model: The model that the plan was made for.
        plan: The plan.
        check: What a stage that runs again must give as it gave it first, or the backward ends
            with an error that names the stage. With "glance" a few bytes of its output, if that
            is on the CPU, where they are the same each time, and of equal steps for the first and
            the last: it costs microseconds, and shows what changes a stage from outside. With
            "outputs" all of it, bit by bit, which takes about a second for 1 GB of outputs, and
            keeps 16 bytes a stage; an output with gaps in its memory is copied for the moment.
            With "none" nothing is compared.
        context_fn: For what a library keeps where torch does not see it, such as a recipe for
            FP8: a function without arguments that returns two context managers, as that of
            `torch.utils.checkpoint`. The first is around a forward pass of the model, also one by
            plain autograd or without gradients; the second around stages that run again, in the
            backward, as often as they do. The function is called anew each time, so what it
            returns is entered once, and may not rely on a pair belonging together. None leaves
            the contexts of `model` if that follows a plan already.

    Returns:
        A module with the same parameters, buffers and `state_dict` keys. It shares them with
        `model`. Its forward takes a batch of the planned shape; where no gradient is wanted it
        runs the model as it is, on any batch.

    Raises:
        PlanMismatchError: The plan was made for another model, or by hand, or is none.
        ExecutionError: There is no such check, or context_fn is no function.
    """
    if check not in get_args(Check):
        raise ExecutionError(f"check is {check!r}; give 'none', 'glance' or 'outputs'")
    if context_fn is not None and not callable(context_fn):
        raise ExecutionError(
            f"context_fn is {context_fn!r}; give a function that returns two context managers"
        )
    inspection = inspect_model(model, "checkpointed", PlanMismatchError)
    return follow(inspection, model, plan, check, context_fn)


def follow(
    inspection: Inspection, given: object, plan: Plan, check: Check, context_fn: ContextFn | None
) -> Checkpointed:
    """Make an inspected model train by a plan; further arguments and errors as `checkpointed`.

    Args:
        inspection: The model.
        given: The model as the user gave it; of one that follows a plan the contexts are kept.
        plan: The plan.
        check: What is compared of stages that run again.
        context_fn: Gives the contexts of first runs and recomputations, or None.
    """
    if isinstance(given, Checkpointed):
        context_fn = context_fn or given.context_fn
    if not isinstance(plan, Plan):
        advice = "; make one of it: plan(chain, budget=...)" if isinstance(plan, Chain) else ""
        raise PlanMismatchError(f"a model follows a Plan, found a {type(plan).__name__}{advice}")
    return Checkpointed(PreparedPlan(inspection, plan, check, context_fn))


@final
class Checkpointed(StandsFor):
    """A model that trains by a plan; see `checkpointed`."""

    def __init__(self, prepared: PreparedPlan) -> None:
        """Share everything that the model owns."""
        super().__init__(prepared.inspection.model)
        self.__dict__["_prepared"] = prepared

    @property
    def plan(self) -> Plan:
        """The plan that is followed."""
        return cast(PreparedPlan, self.__dict__["_prepared"]).plan

    @property
    def context_fn(self) -> ContextFn | None:
        """The function that gives the contexts of first runs and recomputations, or None."""
        return cast(PreparedPlan, self.__dict__["_prepared"]).context_fn

    def share_lock(self, lock: LendingLock) -> None:
        """Run in turn with other models that hold the lock, as they have modules in common.

        Args:
            lock: Theirs; in place of one that only the threads in this model ask for.
        """
        cast(PreparedPlan, self.__dict__["_prepared"]).lock = lock

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; a backward from the output follows the plan.

        Args:
            args: A batch: a tensor, or tuples, lists, dicts and dataclasses of them; as planned
                where gradients are wanted. Then what every stage is given besides, such as a
                condition.
            kwargs: The same by name; the batch by that of the first argument of the model.

        Raises:
            PlanMismatchError: The batch, the mode or what is trained is not as planned.
            ExecutionError: A stage cannot be run again with the same result.
        """
        if not torch.is_grad_enabled():
            return self.plainly(*args, **kwargs)
        given, options = first_by_position(self.model, args, kwargs)
        if not given:
            wrong = without_first(self.model, kwargs)
            raise PlanMismatchError(f"the model was called without its batch, {wrong}")
        return self._follow_plan(given[0], given[1:], options)

    def plainly(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as it is, in the context of a first run.

        Args:
            args: A batch, and what every stage is given besides.
            kwargs: The same by name.
        """
        with cast(PreparedPlan, self.__dict__["_prepared"]).first_context():
            return self.model(*args, **kwargs)

    @outside_of_compiled_code
    def _follow_plan(self, x: Any, extras: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """The same where gradients are on."""
        prepared = cast(PreparedPlan, self.__dict__["_prepared"])
        inputs, given = _apart(x, Extras(extras, options))
        tensors = [*inputs.leaves, *given.leaves, *prepared.inspection.slots.parameters()]
        trained = prepared.asks or any(tensor.requires_grad for tensor in tensors)
        if not trained and not prepared.inspection.trains_something_new():
            return _without_graph(self.plainly(x, *extras, **options))
        transform = transform_at_work(tensors)
        if transform:
            warnings.warn(
                f"{transform} is at work, which a plan cannot follow: the model runs by plain "
                "autograd, and takes its memory",
                BudgetWarning,
                stacklevel=2,
            )
            return self.plainly(x, *extras, **options)
        if is_sharded(self.model):
            if is_sharded(self):
                raise PlanMismatchError(
                    "both the model and what makes it follow the plan are sharded by fully_shard, "
                    "and the two own the same parameters: shard one of them"
                )
            return call_as_forward(self.model, partial(_call, prepared), x, *extras, **options)
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
        prepared.check_batch(inputs, given)
        prepared.expected.check(inside or ambient, prepared.inspection)
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
            before = run.interpreter.take_gradients() or (None,) * ctx.entries
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
