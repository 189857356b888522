"""One stage, differentiated on its own: the tape of its forward and the step back.

A tape is the autograd graph of one run of one stage, from a source that holds no data to
the edge of its output. Going back accumulates parameter gradients in the aliases that were
in place when the tape was made, and hands the gradient of the input to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .errors import ExecutionError

# Something that requires a gradient, so that a source does; it never receives one.
_ANCHOR = torch.empty(0, requires_grad=True)


class _Source(torch.autograd.Function):
    """Where a tape begins: hands the data on without holding it, and catches the gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        ctx.set_materialize_grads(False)
        return box.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is not None:
            ctx.box.append(grads[0])
        return None, None


class _Sums(torch.autograd.Function):
    """Feeds gradients collected so far back to the aliases, as the first of all.

    Autograd adds up what arrives at a parameter in one buffer, in order of arrival. Where a
    stage uses a parameter several times, starting that buffer with the sum so far gives the
    order of additions of one graph over all stages, and so the same bits.
    """

    @staticmethod
    def forward(ctx: Any, sums: list[Tensor | None], *aliases: Tensor) -> Tensor:
        ctx.sums = sums
        return torch.empty(0, device=aliases[0].device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Given away for good: the buffer may then add in place, as it does without us.
        given = tuple(ctx.sums)
        ctx.sums.clear()
        return None, *given


@final
class Tape:
    """What one run of one stage leaves for its backward."""

    __slots__ = ("_box", "_fed", "_roots", "_sums", "shape")

    def __init__(self, box: list[Tensor], roots: list[GradientEdge], shape: torch.Size) -> None:
        """Take what `record` made.

        Args:
            box: Where the source puts the gradient of the input.
            roots: Edge of the output; empty where nothing in the stage needs a gradient.
            shape: Shape of the output.
        """
        self._box = box
        self._roots = roots
        self._fed: Sequence[Tensor] = ()
        self._sums: list[Tensor | None] = []
        self.shape = shape

    def repeated_leaves(self) -> set[int]:
        """Ids of the leaves that the stage has used more than once."""
        return {leaf for leaf, count in self.uses().items() if count > 1}

    def uses(self) -> dict[int, int]:
        """How often the stage has used each leaf, by the leaf's id."""
        uses: dict[int, int] = {}
        stack: list[Node] = [edge.node for edge in self._roots]
        seen = set(stack)
        while stack:
            for node, _ in stack.pop().next_functions:
                if node is None:
                    continue
                leaf = getattr(node, "variable", None)
                if leaf is _ANCHOR:
                    continue
                if leaf is not None:
                    uses[id(leaf)] = uses.get(id(leaf), 0) + 1
                elif node not in seen:
                    seen.add(node)
                    stack.append(node)
        return uses

    def feed_back(self, aliases: Sequence[Tensor]) -> None:
        """Let the sums of these aliases' gradients so far come first in the backward.

        Args:
            aliases: Leaves that the stage has used more than once.
        """
        # Made after the stage has run: the engine runs the newest node first.
        with torch.enable_grad():
            token = cast(Tensor, _Sums.apply(self._sums, *aliases))
        self._fed = aliases
        self._roots.insert(0, get_gradient_edge(token))

    def backward(self, gradient: Tensor | None) -> Tensor | None:
        """Go back once.

        Args:
            gradient: With respect to the output, in its shape and dtype.

        Returns:
            The gradient with respect to the input; None where it needs none.
        """
        if not self._roots or gradient is None:
            return None
        gradients = [gradient]
        if self._fed:
            gradients.insert(0, torch.empty(0, device=self._fed[0].device))
            for alias in self._fed:
                self._sums.append(alias.grad)
                alias.grad = None
        torch.autograd.backward(self._roots, gradients)
        return self._box.pop() if self._box else None


def record(
    stage: Callable[[Tensor], Tensor], x: Tensor, *, needs_gradient: bool
) -> tuple[Tape, Tensor]:
    """Run a stage with gradients on and keep its tape.

    Args:
        stage: The stage, its parameters replaced by aliases.
        x: Its input, without a graph.
        needs_gradient: Whether the gradient with respect to the input is wanted.

    Returns:
        The tape, and the output without a graph, in the same storage.
    """
    box: list[Tensor] = []
    with torch.enable_grad():
        source = x.detach()
        if needs_gradient:
            box.append(source)
            source = cast(Tensor, _Source.apply(_ANCHOR, box))
        output = check_output(stage, stage(source))
    roots = [get_gradient_edge(output)] if output.requires_grad else []
    return Tape(box, roots, output.shape), output.detach()


def check_output(stage: object, output: object) -> Tensor:
    """Refuse what cannot be a state.

    Args:
        stage: The stage, for its name.
        output: What it returned.

    Raises:
        ExecutionError: It is not a tensor.
    """
    if isinstance(output, Tensor):
        return output
    found = "nothing (None)" if output is None else f"a {type(output).__name__}"
    raise ExecutionError(
        f"stage {getattr(stage, 'name', stage)!r} returned {found} where a tensor was expected; "
        "let every stage take one tensor and return one tensor"
    )
