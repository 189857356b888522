"""Side outputs: tensors with a graph that a stage leaves elsewhere, such as an auxiliary loss.

A tensor with a graph that something still holds once a stage has returned, and its output is let
go, is a side output. A mode numbers the tensors that a stage meets, in order, so that a side output
of the first run is found again in each later one. The caller's object becomes an output of the
step's own graph, in place; its gradient is one more that the stage's backward begins with.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, final

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..base.errors import ExecutionError
from ..tensors.weak import referent
from ..torch_state.saved_hooks import Hooks, hooks_now

SidePlace: TypeAlias = tuple[int, int]
"""The stage that leaves a tensor, counted from 1, and its number among what the stage meets."""

# What torch 2.9's checkpoint keeps a region's inputs with: a tensor whose graph it reads again.
_KEEPS_INPUTS: Any = getattr(
    getattr(torch.utils.checkpoint, "_NoopSaveInputs", None), "_backward_cls", None
)

# What every module has; the rest of its attributes is the user's.
_OWN = frozenset(vars(nn.Module()))


@final
class Look(TorchFunctionMode):
    """Numbers the tensors that a stage meets while it runs, and says what is left of them."""

    def __init__(self, numbers: Iterable[int] | None = None) -> None:
        """Look for side outputs, or for those of an earlier run.

        Args:
            numbers: Of the tensors to find again; None to find what outlives the run.
        """
        super().__init__()
        self._wanted = None if numbers is None else frozenset(numbers)
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._order: list[weakref.ref[Tensor]] = []
        self._held: dict[int, Tensor] = {}
        self._paused = False
        self.under: Hooks | None = None
        """What packs for the user, in whose stead this does while a stage runs."""
        self._retaining: list[weakref.ref[Tensor]] = []
        self.retained: set[int] = set()
        """Numbers of what is to keep its gradient, once `take` has found them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch; what it is given was perhaps made where no mode sees it."""
        if self._paused:
            return func(*args, **(kwargs or {}))
        self.meet(args)
        if func is torch.Tensor.retain_grad and args[0].requires_grad:
            # Torch would keep hold of the contents, which are swapped.
            self._retaining.append(weakref.ref(args[0]))
            return None
        if kwargs:
            self.meet(kwargs.values())
        result = func(*args, **(kwargs or {}))
        self.meet((result,))
        return result

    def meet(self, values: Iterable[Any]) -> None:
        """Number the tensors among some values, and in lists and tuples of them."""
        for value in values:
            if isinstance(value, Tensor):
                self._number(value)
            elif isinstance(value, (tuple, list)):
                for part in value:
                    if isinstance(part, Tensor):
                        self._number(part)

    def keeping_aliases(self) -> saved_tensors_hooks:
        """Let the tape keep aliases of what it saves, so that the objects are the caller's alone.

        What saves and gives back is no part of the stage, and meets nothing.
        """
        self.under = hooks_now()
        return saved_tensors_hooks(self._keep, self._give_back)

    def _keep(self, tensor: Tensor) -> tuple[Any, int | None]:
        self._paused = True
        try:
            alias = tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
            if self.under is None:
                return alias, tensor._version
            return self.under[0](alias), None
        finally:
            self._paused = False

    def _give_back(self, kept: tuple[Any, int | None]) -> Tensor:
        self._paused = True
        try:
            tensor: Tensor = kept[0] if self.under is None else self.under[1](kept[0])
            found = tensor._version
        finally:
            self._paused = False
        if kept[1] is not None and kept[1] != found:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(tensor.shape)} is at version "
                f"{found}; expected version {kept[1]} instead"
            )
        return tensor

    def _number(self, tensor: Tensor) -> None:
        known = self._known.get(id(tensor))
        if known is not None and known() is tensor:
            return
        reference = self._known[id(tensor)] = weakref.ref(tensor)
        if self._wanted is not None and len(self._order) in self._wanted:
            self._held[len(self._order)] = tensor
        self._order.append(reference)

    def take(self) -> dict[int, Tensor]:
        """The side outputs by number; everything else of the run must have been let go.

        No weak reference to them is left: torch would not let their contents be swapped.
        """
        found, self._held = self._held, {}
        if self._wanted is None:
            alive = ((k, referent(reference)) for k, reference in enumerate(self._order))
            found = {k: tensor for k, tensor in alive if tensor is not None}
        self._known.clear()
        self._order.clear()
        retaining = {id(tensor) for tensor in map(referent, self._retaining)}
        self._retaining.clear()
        self.retained = {k for k, tensor in found.items() if id(tensor) in retaining}
        return {k: t for k, t in found.items() if t.requires_grad and _is_the_stages(t)}


def _is_the_stages(tensor: Tensor) -> bool:
    """Whether a tensor has a graph, and is none that torch's checkpoint keeps with the tape."""
    node = tensor.grad_fn
    return node is not None and not (_KEEPS_INPUTS and isinstance(node, _KEEPS_INPUTS))


def aliases_kept(wanted: bool) -> AbstractContextManager[object]:
    """Let a stage that has no side outputs save aliases, too, where its tape is shared.

    Args:
        wanted: Whether it shares its tape with a stage that has some.
    """
    return Look(()).keeping_aliases() if wanted else nullcontext()


def swap(tensor: Tensor, other: Tensor) -> None:
    """Give a tensor, in whatever list or attribute it is, the data and the graph of another.

    Args:
        tensor: What is changed in place.
        other: What it becomes; it must not be used again.

    Raises:
        ExecutionError: Something besides the caller's code holds it, or a weak reference does.
    """
    vars(other).update(vars(tensor))
    try:
        torch.utils.swap_tensors(tensor, other)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ExecutionError(
            f"left a tensor of shape {tuple(tensor.shape)} by another way than its output that "
            f"ckptsched cannot make part of the step's own graph ({error}); let it leave a copy "
            "(tensor.clone()), or return it"
        ) from error
    if tensor._backward_hooks is not None:
        tensor._backward_hooks = None  # those are the old graph's: new ones must reach the new


def cut(tensor: Tensor, like: Tensor | None = None) -> None:
    """Take the graph from a tensor, in place.

    Args:
        tensor: The tensor.
        like: A tensor of the same values whose storage it is to share from here on.
    """
    swap(tensor, (tensor if like is None else like).detach())


def edges_of(i: int, found: Mapping[int, Tensor]) -> dict[SidePlace, GradientEdge]:
    """Where the gradients of the side outputs of stage i enter the graph of a run."""
    return {(i, k): get_gradient_edge(tensor) for k, tensor in found.items()}


def cut_all(found: Mapping[int, Tensor]) -> list[Tensor]:
    """Take the graphs from the side outputs of a run, and return them."""
    tensors = list(found.values())
    for tensor in reversed(tensors):  # a view before what it is a view of
        cut(tensor)
    return tensors


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put back the tensors that modules have as attributes, or in lists, dicts or dataclasses."""
    holders: list[dict[str, Any]] = [module.__dict__ for module in modules]
    parts = [v for own in holders for v in own.values() if dataclasses.is_dataclass(v)]
    inside: list[Any] = [getattr(part, "__dict__", None) for part in parts]
    holders += [own for own in inside if isinstance(own, dict)]
    before = [
        (own, name, value, copy.copy(value) if isinstance(value, _CONTAINERS) else None)
        for own in holders
        for name, value in own.items()
        if name not in _OWN and isinstance(value, (Tensor, *_CONTAINERS))
    ]
    try:
        yield
    finally:
        for attributes, name, value, contents in before:
            if attributes.get(name) is not value and isinstance(attributes.get(name), type(value)):
                attributes[name] = value
            if contents is not None and not _same_parts(value, contents):
                _refill(value, contents)


_CONTAINERS = (list, dict, deque)


def _same_parts(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        return all(name in one and one[name] is part for name, part in other.items())
    return all(a is b for a, b in zip(one, other, strict=True))


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.update if isinstance(container, dict) else container.extend)(contents)


@final
class SideOutputs:
    """The side outputs of one step."""

    def __init__(self) -> None:
        """None yet."""
        self._first: dict[int, dict[int, weakref.ref[Tensor]]] = {}
        self._places: list[SidePlace] = []
        self._retaining: set[SidePlace] = set()
        self._gradients: dict[SidePlace, Tensor] = {}

    @contextmanager
    def looking(self, i: int, module: nn.Module) -> Iterator[Look]:
        """What a run of a stage is to be under; what runs again leaves the attributes alone.

        Args:
            i: The stage, counted from 1.
            module: What it runs.
        """
        first = self._first.get(i)
        with nullcontext() if first is None else attributes_kept(module.modules()):
            yield Look(first)

    def take(self, looks: Sequence[tuple[int, Look]]) -> dict[SidePlace, GradientEdge]:
        """Note what runs that share a graph have left.

        Args:
            looks: By stage what it ran under; outputs and inputs have been let go.

        Returns:
            Where the gradient of each side output enters the graph.

        Raises:
            ExecutionError: A stage has not left again what it left first.
        """
        found = {i: look.take() for i, look in looks}
        retained = {i: look.retained for i, look in looks}
        edges: dict[SidePlace, GradientEdge] = {}
        for i, tensors in found.items():
            edges |= edges_of(i, tensors)
            for k, tensor in tensors.items():
                if k in retained[i]:
                    # The graph of this run sees the whole gradient, the step's own a part of it.
                    tensor.register_hook(self._retain((i, k)))  # type: ignore[no-untyped-call]
        seen: set[int] = set()  # what a stage hands on may be found at the next one, too
        for i, tensors in found.items():
            first = self._first.get(i)
            if first is None:
                fresh = {k: tensor for k, tensor in tensors.items() if id(tensor) not in seen}
                self._first[i] = {k: weakref.ref(tensor) for k, tensor in fresh.items()}
                self._retaining |= {(i, k) for k in retained[i] & fresh.keys()}
                seen |= {id(tensor) for tensor in fresh.values()}
                continue
            if first.keys() - tensors.keys():
                raise ExecutionError(
                    f"left {len(first)} tensors by another way than its output when it first ran, "
                    f"and {len(tensors)} of them when it ran again; a stage must depend on its "
                    "input and parameters only"
                )
            for k in reversed(list(tensors)):  # a view before what it is a view of
                cut(tensors.pop(k), referent(first[k]))
        return edges

    def outputs(self) -> tuple[Tensor, ...]:
        """Those that somebody still holds at the end of the forward pass, without graphs."""
        self._places, found = [], []
        for place, tensor in self._alive():
            self._places.append(place)
            found.append(tensor.detach())
        return tuple(found)

    def _alive(self) -> Iterator[tuple[SidePlace, Tensor]]:
        for i, first in self._first.items():
            for k, reference in first.items():
                tensor = referent(reference)
                if tensor is not None and tensor.requires_grad:
                    yield (i, k), tensor

    def graft(self, outputs: list[Tensor]) -> None:
        """Make them part of another graph, in place.

        Args:
            outputs: What `outputs` returned, with the graph; nothing else may hold them. Emptied,
                as what is swapped for a view would go on holding what that is a view of.
        """
        alive = dict(self._alive())
        for i, k in alive:
            del self._first[i][k]
        for place in reversed(self._places):
            output, tensor = outputs.pop(), alive.get(place)
            if tensor is None:
                continue
            swap(tensor, output)
            del output
            if place in self._retaining:
                tensor.retain_grad()
        for (i, k), tensor in alive.items():
            self._first[i][k] = weakref.ref(tensor)

    def _retain(self, place: SidePlace) -> Callable[[Tensor], None]:
        """A hook that keeps a gradient where the caller asked for it."""
        i, k = place
        first = self._first  # not the object itself: a weak reference would stop it from swapping

        def hook(gradient: Tensor) -> None:
            tensor = referent(first[i][k])
            if tensor is not None:
                tensor.grad = gradient.clone()

        return hook

    def arrive(self, gradients: Sequence[Tensor | None]) -> None:
        """Take their gradients, one for each that `outputs` returned."""
        pairs = zip(self._places, gradients, strict=True)
        self._gradients = {place: g for place, g in pairs if g is not None}

    def gradients_again(
        self, found: Mapping[int, Mapping[int, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Side outputs of another run beside the gradients that have arrived, given away.

        Args:
            found: By stage and number.
        """
        pairs = [(i, k, tensor) for i, by in found.items() for k, tensor in by.items()]
        return [
            (tensor, self._gradients.pop((i, k)))
            for i, k, tensor in pairs
            if (i, k) in self._gradients
        ]

    def gradients_of(self, places: Iterable[SidePlace]) -> dict[SidePlace, Tensor]:
        """The gradients that have arrived for some of them, given away."""
        return {p: self._gradients.pop(p) for p in places if p in self._gradients}

    def let_go(self) -> None:
        """Forget the gradients."""
        self._gradients.clear()
