"""Runs a plan: autograd that follows a schedule.

The outer graph has one node a block, so that each parameter's gradient arrives once and as
early as in plain autograd, and one node that hands out the output. All nodes of one call
share a `Run`, which owns what is stored and interprets the schedule: a block's forward node
runs the operations up to the next block, its backward node those up to its first stage's
Backward. Between nodes travel empty tokens, never states, so that the outer graph keeps no
data alive.
"""

from __future__ import annotations

from typing import Any, cast, final

import torch
from torch import Tensor, nn

from .plans import Plan
from .program import Program
from .run import Run


def checkpointed(model: nn.Module, plan: Plan) -> Checkpointed:
    """Make a model train by a plan.

    Args:
        model: The model that the plan was made for.
        plan: The plan.

    Returns:
        A module with the same parameters, buffers and `state_dict` keys. It shares them with
        `model`. Its forward takes a batch of the planned shape; where no gradient is wanted it
        runs the model as it is, on any batch.

    Raises:
        PlanMismatchError: The plan was made for another model, or by hand.
    """
    if isinstance(model, Checkpointed):
        model = model.model
    return Checkpointed(model, plan)


@final
class Checkpointed(nn.Module):
    """A model that trains by a plan; see `checkpointed`."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        """Share everything that the model owns, and check that the plan is for it."""
        super().__init__()
        own = self.__dict__
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[name] = model.__dict__[name]
        # Not as a submodule: the keys of the state_dict stay those of the model.
        own["_model"] = model
        own["_program"] = Program(model, plan)
        self.training = model.training

    @property
    def model(self) -> nn.Module:
        """The model itself, which runs by plain autograd."""
        return cast(nn.Module, self.__dict__["_model"])

    @property
    def plan(self) -> Plan:
        """The plan that is followed."""
        return cast(Program, self.__dict__["_program"]).plan

    def train(self, mode: bool = True) -> Checkpointed:
        """Set training mode, here and in the model."""
        super().train(mode)
        self.model.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Run the model; a backward from the output follows the plan.

        Args:
            x: A batch; of the planned shape and dtype where gradients are wanted.

        Raises:
            PlanMismatchError: The batch, the mode or what is trained is not as planned.
            ExecutionError: A stage cannot be run again with the same result.
        """
        program = cast(Program, self.__dict__["_program"])
        if not torch.is_grad_enabled() or not program.wants_gradient(x):
            return cast(Tensor, self.model(x))
        return _step(program, x)


def _step(program: Program, x: Tensor) -> Tensor:
    """One forward pass whose backward follows the schedule."""
    program.check_batch(x)
    run = Run(program, x)
    token = x
    for k, parameters in enumerate(run.parameters_by_block):
        token = _BlockNode.apply(run, k, token, *parameters)
    return cast(Tensor, _OutputNode.apply(run, token))


class _BlockNode(torch.autograd.Function):
    """One block in the outer graph; its parameters are inputs, so gradients reach them."""

    @staticmethod
    def forward(ctx: Any, run: Run, k: int, token: Tensor, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.run, ctx.k = run, k
        run.forward(run.program.segments.forward[k])
        return torch.empty(0, device=run.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        run, k = ctx.run, ctx.k
        lowest = not ctx.needs_input_grad[2] or k == 0
        gradients = run.backward(run.program.segments.backward[-1 - k], lowest=lowest)
        before = None
        if ctx.needs_input_grad[2]:
            before = run.take_gradient() if k == 0 else torch.empty(0, device=run.device)
        return None, None, before, *gradients


class _OutputNode(torch.autograd.Function):
    """Hands out the output, and takes its gradient before any block's backward begins.

    A node of its own: what the engine passes to a node it holds until the node is done.
    """

    @staticmethod
    def forward(ctx: Any, run: Run, token: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.run = run
        return run.turn()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.run.start_backward(grads[0])
        return None, torch.empty(0, device=ctx.run.device)
