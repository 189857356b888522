"""Gradients that can be differentiated again: plain autograd over a chain run once more.

A schedule's backward computes numbers, not a graph. Where a graph is wanted
(`create_graph=True`), the chain runs again as one graph from its input, and autograd goes
back through that. It takes the memory of plain autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ...capture.stage_discovery import StagedModule
from ...recompute.side_outputs import SideOutputs
from ...recompute.tape import run_stage
from ...tensors.pytree import Extras, State
from .forward_snapshot import ForwardSnapshot


@final
@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of one backward, each connected to its graph."""

    inputs: tuple[Tensor | None, ...]
    """With respect to the tensors of the input."""
    others: dict[int, Tensor | None]
    """With respect to parameters and further inputs, by the id of their alias."""


def differentiable_gradients(
    seen: ForwardSnapshot,
    inputs: State,
    given: State,
    gradients: Sequence[Tensor | None],
    sides: SideOutputs,
) -> Gradients:
    """Run the whole chain again as one graph, and differentiate it with `create_graph=True`.

    Args:
        seen: The snapshot of the forward pass.
        inputs: The input as the caller gave it, with its graph.
        given: What every stage is given besides, with its graph.
        gradients: With respect to the tensors of the output.
        sides: The side outputs of stages, with their gradients.
    """
    prepared = seen.prepared
    # Stand-ins that are no leaves: asking for their gradients fires no hooks of the parameters,
    # and their graph leads on to the parameters themselves.
    aliases = [seen.alias_of[id(t)] for t in (*seen.parameters, *seen.given.leaves)]
    stand_in = {
        id(a): t.view_as(t) if t.requires_grad else a
        for t, a in zip((*seen.parameters, *given.leaves), aliases, strict=True)
    }
    bound = [[None if a is None else stand_in[id(a)] for a in places] for places in seen.bound]
    sources = [leaf.view_as(leaf) for leaf in inputs.leaves]
    extras = Extras.of(given.replaced(stand_in[id(a)] for a in aliases[len(seen.parameters) :]))
    blocks = range(len(prepared.slots))
    with (
        seen.entered(),
        seen.modes(blocks),
        seen.parameters_replaced(blocks, bound),
        seen.traceless(blocks),
        seen.again(),
    ):
        seen.begin_again()
        output = inputs.replaced(sources)
        left: dict[int, dict[int, Tensor]] = {}
        for i, stage in enumerate(prepared.stages, 1):
            if not prepared.facts.sides[i - 1]:
                output = run_stage(stage, output, extras)
                continue
            with sides.looking(i, stage.module) as look, look:
                look.meet(output.leaves)
                output = run_stage(stage, output, extras)
            left[i] = look.take()
    ends = [*zip(output.leaves, gradients, strict=True), *sides.gradients_again(left)]
    if isinstance(prepared.inspection.model, StagedModule):
        ends += prepared.inspection.model.sent_ahead(*extras.args, **extras.kwargs)
    starts = [*sources, *(stand_in[id(a)] for a in aliases)]
    found = _gradients(ends, starts)
    n = len(sources)
    return Gradients(tuple(found[:n]), {id(a): g for a, g in zip(aliases, found[n:], strict=True)})


def _gradients(
    outputs: Sequence[tuple[Tensor, Tensor | None]], starts: Sequence[Tensor]
) -> list[Tensor | None]:
    wanted = [start for start in starts if start.requires_grad]
    ends = [(y, g) for y, g in outputs if g is not None and y.requires_grad]
    if not ends or not wanted:
        return [None] * len(starts)
    found = iter(
        torch.autograd.grad(
            [y for y, _ in ends],
            wanted,
            [g for _, g in ends],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if start.requires_grad else None for start in starts]
