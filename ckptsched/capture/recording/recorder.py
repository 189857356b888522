"""Records one forward pass of any module as a straight line of calls.

Four things look on while the model runs as it is written. A `TorchFunctionMode` notes what is
called of torch. `nn.Module.__call__` and `autograd.Function.apply` are replaced for the thread, so
that a module of torch.nn and a custom Function are one call each. And a `TorchDispatchMode` on
watch tells of every operator that runs outside a noted call, which makes a recording sound: nothing
has happened unseen. Where something happens that a call cannot hold (a value is read, an object
hides a tensor), the innermost module around it is marked, and the next recording calls that one
whole.

What a backward would need is not saved, and values are known by weak references, so that a
recording takes the memory of a forward pass without gradients.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from threading import get_ident
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ...tensors.pytree import State
from ...torch_state.replay_context import Autocast
from ...torch_state.torch_modes import transform_at_work
from ..stage_discovery import StagedModule
from ..unseen import Unseen
from ..wrappers import StandsFor, in_place, is_compiled
from .calls import (
    PLAIN,
    Around,
    Fixed,
    Guard,
    Kept,
    Numbered,
    Place,
    RecordedCall,
    Source,
    StagePath,
    is_plain_object,
    name_of,
    tensors_inside,
    tensors_of,
)
from .functions import (
    ASKED,
    EFFECTS,
    GOES_BACK,
    GRADIENT,
    GRAPHS,
    READS,
    SIZES,
    can_be_asked,
    closes_over_tensors,
    has_loud_hooks,
    makes_sizes_of_data,
    may_hide_tensors,
    sets_something,
)
from .recording import module_of, part_of
from .values import Numbers, Origins

# One recording at a time: what is replaced is replaced for all threads, and passes others by.
_LOCK = threading.RLock()

# Modules of torch.nn that others write their models with: they are opened. All others are calls.
_OPENED = (
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    *(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)


# Packages whose code is not where a model has gone another way.
_NOT_OF_MODELS = ("torch.", "ckptsched.")


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Operators such as that of torch.cond, which are given functions; none where torch has no class.
_HIGHER_ORDER: Any = getattr(torch._ops, "HigherOrderOperator", ())
_NOWHERE = Place("", "", "")


class GoesBackError(BaseException):
    """The model differentiates inside; no `Exception`, as models may catch those."""


@final
class Recorder:
    """What looks on during one forward pass."""

    def __init__(self, model: nn.Module, whole: Mapping[str, str]) -> None:
        """Look at what the model owns.

        Args:
            model: The model.
            whole: Modules that are called whole, by path, and why.
        """
        self.model = model
        self.calls: list[RecordedCall] = []
        self.guards: list[Guard] = []
        self.marked: dict[str, str] = {}
        """Modules that the next recording must call whole, and why."""
        self.given: tuple[int, ...] = ()
        """Numbers of the tensors of the arguments."""
        self.returned: tuple[Source, ...] = ()
        """Where the tensors of the result come from."""
        self.left: dict[Place, Any] = {}
        """The values that attributes hold after the pass, and did not before."""
        self.changed: dict[str, str] = {}
        """Other attributes that were changed, each with the path of the module that it is of."""
        self.kept: dict[Place, Kept] = {}
        """Attributes that hold values of the pass when it is over."""
        self.leaves_elsewhere = False
        """Whether a value is held elsewhere than in attributes and the result."""
        self.refusal = ""
        """What no call can hold, wherever it is done; empty for nothing."""
        self.scopes: list[str] = [""]
        """Paths of the modules whose forward runs, the outermost first."""
        self._whole = dict(whole)
        self._hidden: dict[int, str] = {}  # tensors in arguments, by identity: in what
        self._numbers, self._origins = Numbers(), Origins()
        self._made_in: dict[int, str] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._places = _places(model)
        self._had = {id(own): dict(own) for own in _attributes(model)}
        self._known = {p for p in self._places.values() if not p.kind}
        self._own = {key: id(tensor) for key, tensor in _own_tensors(model, "")}
        self._thread, self._depth = get_ident(), 0
        self._device = torch.device("cpu")
        self._autocast = Autocast.take(self._device)
        self._unseen: Unseen
        # Of the call that runs: whether an operator ran, drew, or made sizes of data.
        self._ran = self._drew = self._sized = False
        # What modules that are not opened have saved: graphs hold the boxes, and no tensors.
        self._boxes: list[list[Tensor]] = []
        # Storages that came into being meanwhile, by identity, each with its scope then.
        self._born: dict[int, str] = {}

    # -- the run

    def run(self, inputs: State, device: torch.device) -> State:
        """Run the model and note its calls.

        Args:
            inputs: What it is called with, as `(args, kwargs)`.
            device: Where it lies.

        Returns:
            What it gives, without its tensors.

        Raises:
            GoesBackError: It has gone back through a graph, and the module around is marked.
        """
        self._device, self._autocast = device, Autocast.take(device)
        self.given = tuple([self._numbers.add(leaf) for leaf in inputs.leaves])
        self._hidden = {
            id(tensor): type(argument).__name__
            for argument in inputs.constants()
            for _, tensor in tensors_inside(argument)
        }
        args, kwargs = inputs.value()
        with self._looking_on():
            if self._is_whole(self.model, ""):
                output = self._note("", self.model.forward, args, kwargs)
            else:
                output = self.model.forward(*args, **kwargs)
            self._look_at_random()
            with self._aside():
                self._look_between_calls()
        result = State.of(output, opaque=True)
        self.returned = tuple([self._source(leaf) for leaf in result.leaves])
        result = State((), result.tree)
        del output
        for box in self._boxes:
            box.clear()
        self._look_at_what_is_held()
        return result

    @contextmanager
    def _looking_on(self) -> Iterator[None]:
        call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]
        remove = RemovableHandle.remove

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._depth or get_ident() != self._thread:
                return call(module, *args, **kwargs)
            return self._module(module, call, args, kwargs)

        def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if self._depth or get_ident() != self._thread:
                return apply.__get__(None, cls)(*args, **kwargs)
            return self._function(cls, apply.__get__(None, cls), args, kwargs)

        def removed(handle: RemovableHandle) -> None:
            if not self._depth and get_ident() == self._thread:
                self.mark("it takes a hook off, which a stage would leave there")
            remove(handle)

        with ExitStack() as stack:
            stack.enter_context(_LOCK)
            stack.enter_context(saved_tensors_hooks(_forget, self._recall))
            stack.enter_context(_Watch(self))
            stack.enter_context(_Notes(self))
            with self._aside():
                self._unseen = Unseen(self._device)
            setattr(nn.Module, "__call__", called)  # noqa: B010 - as a method it has another type
            torch.autograd.Function.apply = classmethod(applied)
            setattr(RemovableHandle, "remove", removed)  # noqa: B010
            try:
                yield
            finally:
                setattr(nn.Module, "__call__", call)  # noqa: B010
                torch.autograd.Function.apply = apply
                setattr(RemovableHandle, "remove", remove)  # noqa: B010

    # -- what is called

    def _module(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """A module is called: as one call, or opened."""
        path = self._paths.get(id(module))
        if path is None:  # made on the way, so that it is part of what made it
            return call(module, *args, **kwargs)
        if self._is_whole(module, path):
            self._look_at_random()
            result = self._note(path, partial(call, module), args, kwargs)
            with self._aside():
                self._unseen.pass_over()
            return result
        self.scopes.append(path)
        try:
            if isinstance(module, StagedModule) and args:
                return self._stages(module, path, args, kwargs)
            return call(module, *args, **kwargs)
        finally:
            self._look_at_random()
            self.scopes.pop()

    def _stages(
        self, module: StagedModule, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A module that lists its stages, such as an ODE block of many steps: each is a call."""
        state, *further = args
        for k, stage in enumerate(module.stages()):
            self._look_at_random()
            name = StagePath.of(path, k, stage.label)
            state = self._note(name, stage, (state, *further), kwargs)
            with self._aside():
                self._unseen.pass_over()
        return state

    def _is_whole(self, module: nn.Module, path: str) -> bool:
        if path in self._whole or isinstance(module, (torch.jit.ScriptModule, StandsFor)):
            return True
        if module is not self.model and in_place(module) is not None:
            return True  # it follows plans of its own
        if module is not self.model and (has_loud_hooks(module) or is_compiled(module)):
            return True
        of_torch = type(module).__module__.startswith("torch.nn.modules")
        return hasattr(module, "parametrizations") or (of_torch and not isinstance(module, _OPENED))

    def _function(self, cls: Any, apply: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A custom autograd Function is applied."""
        if any(map(may_hide_tensors, State.of((args, kwargs), opaque=True).constants())):
            self.mark(f"{cls.__name__}.apply is given a function or a module")
        return self._note(cls, apply, args, kwargs)

    def torch_function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Something of torch is called.

        Args:
            func: A function of torch, a method of tensors, or the access to a property.
            args: What it is given.
            kwargs: The same by name.
        """
        if func in EFFECTS and args and self._places.get(id(args[0]), _NOWHERE).kind:
            place = self._places[id(args[0])]
            self.refusal = f"it puts a hook on {place}, and one more in each forward{_line()}"
            return None
        if self._depth or get_ident() != self._thread:
            return func(*args, **kwargs)
        if isinstance(func, _HIGHER_ORDER):
            self.mark(f"{func} runs functions that a recording does not see")
        if func in GOES_BACK:
            self.mark(f"{name_of(func)} goes back through a graph inside the model")
            raise GoesBackError
        return self._note(func, func, args, kwargs)

    def _note(
        self, target: Any, callee: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        self._depth += 1  # what is done here is no call of the model's
        try:
            given = State.of((args, dict(kwargs)), opaque=True)
            reads = tuple([self._source(leaf) for leaf in given.leaves])
            before = [_version(leaf) for leaf in given.leaves]
            around = self._around()
            self._look_at_parameters(target)
            self._ran = self._drew = self._sized = False
            # What is not opened may go back through a graph of its own.
            keeps = isinstance(target, str) and target in self._whole
            with saved_tensors_hooks(self._keep, self._take) if keeps else nullcontext():
                result = callee(*args, **kwargs)
            changed = tuple(
                [
                    source.number
                    for source, leaf, version in zip(reads, given.leaves, before, strict=True)
                    if isinstance(source, Numbered) and _version(leaf) != version
                ]
            )
            if isinstance(target, str) or not self._only_asks(target, given, reads, result):
                self._add(target, given, reads, around, result, changed)
            if keeps:  # and put others in place of its parameters and buffers
                found = _own_tensors(part_of(self.model, target), target)
                self._own.update((key, id(tensor)) for key, tensor in found)
        finally:
            self._unseen.pass_over_torch()
            self._depth -= 1
        return result

    def _only_asks(
        self, function: Any, given: State, reads: tuple[Source, ...], result: Any
    ) -> bool:
        """Whether a function has only told something of a tensor, on which the model may act."""
        if function in GRAPHS:
            self.mark("it reads the graph that autograd builds")
        if tensors_of(result):
            if function is GRADIENT:
                self.mark("it reads the gradient of a tensor in its forward")
            return False
        if function in READS or (result is not None and self._ran):
            self._add_guard(function, given, reads, result)
            return True
        if self._ran or function in EFFECTS or sets_something(function):
            return False
        if function in SIZES and self._origins.is_sized_by_data(reads):
            if self._origins.is_of_data(reads):
                self._add_guard(function, given, reads, result)
            else:
                self.mark("it asks for sizes that hang on data")
        return True

    def _add_guard(
        self, function: Any, given: State, reads: tuple[Source, ...], result: Any
    ) -> None:
        trained = any(leaf.requires_grad for leaf in given.leaves)
        can_ask = (
            function in ASKED | SIZES and can_be_asked(result) and self._origins.is_of_data(reads)
        )
        if trained or not can_ask:
            self.mark(f"{name_of(function)} reads values that the model computes with")
            return
        read = RecordedCall(function, State((), given.tree), reads, (), self.scopes[-1])
        self.guards.append(Guard(read, result, len(self.calls)))

    def _add(
        self,
        target: Any,
        given: State,
        reads: tuple[Source, ...],
        around: Around,
        result: Any,
        changed: tuple[int, ...],
    ) -> None:
        """Add a call."""
        is_module, made = isinstance(target, str), tensors_of(result)
        if not is_module:
            holds = any(map(closes_over_tensors, given.constants()))
            if holds or sets_something(target):
                self.mark(f"{name_of(target)} keeps a tensor where a recording cannot see it")
        # What lies in a place of the model's, as a buffer that is changed, is found there.
        makes = tuple([-1 if id(t) in self._places else self._numbers.add(t) for t in made])
        for number in makes:
            self._made_in.setdefault(number, self.scopes[-1])
        trained = any(isinstance(s, Place) and s.kind == "_parameters" for s in reads)
        computed = isinstance(target, type) or trained or (is_module and self._computes(target))
        self._origins.note(reads, (*makes, *changed), drew=self._drew, computed=computed)
        numbered = [(n, t) for n, t in zip(makes, made, strict=True) if n >= 0]
        self._origins.note_sizes(reads, given.leaves, numbered, by_data=self._sized)
        why = self._whole.get(target, "") if is_module else ""
        tree, scope = State((), given.tree), self.scopes[-1]
        self.calls.append(RecordedCall(target, tree, reads, makes, scope, around, changed, why))

    def _computes(self, path: str) -> bool:
        """Whether a guard may not run a module: it has parameters or a state, or is not opened."""
        module = module_of(self.model, path)
        own = _own_tensors(module, path) if path else iter([None])
        return path in self._whole or next(own, None) is not None or not path

    # -- what is known

    def _source(self, tensor: Tensor) -> Source:
        place = self._places.get(id(tensor))
        if place is not None:
            return place
        number = self._numbers.of(tensor)
        if number is not None:
            return Numbered(number)
        born = self._born.get(_home(tensor))
        if id(tensor) in self._hidden:
            self.refusal = (
                f"it is given a {self._hidden[id(tensor)]}, in which tensors are not seen; call it "
                "with tensors, or with tuples, lists, dicts and dataclasses of them"
            )
        elif transform_at_work([tensor]):
            self.mark("a transform of torch.func is at work")
        elif born is not None:
            both = _common(born, self.scopes[-1])
            self.mark("an object hides a tensor that the model has made", both)
        elif tensor.requires_grad:
            self.mark("a trained tensor is used that is no parameter of the model")
        return Fixed(tensor)

    def _around(self) -> Around:
        no_grad = not torch.is_grad_enabled()
        autocast = Autocast.take(self._device)
        self._look_between_calls()
        if not no_grad and autocast == self._autocast:
            return PLAIN
        return Around(no_grad, autocast.modes if autocast != self._autocast else None)

    def mark(self, why: str, path: str | None = None) -> None:
        """Have the innermost module called whole the next time.

        Args:
            why: The reason, for people.
            path: Of another module than the innermost.
        """
        where = self.scopes[-1] if path is None else path
        if where not in self.marked:
            self.marked[where] = f"{why}{_line()}"

    def operator(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """An operator has run.

        Args:
            func: The operator.
            args: What it was given by position.
            result: What it gave.
        """
        if not self._depth:
            self.mark(f"{func} runs where torch does not say who called it")
        if isinstance(func, _HIGHER_ORDER):
            self.mark(f"{func} runs functions that a recording does not see")
        tags = getattr(func, "tags", ())
        self._ran = True
        self._drew = self._drew or torch.Tag.nondeterministic_seeded in tags
        if torch.Tag.dynamic_output_shape in tags:
            self._sized = self._sized or makes_sizes_of_data(func, args)
        self._depth += 1
        try:
            for tensor in tensors_of(result):
                self._born.setdefault(_home(tensor), self.scopes[-1])
        finally:
            self._depth -= 1

    def _keep(self, tensor: Tensor) -> list[Tensor]:
        box = [tensor]
        self._boxes.append(box)
        return box

    def _take(self, box: list[Tensor]) -> Tensor:
        if not box:
            raise GoesBackError
        return box[0]

    def _recall(self, nothing: None) -> Tensor:
        """Somebody goes back through a graph whose tensors were not saved."""
        self.mark("it goes back through a graph inside the model")
        raise GoesBackError

    def _look_at_random(self) -> None:
        """Python's and numpy's generators are not torch's: what draws from them is called whole."""
        if self._unseen.has_drawn():
            self.mark("it draws from the random generator of Python or of numpy")

    def _look_between_calls(self) -> None:
        unseen = self._unseen.between_calls()
        if unseen:
            self.mark(unseen)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is done here is no call of the model's."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def _look_at_parameters(self, target: Any) -> None:
        """A module that is called with others than its own is part of what put those there."""
        if not isinstance(target, str) or not target:
            return
        path = target.path if isinstance(target, StagePath) else target
        for key, tensor in _own_tensors(part_of(self.model, path), path):
            if self._own.get(key) != id(tensor):
                self.mark(f"{'.'.join(key)} is another tensor when {target!r} is called")

    def _look_at_what_is_held(self) -> None:
        """Values that are held when the pass is over, by attributes or otherwise."""
        for path, module in self.model.named_modules():
            for name, value in [*module._buffers.items()]:
                self._keep_value(module._buffers, Place(path, "_buffers", name), value)
                del value
            for name, value in [*vars(module).items()]:
                if name not in _OF_EVERY_MODULE:
                    self._keep_value(vars(module), Place(path, "", name), value)
                    if is_plain_object(value):
                        for inner, part in [*vars(value).items()]:
                            place = Place(path, "", name, (("attr", inner),))
                            self._keep_value(vars(value), place, part)
                            del part
                del value
        for number in self._numbers.held(self.given):
            self.leaves_elsewhere = True
            self.mark("it leaves a tensor elsewhere than in its result", self._made_in[number])

    def _keep_value(self, own: dict[str, Any], place: Place, value: Any) -> None:
        """Note what an attribute holds, if it was put there in the pass and is made of values."""
        if not isinstance(value, Tensor | list | tuple | dict):
            return
        name = place.steps[-1][1] if place.steps else place.name
        state = State.of(value, opaque=True)
        known = [self._numbers.of(leaf) is not None for leaf in state.leaves]
        if not any(known):
            return
        if not isinstance(value, Tensor):
            had = self._had.get(id(own))
            if had is None or had.get(name) is value:
                return  # the same container, to which more was added
        self.kept[place] = State((), state.tree), tuple(map(self._source, state.leaves))
        if not place.kind and place not in self._known:
            self.left[place] = state.detached().value()
        # Whoever runs the pass puts attributes back; until then nothing is held.
        own[name] = state.replaced(torch.empty(0) for _ in state.leaves).value()


@final
class _Notes(TorchFunctionMode):
    """Tells the recorder what is called of torch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.torch_function(func, args, kwargs or {})


@final
class _Watch(TorchDispatchMode):
    """Tells the recorder which operators run."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._recorder.operator(func, args, result)
        return result


def _places(model: nn.Module) -> dict[int, Place]:
    """Where the model keeps its tensors, by identity; of several places the first."""
    found: dict[int, Place] = {}
    for kind in ("_parameters", "_buffers", ""):
        for path, module in model.named_modules():
            held = getattr(module, kind) if kind else vars(module)
            for name, tensor in held.items():
                if isinstance(tensor, Tensor):
                    found.setdefault(id(tensor), Place(path, kind, name))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE:
                for steps, tensor in tensors_inside(value):
                    found.setdefault(id(tensor), Place(path, "", name, steps))
    return found


def _attributes(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The attributes of modules, and of plain objects that are attributes of them."""
    for module in model.modules():
        yield vars(module)
        yield from (vars(value) for value in vars(module).values() if is_plain_object(value))


def _own_tensors(module: nn.Module, path: str) -> Iterator[tuple[tuple[str, str], Tensor | None]]:
    """The parameters and buffers below a module, each with the path of its owner and its name."""
    for owner, part in module.named_modules(prefix=path):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(part, kind).items():
                yield (owner, name), tensor


def _home(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # of a kind without storage
        return 0


def _common(one: str, other: str) -> str:
    """The path of the innermost module that contains two."""
    parts: list[str] = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _line() -> str:
    """Where in its own code the model is, in words; empty once its forward is over."""
    frame, found = sys._getframe(2), ""
    while frame is not None and frame.f_code is not Recorder.run.__code__:
        if not found and not frame.f_globals.get("__name__", "").startswith(_NOT_OF_MODELS):
            found = f" ({frame.f_code.co_filename}, line {frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return found if frame is not None else ""


def _forget(tensor: Tensor) -> None:
    """Saves nothing."""
