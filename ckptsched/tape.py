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
from .trees import NO_EXTRAS, Extras, State

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

    __slots__ = ("_boxes", "_edges", "_fed", "_feed", "_sums", "shapes")

    def __init__(
        self,
        boxes: list[list[Tensor] | None],
        edges: list[GradientEdge | None],
        shapes: tuple[torch.Size, ...],
    ) -> None:
        """Take what `record` made.

        Args:
            boxes: Where sources put the gradients of the input's tensors; None for a tensor whose
                gradient is not wanted.
            edges: Of the output's tensors; None for one that needs no gradient.
            shapes: Of the output's tensors.
        """
        self._boxes = boxes
        self._edges = edges
        self._fed: Sequence[Tensor] = ()
        self._feed: GradientEdge | None = None
        self._sums: list[Tensor | None] = []
        self.shapes = shapes

    @property
    def carries(self) -> tuple[bool, ...]:
        """Which tensors of the output depend on something that wants a gradient."""
        return tuple([edge is not None for edge in self._edges])

    def repeated_leaves(self) -> set[int]:
        """Ids of the leaves that the stage has used more than once."""
        return {leaf for leaf, count in self.uses().items() if count > 1}

    def uses(self) -> dict[int, int]:
        """How often the stage has used each leaf, by the leaf's id."""
        uses: dict[int, int] = {}
        seen: set[Node] = set()
        ahead: list[Node | None] = [edge.node for edge in self._edges if edge is not None]
        while ahead:
            node = ahead.pop()
            leaf = getattr(node, "variable", None)
            if node is None or leaf is _ANCHOR:
                continue
            if leaf is not None:
                uses[id(leaf)] = uses.get(id(leaf), 0) + 1
            elif node not in seen:
                seen.add(node)
                ahead += [before for before, _ in node.next_functions]
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
        self._feed = get_gradient_edge(token)

    def backward(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Go back once.

        Args:
            gradients: With respect to the output's tensors, each in its shape and dtype; None
                where none came.

        Returns:
            The gradients with respect to the input's tensors; None where there is none.
        """
        roots, given = [], []
        for edge, gradient in zip(self._edges, gradients, strict=True):
            if edge is not None and gradient is not None:
                roots.append(edge)
                given.append(gradient)
        if not roots:
            return (None,) * len(self._boxes)
        if self._feed is not None:
            roots.insert(0, self._feed)
            given.insert(0, torch.empty(0, device=self._fed[0].device))
            for alias in self._fed:
                self._sums.append(alias.grad)
                alias.grad = None
        torch.autograd.backward(roots, given)
        return tuple([box.pop() if box else None for box in self._boxes])


def record(
    stage: Callable[..., Any],
    x: State,
    *,
    wanted: Sequence[bool],
    extras: Extras = NO_EXTRAS,
) -> tuple[Tape, State]:
    """Run a stage with gradients on and keep its tape.

    Args:
        stage: The stage, its parameters replaced by aliases.
        x: Its input, without a graph.
        wanted: For each tensor of the input whether its gradient is wanted.
        extras: What else every stage is given.

    Returns:
        The tape, and the output without a graph, in the same storages.
    """
    boxes: list[list[Tensor] | None] = []
    sources = []
    with torch.enable_grad():
        for leaf, wants in zip(x.leaves, wanted, strict=True):
            source = leaf.detach()
            box: list[Tensor] | None = None
            if wants:
                box = [source]
                source = cast(Tensor, _Source.apply(_ANCHOR, box))
            boxes.append(box)
            sources.append(source)
        output = run_stage(stage, x.replaced(sources), extras)
    edges = [get_gradient_edge(y) if y.requires_grad else None for y in output.leaves]
    shapes = tuple([y.shape for y in output.leaves])
    return Tape(boxes, edges, shapes), output.detached()


def run_alone(
    stage: Callable[..., Any],
    x: State,
    *,
    wanted: Sequence[bool],
    extras: Extras = NO_EXTRAS,
    needs_tape: bool = False,
) -> State:
    """Run a stage and keep no tape.

    Args:
        stage: The stage, its parameters replaced by aliases.
        x: Its input, without a graph.
        wanted: For each tensor of the input whether its gradient is wanted.
        extras: What else every stage is given.
        needs_tape: Whether the stage gives the same bits only where it runs with its tape, which
            then is let go.

    Returns:
        The output without a graph: a stage that turns gradients on by itself returns one.
    """
    if needs_tape:
        return record(stage, x, wanted=wanted, extras=extras)[1]
    with torch.no_grad():
        return run_stage(stage, x, extras).detached()


def run_stage(stage: Callable[..., Any], x: State, extras: Extras = NO_EXTRAS) -> State:
    """Run a stage as it is, and take apart what it returns.

    Args:
        stage: The stage.
        x: Its input.
        extras: What else every stage is given.

    Raises:
        ExecutionError: It returned what cannot be a state.
    """
    value = x.value()
    output = stage(value, *extras.args, **extras.kwargs) if extras else stage(value)
    if isinstance(output, Tensor):
        return State((output,))
    try:
        state = State.of(output)
    except ExecutionError as error:
        raise ExecutionError(f"stage {getattr(stage, 'name', stage)!r} returned {error}") from None
    if not state.leaves:
        found = "nothing (None)" if output is None else f"a {type(output).__name__} without tensors"
        raise ExecutionError(
            f"stage {getattr(stage, 'name', stage)!r} returned {found} where a state was expected; "
            "let every stage return a tensor, or a tuple, list, dict or dataclass with some"
        )
    return state
