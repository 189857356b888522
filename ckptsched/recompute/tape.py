"""Stages, differentiated on their own: the tape of a forward and the step back.

A tape is the autograd graph of one run of a stage, or of several that follow each other, from
a source that holds no data to the edge of the output. Going back accumulates parameter
gradients in the aliases that were in place when the tape was made, and hands the gradient of
the input to the caller.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, saved_tensors_hooks

from ..base.errors import ExecutionError
from ..tensors.pytree import NO_EXTRAS, Extras, State
from ..torch_state.replay_context import uncompiled
from ..torch_state.saved_hooks import hooks_now
from .engine import Root, edge_of, go_back
from .side_outputs import Look, SidePlace
from .tape_contents import NOTHING, Contents, walk

_NO_SIDES: Mapping[SidePlace, Tensor] = {}

# Something that requires a gradient, so that a source does; it never receives one.
_ANCHOR = torch.empty(0, requires_grad=True, device="cpu")


# Stages of recorded models pass on tuples of tensors, which need not be taken apart each time.
_ONE_KIND = {Tensor}
_TUPLES: dict[int, Any] = {}  # by length the tree around a tuple of distinct tensors


class Carries(enum.IntEnum):
    """How a tensor between stages takes part in autograd, as a stage finds it."""

    NOTHING = 0
    """It requires none."""
    GRAPH = 1
    """It has a history."""
    LEAF = 2
    """It requires one and has no history, as a batch made by `requires_grad_()`."""
    ASKED = 3
    """It is a leaf that the stage itself lets require one."""

    @classmethod
    def of(cls, tensor: Tensor) -> Carries:
        """What a tensor carries as it is."""
        if not tensor.requires_grad:
            return _NOTHING
        return _LEAF if tensor.is_leaf else _GRAPH


_NOTHING, _GRAPH, _LEAF, _ASKED = Carries


class Alone(enum.IntEnum):
    """How a stage is run where no tape is kept."""

    PLAIN = 0
    """Without gradients."""
    FORGETS = 1
    """With gradients on, as it gives the same bits only so; what it saves is let go at once."""
    DIFFERENTIATES = 2
    """With gradients on and all that it saves, as it goes back through a graph of its own."""


class _Box(list[Tensor]):
    """Where a source puts a gradient; it lives as long as the graph that begins there."""

    __slots__ = ("__weakref__",)


_Outlet: TypeAlias = _Box | Tensor | None
"""Where the gradient of a tensor of the input comes out: a box that a node fills, or the `grad` of
a leaf; None where none is wanted."""


class _Source(torch.autograd.Function):
    """Where a tape begins: hands the data on without holding it, and catches the gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: _Box) -> Tensor:
        ctx.box = box
        ctx.set_materialize_grads(False)
        return box.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is not None:
            ctx.box.append(grads[0])
        return None, None


class _Handing(torch.autograd.Function):
    """Passes the gradients in a box to its inputs, before any other node of the tape runs.

    For the sums of gradients collected so far: autograd adds up what arrives at a parameter in
    one buffer, in order of arrival. Where a tape uses a parameter several times, starting that
    buffer with the sum so far gives the order of additions of one graph over all stages, and so
    the same bits. For the gradient that a backward begins with: the engine holds what it is
    called with to the end, and lets go of what one node hands to another.
    """

    @staticmethod
    def forward(ctx: Any, box: list[Tensor | None], *receivers: Tensor) -> Tensor:
        ctx.box = box
        return torch.empty(0, device=receivers[0].device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Given away for good: a buffer may then add in place, as it does without us.
        given = tuple(ctx.box)
        ctx.box.clear()
        return None, *given


@final
class Tape:
    """The autograd graph of one run of a stage, or of several, and the way back through it."""

    __slots__ = (
        *("_box", "_boxes", "_edges", "_fed", "_hands_on", "_more", "_token"),
        *("carries", "shapes", "sides"),
    )

    def __init__(self, boxes: list[_Outlet], outputs: Sequence[Tensor]) -> None:
        """Take what a run made.

        Args:
            boxes: Where sources put the gradients of the input's tensors.
            outputs: The output's tensors, with their graphs.
        """
        self._boxes = boxes
        self._edges = [edge_of(y) for y in outputs if y.requires_grad]
        self.carries = tuple([Carries.of(y) for y in outputs])
        """Which tensors of the output depend on something that wants a gradient."""
        self.shapes = tuple([y.shape for y in outputs])
        """Of the output's tensors."""
        self.sides: Mapping[SidePlace, GradientEdge] = {}
        """Where the gradients of side outputs come in."""
        self._box: list[Tensor | None] = []
        self._fed: Sequence[Tensor] = ()
        self._token: Tensor | None = None
        self._hands_on = False
        self._more: tuple[Tensor, list[Tensor | None], Sequence[Tensor]] | None = None

    def repeated_leaves(self) -> set[int]:
        """Ids of the leaves that the stage has used more than once."""
        return {leaf for leaf, (_, count) in self.contents()[0].leaves.items() if count > 1}

    def contents(self, marks: Sequence[int] = (0,)) -> list[Contents]:
        """Walk the graph, and find the leaves and storages that it holds, by stage; not the input.

        What another stage left for this one counts as a leaf, and is none.

        Args:
            marks: What `nodes_made` said before each of the stages; one stage if not given.
        """
        own = {id(box) for box in self._boxes}

        def leaf_of(node: Node) -> object:
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                return NOTHING if leaf is _ANCHOR or id(leaf) in own else leaf
            box = getattr(node, "box", None)
            return box if isinstance(box, _Box) and id(box) not in own else None

        edges = (*self._edges, *self.sides.values())
        return walk([edge.node for edge in edges], leaf_of, marks)

    def feed_back(self, aliases: Sequence[Tensor], outputs: Sequence[Tensor] = ()) -> None:
        """Let the sums of these aliases' gradients so far come first in the backward.

        Gradients must be on, and the stages have run: the engine runs the newest node first.

        Args:
            aliases: Leaves that the stages have used more than once.
            outputs: The output's tensors that carry a gradient, with their graphs, if their
                gradients are to be let go in the backward as soon as nothing needs them. Without,
                they are held to its end.
        """
        if not (aliases or outputs):  # stages without gradients, through which nothing goes back
            return
        self._token = cast(Tensor, _Handing.apply(self._box, *aliases, *outputs))
        self._fed = aliases
        self._hands_on = bool(outputs)

    def feed_more(self, aliases: Sequence[Tensor]) -> None:
        """The same for further aliases, after `feed_back`, just before the backward.

        Args:
            aliases: Leaves that `feed_back` was not given.
        """
        box: list[Tensor | None] = []
        self._more = cast(Tensor, _Handing.apply(box, *aliases)), box, aliases

    def watch(self) -> Callable[[], object]:
        """A weak reference that shows, once the tape is gone, whether something holds its graph.

        Returns:
            A function that returns None then; None always where the input has no gradient.
        """
        for box in self._boxes:
            if isinstance(box, _Box):
                return weakref.ref(box)
        return _nothing

    @property
    def is_used(self) -> bool:
        """Whether something has gone back through the graph."""
        return any(box.grad is not None if isinstance(box, Tensor) else box for box in self._boxes)

    def backward(
        self, gradients: list[Tensor | None], further: Mapping[SidePlace, Tensor] = _NO_SIDES
    ) -> tuple[Tensor | None, ...]:
        """Run the backward once.

        Args:
            gradients: With respect to the output's tensors, each in its shape and dtype; None
                where none came. Emptied, so that they can be let go.
            further: Those of side outputs.

        Returns:
            The gradients with respect to the input's tensors; None where there is none.
        """
        arrived = [g for g, carried in zip(gradients, self.carries, strict=True) if carried]
        gradients.clear()
        if not further and all(gradient is None for gradient in arrived):
            return (None,) * len(self._boxes)
        roots: list[Root] = []
        given: list[Tensor] = []
        if self._token is not None:
            roots.append(self._token)
            given.append(self._token.detach())
            for alias in self._fed:
                self._box.append(alias.grad)
                alias.grad = None
        if self._more is not None:
            token, box, aliases = self._more
            roots.append(token)
            given.append(token.detach())
            for alias in aliases:
                box.append(alias.grad)
                alias.grad = None
        if self._hands_on:
            self._box += arrived
            arrived.clear()
        for edge, gradient in zip(self._edges, arrived, strict=False):
            if gradient is not None:
                roots.append(edge)
                given.append(gradient)
        for place, gradient in further.items():
            roots.append(self.sides[place])
            given.append(gradient)
        go_back(tuple(roots), tuple(given))
        return tuple([_taken_from(box) for box in self._boxes])


def _taken_from(box: _Outlet) -> Tensor | None:
    if isinstance(box, Tensor):
        gradient, box.grad = box.grad, None
        return gradient
    return box.pop() if box else None


def are_leaves(found: Sequence[object]) -> bool:
    """Whether all of what `Tape.contents` found are leaves, and none what another stage left."""
    return all(isinstance(leaf, Tensor) for leaf in found)


def as_asked(x: State, wanted: Sequence[int]) -> State:
    """The input as plain autograd leaves it: where the first stage asks, a leaf with a gradient.

    Args:
        x: The input, which stays as it is.
        wanted: For each of its tensors one of `Carries`.
    """
    if _ASKED not in wanted:
        return x
    return x.replaced(
        leaf.detach().requires_grad_() if wants == _ASKED else leaf
        for leaf, wants in zip(x.leaves, wanted, strict=True)
    )


def sources_of(x: State, wanted: Sequence[int]) -> tuple[list[_Outlet], State]:
    """Where a tape begins; gradients must be on.

    Args:
        x: The input, without a graph.
        wanted: For each tensor of the input what the stage is to find, one of `Carries`.

    Returns:
        Where the gradients come out, None where none is wanted, and the input of the first stage.
    """
    boxes: list[_Outlet] = []
    sources = []
    for leaf, wants in zip(x.leaves, wanted, strict=True):
        source = leaf.detach()
        box: _Outlet = None
        if wants == _GRAPH:
            box = _Box((source,))
            source = cast(Tensor, _Source.apply(_ANCHOR, box))
        elif wants:
            box = source.requires_grad_() if wants == _LEAF else source
        boxes.append(box)
        sources.append(source)
    return boxes, x.replaced(sources)


def _nothing() -> None:
    """A reference to nothing."""


def record(
    stage: Callable[..., Any],
    x: State,
    *,
    wanted: Sequence[int],
    extras: Extras = NO_EXTRAS,
    look: Look | None = None,
    keeps: bool = True,
) -> tuple[Tape, State]:
    """Run a stage with gradients on and keep its tape.

    Args:
        stage: The stage, its parameters replaced by aliases.
        x: Its input, without a graph.
        wanted: As for `sources_of`.
        extras: What else every stage is given.
        look: What finds its side outputs, if it has any.
        keeps: As for `run_under`.

    Returns:
        The tape, and the output without a graph, in the same storages.
    """
    with torch.enable_grad():
        boxes, source = sources_of(x, wanted)
        output = run_under(look, stage, source, extras, keeps=keeps)
    return Tape(boxes, output.leaves), output.detached()


def run_under(
    look: Look | None,
    stage: Callable[..., Any],
    x: State,
    extras: Extras,
    *,
    keeps: bool = True,
) -> State:
    """Run a stage under what finds its side outputs, if it has any; gradients must be on.

    Args:
        look: What finds them.
        stage: The stage.
        x: Its input.
        extras: What else every stage is given.
        keeps: Whether what it saves for a backward outlives the look for side outputs.
    """
    if look is None:
        return run_stage(stage, x, extras)
    # A hook of the user's that gives back what it is given would keep a tensor alive by a cycle.
    keeps = keeps or hooks_now() is not None
    with uncompiled(), look, look.keeping_aliases() if keeps else nullcontext():
        look.meet(x.leaves)
        return run_stage(stage, x, extras)


def run_alone(
    stage: Callable[..., Any],
    x: State,
    *,
    wanted: Sequence[int],
    extras: Extras = NO_EXTRAS,
    how: int = Alone.PLAIN,
    look: Look | None = None,
) -> State:
    """Run a stage and keep no tape.

    Args:
        stage: The stage, its parameters replaced by aliases.
        x: Its input, without a graph.
        wanted: As for `sources_of`.
        extras: What else every stage is given.
        how: One of `Alone`.
        look: What finds its side outputs, if it has any; gradients are on then, too.

    Returns:
        The output without a graph: a stage that turns gradients on by itself returns one.

    Raises:
        ExecutionError: A stage that forgets what it saves has gone back through a graph of its own.
    """
    if how == Alone.PLAIN and look is None:
        with torch.no_grad():
            return run_stage(stage, x, extras).without_graph()
    keeps = how == Alone.DIFFERENTIATES
    saving = nullcontext() if keeps else saved_tensors_hooks(_forget, _recall)
    with torch.enable_grad(), saving:
        source = sources_of(x, wanted)[1]
        return run_under(look, stage, source, extras, keeps=False).detached()


def _forget(tensor: Tensor) -> None:
    """Saves nothing."""


def _recall(nothing: None) -> Tensor:
    raise ExecutionError(
        "a stage called torch.autograd.grad, or went back through a graph of its own otherwise, "
        "and did not when the model was profiled; profile and plan again, with a sample on which "
        "it does"
    )


def run_stage(stage: Callable[..., Any], x: State, extras: Extras = NO_EXTRAS) -> State:
    """Run a stage as it is, and take apart what it returns.

    Args:
        stage: The stage.
        x: Its input.
        extras: What else every stage is given.

    Raises:
        ExecutionError: It returned what cannot be a state.
    """
    value = x.leaves if x.tree is _TUPLES.get(len(x.leaves)) else x.value()
    output = stage(value, *extras.args, **extras.kwargs) if extras else stage(value)
    if isinstance(output, Tensor):
        return State((output,))
    if type(output) is tuple and output and _are_distinct_tensors(output):
        return state_of(output)
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


def _are_distinct_tensors(parts: tuple[object, ...]) -> bool:
    # Nearly always of torch's own class, which is told faster than by a loop.
    if {*map(type, parts)} != _ONE_KIND and not all(isinstance(part, Tensor) for part in parts):
        return False
    return len({*map(id, parts)}) == len(parts)


def state_of(tensors: tuple[Tensor, ...]) -> State:
    """What `State.of` gives for a tuple of distinct tensors; quicker."""
    tree = _TUPLES.get(len(tensors))
    if tree is None:
        tree = _TUPLES.setdefault(len(tensors), State.of(tensors).tree)
    return State(tensors, tree)
