"""Stand-ins for the parameters and buffers of modules while their stages run.

A stage that is differentiated on its own must not touch the real parameters: their hooks
would fire once a step and `torch.autograd.grad` would pollute their `.grad`. So while a
stage runs, its modules hold aliases that share the parameters' storage, and gradients
collect in the aliases. Likewise a stage that runs again holds clones of its buffers, so that
running statistics move once a training step.

Only the thread that runs the stages finds them. Others that look at the model meanwhile, to save
it, average it or clear its gradients, find the parameters and buffers themselves.
"""

from __future__ import annotations

import abc
import copy
import threading
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Literal, TypeAlias, cast, final

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..tensors.wrapper_tensors import is_subclass
from ..torch_state.locks import in_engine, in_forked_process, is_first, waits

Held: TypeAlias = dict[str, Tensor | None]
"""Parameters or buffers of a module, by name."""

Slot: TypeAlias = tuple[nn.Module, str]
"""A module, and the name under which it keeps a buffer."""

Table: TypeAlias = Literal["_parameters", "_buffers"]
"""Where a module keeps them."""

_PLAIN = nn.Module.__setattr__


class StandIns(Held, abc.ABC):
    """A module's dict of parameters or buffers in which one thread finds stand-ins.

    Reading is on the way of every stage, so what the thread finds is in the dictionary itself.
    """

    __slots__ = ("below", "thread")

    below: Held
    """What the module has without these: its own, or stand-ins that were there already."""
    thread: int
    """Who finds these."""

    def _found(self) -> Held:
        """What the calling thread finds; `dict`'s own methods read it."""
        thread, held = get_ident(), cast(Held, self)
        waiting = None
        while isinstance(held, StandIns):
            if held.thread == thread:
                return held
            if waiting is None and waits(held.thread):
                waiting = held
            held = held.below
        # A thread of autograd's engine works for a thread that waits for it.
        return held if waiting is None or not in_engine() else waiting

    def get(self, name: str, default: Any = None) -> Any:  # noqa: D102 - as of every dict
        return dict.get(self._found(), name, default)

    def items(self) -> ItemsView[str, Tensor | None]:  # type: ignore[override]  # noqa: D102
        return dict.items(self._found())

    def values(self) -> ValuesView[Tensor | None]:  # type: ignore[override]  # noqa: D102
        return dict.values(self._found())

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        dict.__setitem__(self._found(), name, tensor)

    def __delitem__(self, name: str) -> None:
        dict.__delitem__(self._found(), name)

    def pop(self, name: str, *default: Any) -> Any:  # noqa: D102
        return dict.pop(self._found(), name, *default)

    def update(self, *others: Any, **named: Any) -> None:  # noqa: D102
        dict.update(self._found(), *others, **named)

    def copy(self) -> Held:
        """Those that the calling thread finds, in a dict of their own."""
        return dict(dict.items(self._found()))

    def __copy__(self) -> Held:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return copy.deepcopy(self.copy(), memo)

    def __reduce_ex__(self, _: Any) -> Any:
        return dict, (self.copy(),)


@final
class _Alone(StandIns):
    """For processes with one thread: lookups of single tensors cost nothing.

    A thread that a stage starts belongs to the step in that.
    """

    __slots__ = ()


@final
class _AmongThreads(StandIns):
    """For processes with several threads: each lookup asks which thread it is."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Tensor | None:
        # What is compiled is looked through by the thread that runs it, which cannot ask.
        if is_compiling() or self.thread == get_ident():
            return dict.__getitem__(self, name)
        return dict.__getitem__(self._found(), name)


@final
class _Placed:
    """Stand-ins in some modules, from when they are put there to when they are taken out."""

    __slots__ = ("_kind", "_pairs", "thread")

    def __init__(self, kind: Table) -> None:
        self._kind = kind
        self._pairs: list[tuple[nn.Module, StandIns]] = []
        self.thread = get_ident()

    def put(self, modules: Iterable[tuple[nn.Module, Iterable[tuple[str, Tensor | None]]]]) -> None:
        """Let the calling thread find other tensors.

        Args:
            modules: Each with the tensors by name.
        """
        kind, thread, placing = self._kind, self.thread, _PLACING
        made_of = _Alone if threading.active_count() == 1 else _AmongThreads
        with placing.lock:
            placing.placed.add(self)
            for module, instead in modules:
                own = module.__dict__
                below = own[kind]
                made = made_of(below if type(below) is dict else below.items())
                made.below, made.thread = below, thread
                dict.update(made, instead)
                self._pairs.append((module, made))
                own[kind] = made

    def take_out(self) -> None:
        """Take them out, from under those that other threads have put there since as well."""
        with _PLACING.lock:
            for module, stand_ins in self._pairs:
                stand_ins.thread = 0  # nobody's, in a shallow copy of the module that has them too
                held = module.__dict__[self._kind]
                if held is stand_ins:
                    module.__dict__[self._kind] = stand_ins.below
                    continue
                while isinstance(held, StandIns):
                    if held.below is stand_ins:
                        held.below = stand_ins.below
                        break
                    held = held.below
            _PLACING.placed.discard(self)


class _Placing:
    """What is placed, and the lock of who changes that."""

    def __init__(self) -> None:
        # One that the same thread may take again: garbage may be collected meanwhile.
        self.lock = threading.RLock()
        self.placed: set[_Placed] = set()

    def keep_own(self) -> None:
        """In a forked process: take out what threads have placed that are not there."""
        self.lock, thread = threading.RLock(), get_ident()
        for placed in [placed for placed in self.placed if placed.thread != thread]:
            placed.take_out()


_PLACING = _Placing()
in_forked_process(_PLACING.keep_own)


def take_out_what_was_left() -> None:
    """Where no step of the calling thread runs: take out what one left that was interrupted."""
    if _PLACING.placed and is_first():
        thread = get_ident()
        for placed in [placed for placed in list(_PLACING.placed) if placed.thread == thread]:
            placed.take_out()


@final
class Slots:
    """The places in some modules where parameters and buffers are kept."""

    def __init__(self, modules: Iterable[nn.Module], *, flat: bool = False) -> None:
        """Find the places, each once.

        Args:
            modules: Modules; their submodules count, too.
            flat: Whether the submodules are among the modules, so that no tree is walked.
        """
        found = modules if flat else (part for root in modules for part in root.modules())
        seen = {id(module): module for module in found}
        # `_parameters` and `_buffers` are what `torch.func.functional_call` swaps, too: there
        # is no public way to put a tensor that is not a new parameter into a module.
        self._parameters = [(m, name) for m in seen.values() for name in m._parameters]
        self._buffers = [(m, name) for m in seen.values() for name in m._buffers]
        self._with_parameters = [(m, tuple(m._parameters)) for m in seen.values() if m._parameters]
        self._with_buffers = [(m, tuple(m._buffers)) for m in seen.values() if m._buffers]
        self.modules = tuple(seen.values())
        """All modules, each once."""

    def parameters(self) -> list[Tensor]:
        """The distinct parameters that are in the places now."""
        found = [module._parameters.get(name) for module, name in self._parameters]
        return list({id(p): p for p in found if p is not None}.values())

    def buffers(self) -> list[Tensor]:
        """The distinct buffers that are in the places now."""
        found = (module._buffers[name] for module, name in self._buffers)
        return list({id(b): b for b in found if b is not None}.values())

    def buffers_in_place(self) -> list[Tensor | None]:
        """What is in each place for a buffer now, in the order of the places."""
        return [module._buffers[name] for module, name in self._buffers]

    def buffer_places(self) -> list[Slot]:
        """The places for buffers themselves, in their order."""
        return list(self._buffers)

    def parameter_place(self, k: int) -> Slot:
        """The place for a parameter of a number, in the order of `in_place`."""
        return self._parameters[k]

    def in_place(self) -> list[Tensor | None]:
        """What is in each place for a parameter now, in the order of the places."""
        return [module._parameters[name] for module, name in self._parameters]

    def missing(self) -> str:
        """A place that its module no longer has, in words; empty where all are there."""
        for kind, places in (("parameter", self._parameters), ("buffer", self._buffers)):
            for module, name in places:
                if name not in (module._parameters if kind == "parameter" else module._buffers):
                    return f"{kind} {name!r} of a {type(module).__name__}"
        return ""

    def bind(self, aliases: Mapping[int, Tensor]) -> list[Tensor | None]:
        """The alias for each place, by the parameter that is there now.

        Bound to places and not to parameters: by the time of a backward others may be there,
        as after `torch.func.functional_call`.

        Args:
            aliases: The alias of each parameter, by the parameter's id.
        """
        return [None if p is None else aliases[id(p)] for p in self.in_place()]

    @contextmanager
    def parameters_replaced(self, bound: Sequence[Tensor | None]) -> Iterator[None]:
        """Put aliases in the places, and the parameters back at the end.

        Args:
            bound: What `bind` returned.
        """
        placed, tensors = _Placed("_parameters"), iter(bound)
        listing = [
            (module, names)
            for module, names in self._with_parameters
            if type(module).__setattr__ is not _PLAIN
        ]
        try:
            # Each zip stops at the end of its names, and takes no tensor more.
            placed.put(
                (module, zip(names, tensors, strict=False))
                for module, names in self._with_parameters
            )
            for module, names in listing:
                _list_anew(module, names)
            yield
        finally:
            placed.take_out()
            for module, names in listing:
                _list_anew(module, names)

    @contextmanager
    def buffers_replaced(
        self, clones: Mapping[int, Tensor], held: Sequence[Tensor | None] | None = None
    ) -> Iterator[None]:
        """Put clones in the places, and the buffers back at the end.

        Args:
            clones: The clone of each buffer, by the buffer's id; others stay.
            held: The buffer of each place; those that are there now if None.
        """
        placed, buffers = _Placed("_buffers"), iter(held or self.buffers_in_place())
        # Each zip stops at the end of its names, and takes no tensor more.
        owned = [
            (module, [*zip(names, buffers, strict=False)]) for module, names in self._with_buffers
        ]
        try:
            placed.put(
                (module, [(name, clones[id(b)]) for name, b in own if id(b) in clones])
                for module, own in owned
                if any(b is None or id(b) in clones for _, b in own)  # None: one may be put there
            )
            yield
        finally:
            placed.take_out()


def _list_anew(module: nn.Module, names: Iterable[str]) -> None:
    """Assign parameters anew to a module that keeps a list of its own.

    nn.RNNBase does, and only its own __setattr__ updates it. That takes parameters only; what else
    is there, functional_call has put there.
    """
    for name in names:
        parameter = module._parameters.get(name)
        if isinstance(parameter, nn.Parameter):
            setattr(module, name, parameter)


def make_alias(parameter: Tensor) -> nn.Parameter:
    """A leaf that shares the parameter's storage, with a gradient of its own."""
    if type(parameter) is nn.Parameter:  # which nn.Parameter detaches itself
        alias = nn.Parameter(parameter, requires_grad=parameter.requires_grad)
    elif is_subclass(parameter):
        alias = cast(nn.Parameter, parameter.detach().as_subclass(type(parameter)))
        alias.requires_grad_(parameter.requires_grad)
    else:  # of other kinds nn.Parameter may keep what they are
        return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    attributes = vars(parameter)
    if attributes:  # stages may read what is noted on a parameter
        vars(alias).update(attributes)
    return alias
