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

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any, final

import torch
from torch import Tensor, nn

from ....tensors.pytree import State
from ....torch_state.replay_context import Autocast
from ...stage_discovery import StagedModule
from ...unseen import Unseen
from ..calls import (
    PLAIN,
    Around,
    Guard,
    Kept,
    Numbered,
    Place,
    RecordedCall,
    Source,
    StagePath,
    name_of,
    tensors_of,
)
from ..complaints import Complaint, is_checkpoint, is_complaint
from ..functions import (
    ASKED,
    EFFECTS,
    GOES_BACK,
    GRADIENT,
    GRAPHS,
    READS,
    SIZES,
    can_be_asked,
    closes_over_tensors,
    makes_sizes_of_data,
    may_hide_tensors,
    sets_something,
)
from ..preparation import forget_cached
from ..recording import module_of, part_of
from .containers import Containers
from .interception import Onlooker, told_of_calls
from .kept import KeptValues
from .leaves import is_one_call
from .marks import Marks, function_named, is_function
from .owned import own_tensors
from .saved import GoesBackError, SavedTensors
from .sources import Sources
from .values import Origins

# Operators such as that of torch.cond, which are given functions; none where torch has no class.
_HIGHER_ORDER: Any = getattr(torch._ops, "HigherOrderOperator", ())


@final
class Recorder(Onlooker):
    """What looks on during one forward pass."""

    def __init__(self, model: nn.Module, whole: Mapping[str, str]) -> None:
        """Look at what the model owns.

        Args:
            model: The model.
            whole: Modules that are called whole, by path, and functions by name, and why.
        """
        super().__init__()
        self.model = model
        self.calls: list[RecordedCall] = []
        self.guards: list[Guard] = []
        self.marks = Marks(Recorder.run.__code__, Recorder.module.__code__, self._has_parts)
        """Modules and functions that the next recording must call whole."""
        self.given: tuple[int, ...] = ()
        """Numbers of the tensors of the arguments."""
        self.returned: tuple[Source, ...] = ()
        """Where the tensors of the result come from."""
        self.changed: dict[str, str] = {}
        """Other attributes that were changed, each with the path of the module that it is of."""
        self.unset: tuple[Place, ...] = ()
        """Attributes that steer the pass by holding nothing when it begins."""
        self.leaves_elsewhere = False
        """Whether a value is held elsewhere than in attributes and the result."""
        self._refusal = ""
        self._whole = dict(whole)
        named = {name: function_named(name) for name in whole if is_function(name)}
        self._functions = {f: name for name, f in named.items() if f is not None}
        self._sources, self._origins = Sources(model, self.marks), Origins()
        self._made_in: dict[int, str] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._containers = Containers(model)
        known = {place for place in self._sources.places.values() if not place.kind}
        self._held = KeptValues(model, known)
        self._own = {key: id(tensor) for key, tensor in own_tensors(model, "")}
        self._device = torch.device("cpu")
        self._autocast = Autocast.take(self._device)
        self._unseen: Unseen
        # Of the call that runs: whether an operator ran, drew, or made sizes of data.
        self._ran = self._drew = self._sized = False
        self._saved = SavedTensors(self.marks)

    @property
    def refusal(self) -> str:
        """What no call can hold, wherever it is done; empty for nothing."""
        return self._sources.refusal or self._refusal

    @property
    def kept(self) -> Mapping[Place, Kept]:
        """Attributes that hold values of the pass when it is over."""
        return self._held.kept

    @property
    def left(self) -> Mapping[Place, Any]:
        """The values that attributes hold after the pass, and did not before."""
        return self._held.left

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
        self.given = self._sources.begin(inputs)
        args, kwargs = inputs.value()
        with self._looking_on():
            if self._is_whole(self.model, ""):
                output = self._note("", self.model.forward, args, kwargs)
            else:
                output = self.model.forward(*args, **kwargs)
            self._look_at_random()
            with self.aside():
                self._look_between_calls()
        result = State.of(output, opaque=True)
        self.returned = tuple([self._sources.of(leaf) for leaf in result.leaves])
        result = State((), result.tree)
        del output
        self._saved.clear()
        self._look_at_what_is_held()
        return result

    @contextmanager
    def _looking_on(self) -> Iterator[None]:
        with self._saved.forgotten(), told_of_calls(self, self._functions):
            with self.aside():
                self._unseen = Unseen(self._device, self.model.modules())
            yield

    # -- what is called

    def module(  # noqa: D102 - inherited
        self,
        module: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        path = self._paths.get(id(module))
        if path is None:  # made on the way, so that it is part of what made it
            return call(module, *args, **kwargs)
        self._look_at_random()  # what was drawn until now, the module around has drawn
        if self._is_whole(module, path):
            result = self._note(path, partial(call, module), args, kwargs)
            with self.aside():
                self._unseen.pass_over()
            return result
        self.marks.scopes.append(path)
        try:
            if isinstance(module, StagedModule) and args:
                return self._stages(module, path, args, kwargs)
            return call(module, *args, **kwargs)
        finally:
            self._look_at_random()
            self.marks.scopes.pop()

    def _stages(
        self, module: StagedModule, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """A module that lists its stages, such as an ODE block of many steps: each is a call."""
        state, *further = args
        for k, stage in enumerate(module.stages()):
            self._look_at_random()
            name = StagePath.of(path, k, stage.label)
            state = self._note(name, stage, (state, *further), kwargs)
            with self.aside():
                self._unseen.pass_over()
        return state

    def _is_whole(self, module: nn.Module, path: str) -> bool:
        return path in self._whole or is_one_call(module, is_model=module is self.model)

    def _has_parts(self, path: str) -> bool:
        """Whether a module is the model, or has parts with parameters."""
        parts = module_of(self.model, path).children()
        return not path or any(True for part in parts for _ in part.parameters())

    def whole_function(  # noqa: D102 - inherited
        self,
        function: FunctionType,
        original: FunctionType,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._look_at_random()
        result = self._note(function, original, args, kwargs)
        if any(value is not None for value in State.of(result, opaque=True).constants()):
            why = f"{function.__name__} gives something besides tensors, which may hang on data"
            self.marks.mark(why, self.marks.scopes[-1])
        with self.aside():
            self._unseen.pass_over()
        return result

    def function(  # noqa: D102 - inherited
        self, cls: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if any(map(may_hide_tensors, State.of((args, kwargs), opaque=True).constants())):
            self.marks.mark(f"{cls.__name__}.apply is given a function or a module")
        return self._note(cls, apply, args, kwargs)

    def torch_function(  # noqa: D102 - inherited
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        place = self._sources.place(args[0]) if func in EFFECTS and args else None
        if place is not None and place.kind:
            why = f"it puts a hook on {place}, and one more in each forward"
            self._refusal = f"{why}{self.marks.line()}"
            return None
        if not self.is_concerned:
            return func(*args, **kwargs)
        if isinstance(func, _HIGHER_ORDER):
            self.marks.mark(f"{func} runs functions that a recording does not see")
        if func in GOES_BACK:
            self.marks.mark(f"{name_of(func)} goes back through a graph inside the model")
            raise GoesBackError
        return self._note(func, func, args, kwargs)

    def _note(
        self, target: Any, callee: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        self._depth += 1  # what is done here is no call of the model's
        try:
            given = State.of((args, dict(kwargs)), opaque=True)
            reads = tuple([self._sources.of(leaf) for leaf in given.leaves])
            before = [_version(leaf) for leaf in given.leaves]
            around = self._around()
            self._look_at_parameters(target)
            self._ran = self._drew = self._sized = False
            is_helper = isinstance(target, FunctionType) and target in self._functions
            # Of others than torch's, or with hooks.
            is_code = isinstance(target, str | type) or is_helper
            if is_code:
                self._containers.look_between_calls()
            # What is not opened may go back through a graph of its own.
            keeps = isinstance(target, str) and target in self._whole
            with self._saved.kept() if keeps or is_helper else nullcontext():
                result = callee(*args, **kwargs)
            if is_code:
                self._containers.look_after_call(self.marks.scopes[-1])
            changed = tuple(
                [
                    source.number
                    for source, leaf, version in zip(reads, given.leaves, before, strict=True)
                    if isinstance(source, Numbered) and _version(leaf) != version
                ]
            )
            asks = not (isinstance(target, str) or is_helper)
            if not asks or not self._only_asks(target, given, reads, result):
                self._add(target, given, reads, around, result, changed)
            if keeps:  # and put others in place of its parameters and buffers
                found = own_tensors(part_of(self.model, target), target)
                self._own.update((key, id(tensor)) for key, tensor in found)
        finally:
            self._unseen.pass_over_torch()
            self._depth -= 1
        return result

    def _only_asks(
        self, function: Any, given: State, reads: tuple[Source, ...], result: Any
    ) -> bool:
        """Whether a function has only told something of a tensor, on which the model may act."""
        if function in GRAPHS and not is_checkpoint():
            self.marks.mark("it reads the graph that autograd builds")
        if tensors_of(result):
            if function is GRADIENT:
                self.marks.mark("it reads the gradient of a tensor in its forward")
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
                self.marks.mark("it asks for sizes that hang on data")
        return True

    def _add_guard(
        self, function: Any, given: State, reads: tuple[Source, ...], result: Any
    ) -> None:
        trained = any(leaf.requires_grad for leaf in given.leaves)
        can_ask = (
            function in ASKED | SIZES and can_be_asked(result) and self._origins.is_of_data(reads)
        )
        if trained or not can_ask:
            if can_be_asked(result) and is_complaint():
                self._add(Complaint(function, result), given, reads, self._around(), None, ())
            else:
                self.marks.mark(f"{name_of(function)} reads values that the model computes with")
            return
        read = RecordedCall(function, State((), given.tree), reads, (), self.marks.scopes[-1])
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
        if not is_module and target not in self._functions:
            holds = any(map(closes_over_tensors, given.constants()))
            if holds or sets_something(target):
                self.marks.mark(f"{name_of(target)} keeps a tensor where a recording cannot see it")
        # What lies in a place of the model's, as a buffer that is changed, is found there.
        places, numbers = self._sources.places, self._sources.numbers
        makes = tuple([-1 if id(t) in places else numbers.add(t) for t in made])
        for number in makes:
            self._made_in.setdefault(number, self.marks.scopes[-1])
        trained = any(isinstance(s, Place) and s.kind == "_parameters" for s in reads)
        name = self._functions.get(target, "") if isinstance(target, FunctionType) else ""
        computed = isinstance(target, type) or trained or bool(name)
        computed = computed or (is_module and self._computes(target))
        self._origins.note(reads, (*makes, *changed), drew=self._drew, computed=computed)
        numbered = [(n, t) for n, t in zip(makes, made, strict=True) if n >= 0]
        self._origins.note_sizes(reads, given.leaves, numbered, by_data=self._sized)
        why = self._whole.get(target if is_module else name, "")
        tree, scope = State((), given.tree), self.marks.scopes[-1]
        self.calls.append(RecordedCall(target, tree, reads, makes, scope, around, changed, why))

    def _computes(self, path: str) -> bool:
        """Whether a guard may not run a module: it has parameters or a state, or is not opened."""
        module = module_of(self.model, path)
        own = own_tensors(module, path) if path else iter([None])
        return path in self._whole or next(own, None) is not None or not path

    # -- what is known

    def _around(self) -> Around:
        no_grad = not torch.is_grad_enabled()
        autocast = Autocast.take(self._device)
        self._look_between_calls()
        if not no_grad and autocast == self._autocast:
            return PLAIN
        return Around(no_grad, autocast.modes if autocast != self._autocast else None)

    def hook_removed(self) -> None:  # noqa: D102 - inherited
        self.marks.mark("it takes a hook off, which a stage would leave there")

    def operator(  # noqa: D102 - inherited
        self, func: Any, args: tuple[Any, ...], result: Any
    ) -> None:
        if not self.is_inside:
            self.marks.mark(f"{func} runs where torch does not say who called it")
        if isinstance(func, _HIGHER_ORDER):
            self.marks.mark(f"{func} runs functions that a recording does not see")
        tags = getattr(func, "tags", ())
        self._ran = True
        self._drew = self._drew or torch.Tag.nondeterministic_seeded in tags
        if torch.Tag.dynamic_output_shape in tags:
            self._sized = self._sized or makes_sizes_of_data(func, args)
        with self.aside():
            self._sources.note_born(tensors_of(result))

    def _look_at_random(self) -> None:
        """Python's and numpy's generators are not torch's: what draws from them is called whole."""
        if self._unseen.has_drawn():
            self.marks.mark("it draws from the random generator of Python or of numpy")

    def _look_between_calls(self) -> None:
        unseen = self._unseen.between_calls()
        if unseen:
            self.marks.mark(unseen)

    def _look_at_parameters(self, target: Any) -> None:
        """A module that is called with others than its own is part of what put those there."""
        if not isinstance(target, str) or not target:
            return
        path = target.path if isinstance(target, StagePath) else target
        for key, tensor in own_tensors(part_of(self.model, path), path):
            if self._own.get(key) != id(tensor):
                self.marks.mark(f"{'.'.join(key)} is another tensor when {target!r} is called")

    def _look_at_what_is_held(self) -> None:
        """Values that are held when the pass is over, by attributes or otherwise."""
        forget_cached(self.model)
        self._containers.look_between_calls()
        for path, name, scope in self._containers.changed_by_both():
            why = f"calls change its {name!r}, as hooks do that append to a list, and lines between"
            self.marks.mark_around(f"{why} them do, too", path, scope)
        self._held.look(self._sources.numbers, self._sources.of)
        for number in self._sources.numbers.held(self.given):
            self.leaves_elsewhere = True
            self.marks.mark(
                "it leaves a tensor elsewhere than in its result", self._made_in[number]
            )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
