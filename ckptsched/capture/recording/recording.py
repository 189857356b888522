"""A forward pass as a straight line of calls, which can be made again one by one."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from ...base.errors import ExecutionError, PlanMismatchError
from ...tensors.pytree import Filling, State
from ..stage_discovery import StageCall, StagedModule
from .attributes import attributes_of, is_outside
from .calls import Guard, Kept, Numbered, Place, RecordedCall, Source, StagePath
from .preparation import caching, switched_off


@final
@dataclass(frozen=True, eq=False)
class Recording:
    """The calls of one forward pass, in order: a program without branches."""

    calls: tuple[RecordedCall, ...]
    given: tuple[int, ...]
    """Numbers of the tensors of the arguments, in order, and then of what is carried."""
    inputs: State
    """The arguments, as `(args, kwargs)`, without their tensors."""
    layouts: tuple[Layout, ...]
    """Shape, dtype, device and whether it asks for a gradient, of each tensor of the arguments."""
    returned: tuple[Source, ...]
    """Where the tensors of the result come from, in order."""
    output: State
    """The result, without its tensors."""
    guards: tuple[Guard, ...]
    """What steered the pass besides the layouts of its arguments and the model's attributes."""
    attributes: Mapping[str, object]
    """What the model keeps besides tensors, by path and name: others may steer otherwise."""
    kept: Mapping[Place, Kept] = field(default_factory=dict)
    """Attributes and buffers that hold values when the pass is over."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Modules that are called whole where they could have been opened, by path, functions of their
    code by name, and why."""
    carried: tuple[Place, ...] = ()
    """Where the model keeps tensors that it reads and puts others in the place of, as the state of
    a recurrent network: those that lie there when it is called are given to it as well."""
    carried_layouts: tuple[Layout, ...] = ()
    """The layouts of these."""
    unset: tuple[Place, ...] = ()
    """Attributes that hold tensors when the pass is over, and steer it by holding none before."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        """Itself: it names modules by path, so that it is that of a copy of the model, too."""
        return self

    @functools.cached_property
    def last_read(self) -> dict[int, int]:
        """For each value the index of the last call that reads it.

        For what the result or an attribute holds, the number of calls.
        """
        found: dict[int, int] = {}
        for k, call in enumerate(self.calls):
            found.update(dict.fromkeys((*call.values, *call.makes), k))
        sources = (*self.returned, *chain.from_iterable(s for _, s in self.kept.values()))
        ends = (source.number for source in sources if isinstance(source, Numbered))
        found.update(dict.fromkeys(ends, len(self.calls)))
        found.pop(-1, None)
        return found

    @functools.cached_property
    def fillings(self) -> tuple[Filling, ...]:
        """What puts tensors into the arguments of each call."""
        return tuple([Filling(call.given) for call in self.calls])

    def live(self, k: int) -> tuple[int, ...]:
        """Numbers of the values that are there before a call and are read by it or later.

        Args:
            k: The call, by index; their number for what is there after the last.
        """
        return self._live[k]

    @functools.cached_property
    def _live(self) -> tuple[tuple[int, ...], ...]:
        last, there = self.last_read, dict.fromkeys(self.given)
        found = []
        for k in range(len(self.calls) + 1):
            found.append(tuple(n for n in there if last.get(n, -1) >= k))
            there = dict.fromkeys(found[-1])
            if k < len(self.calls):
                there.update(dict.fromkeys(self.calls[k].makes))
        return tuple(found)

    def tensors(self, model: nn.Module, inputs: State) -> tuple[Tensor, ...]:
        """The tensors that a call begins with, in the order of `given`.

        Args:
            model: The model that was recorded, or a copy of it.
            inputs: What it is called with, as `(args, kwargs)`, taken apart.

        Raises:
            PlanMismatchError: What it carries from call to call is not as it was recorded.
        """
        for place in self.unset:
            if place.holds_tensors(part_of(model, place.path)):
                raise PlanMismatchError(
                    f"{place} of the model holds tensors, and did not when the model was recorded, "
                    "so that it may go another way; record it again"
                )
        if not self.carried:
            return inputs.leaves
        with suppress(LookupError, AttributeError, TypeError):  # there is something else
            found = [place.look_up(part_of(model, place.path)) for place in self.carried]
            if layouts_of(State(tuple(found))) == self.carried_layouts:
                return *inputs.leaves, *found
        names = ", ".join(map(str, self.carried))
        raise PlanMismatchError(
            f"{names} of the model, which its forward reads and replaces, is not what it was when "
            f"the model was recorded ({described(self.carried_layouts)}); record it again"
        )

    def replay(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Make all calls again.

        Args:
            model: The model that was recorded, or a copy of it.
            tensors: The tensors of the arguments, in order.

        Returns:
            What the model would give.
        """
        bound, given = Bound(self, model), self.tensors(model, State(tuple(tensors)))
        values = dict(zip(self.given, given, strict=True))
        for k in range(len(self.calls)):
            bound.run(k, values)
        return bound.result(values)

    def covers(self, inputs: State) -> bool:
        """Whether a call is like the recorded one, and none of its tensors larger in any way.

        Args:
            inputs: What the model is called with, as `(args, kwargs)`, taken apart.
        """
        found = layouts_of(inputs)
        if State((), inputs.tree).tree != self.inputs.tree or len(found) != len(self.layouts):
            return False
        return all(
            a[1:] == b[1:] and len(a[0]) == len(b[0]) and all(map(operator.le, a[0], b[0]))
            for a, b in zip(found, self.layouts, strict=True)
        )

    def check(self, model: nn.Module, inputs: State) -> None:
        """See that a call of the model would go the way that was recorded.

        Args:
            model: The model, or a copy of it.
            inputs: What it is called with, as `(args, kwargs)`, taken apart.

        Raises:
            PlanMismatchError: It is called with another structure or other layouts, an attribute
                has changed, or values that steer it are others.
        """
        if State((), inputs.tree).tree != self.inputs.tree or self.layouts != layouts_of(inputs):
            raise PlanMismatchError(
                f"the model was recorded for {described(self.layouts)}, and is called with "
                f"{described(layouts_of(inputs))}; record it for these"
            )
        now = attributes_of(model)
        kept = {str(place) for place in self.kept}
        for name in sorted((self.attributes.keys() | now.keys()) - kept):
            if self.attributes.get(name) != now.get(name):
                then, found = _said(self.attributes.get(name)), _said(now.get(name))
                what = name if is_outside(name) else f"{name} of the model"
                raise PlanMismatchError(
                    f"{what} is another than when the model was recorded ({then} "
                    f"then, {found} now), so that it may go another way; record it again"
                )
        tensors = self.tensors(model, inputs)
        bound, values = Bound(self, model), dict(zip(self.given, tensors, strict=True))
        with torch.no_grad():
            for guard in self.guards:
                found = bound.ask(guard, values)
                if found != guard.found:
                    raise PlanMismatchError(
                        f"{guard.read.name} in {guard.read.scope or 'the model'} gave "
                        f"{guard.found!r} when the model was recorded, and gives {found!r} on this "
                        "batch, so that it may go another way; record it for this batch"
                    )

    def __str__(self) -> str:
        """A line a call, and a line a guard."""
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """The text, line by line."""
        yield f"recording of {len(self.calls)} calls, {len(self.given)} tensors given"
        for k, call in enumerate(self.calls):
            yield f"{k:5}  {call}"
        for guard in self.guards:
            yield f"guard  {guard.read.name}({_listed(guard.read.reads)}) = {guard.found}"


@final
class Bound:
    """A recording bound to a model: modules and owners of tensors looked up once."""

    def __init__(
        self, recording: Recording, model: nn.Module, original: nn.Module | None = None
    ) -> None:
        """Look up what the calls name.

        Args:
            recording: Of the model, or of one that it is a copy of.
            model: The model, or what owns the same parameters, buffers and parts.
            original: The model itself, which alone has its plain attributes; None if that is given.
        """
        original = model if original is None else original
        self._recording = recording
        stages = functools.cache(lambda path: _stages_of(part_of(model, path)))
        self._callees = [_callee(call, model, stages) for call in recording.calls]
        whole = [
            k
            for k, call in enumerate(recording.calls)
            if call.why_whole and isinstance(call.target, str)
        ]
        self._caching = {k: caching(self._callees[k]) for k in whole}
        calls = (*recording.calls, *(guard.read for guard in recording.guards))
        places = {place for call in calls for place in call.places} | set(recording.kept)
        ends = chain(recording.returned, *(sources for _, sources in recording.kept.values()))
        places |= {source for source in ends if isinstance(source, Place)}
        self._owners = {
            place: part_of(model if place.kind else original, place.path) for place in places
        }

    def tensor(self, source: Source, values: Mapping[int, Tensor]) -> Tensor:
        """The tensor that a source names.

        Args:
            source: The source.
            values: The tensors that are there, by number.
        """
        if isinstance(source, Numbered):
            return values[source.number]
        if isinstance(source, Place):
            return source.look_up(self._owners[source])
        return source.tensor

    def owner(self, place: Place) -> nn.Module:
        """The module that keeps what lies in a place."""
        return self._owners[place]

    def callee(self, k: int) -> Any:
        """What a call calls, by its index."""
        return self._callees[k]

    def span(self, start: int, stop: int) -> Span:
        """Some of the calls.

        Args:
            start: The first, by index.
            stop: The one after the last.
        """
        recording = self._recording
        calls = recording.calls[start:stop]
        leaves = recording.live(stop)
        last: dict[int, int] = {}
        for k, call in enumerate(calls):
            last.update(dict.fromkeys((*call.values, *call.makes), k))
        spent: list[list[int]] = [[] for _ in calls]
        for number, k in last.items():
            if number not in leaves:
                spent[k].append(number)
        enters = recording.live(start) if start else recording.given
        return Span(
            self, range(start, stop), tuple(calls), tuple(map(tuple, spent)), enters, leaves
        )

    def run(self, k: int, values: dict[int, Tensor]) -> None:
        """Make one call, and put what it makes among the values.

        Args:
            k: The call, by index.
            values: The tensors that are there, by number.

        Raises:
            ExecutionError: It gives another number of tensors than when it was recorded.
        """
        call = self._recording.calls[k]
        tensors = [self.tensor(source, values) for source in call.reads]
        filling = self._recording.fillings[k]
        if k in self._caching:
            with switched_off(self._caching[k]):
                made = call.run(self._callees[k], filling, tensors)
        else:
            made = call.run(self._callees[k], filling, tensors)
        if len(made) != len(call.makes):
            raise ExecutionError(
                f"{call.name} gave {len(made)} tensors, and {len(call.makes)} when the model was "
                "recorded; record it again"
            )
        values.update(zip(call.makes, made, strict=True))

    def ask(self, guard: Guard, values: Mapping[int, Tensor]) -> Any:
        """What a guard finds now.

        Args:
            guard: The guard.
            values: The tensors of the arguments, by number.
        """
        needed, chosen = {*guard.read.values}, []
        for k in range(guard.after - 1, -1, -1):
            call = self._recording.calls[k]
            if needed.intersection(call.makes) or needed.intersection(call.writes):
                chosen.append(k)
                needed.update(call.values)
        # Calls may write to what they are given: that must not reach the caller's batch.
        there = {n: t.clone() for n, t in values.items() if n in needed}
        for k in reversed(chosen):
            self.run(k, there)
        args, kwargs = guard.read.given.replaced(
            self.tensor(source, there) for source in guard.read.reads
        ).value()
        return guard.read.target(*args, **kwargs)  # type: ignore[operator]

    def result(self, values: Mapping[int, Tensor], *, keep: bool = True) -> Any:
        """What the model gives; what it keeps in attributes is put there.

        Args:
            values: The tensors that are there after the last call, by number.
            keep: Whether that is done.
        """
        for place, (state, sources) in self._recording.kept.items() if keep else ():
            value = state.replaced(self.tensor(source, values) for source in sources).value()
            place.put(self._owners[place], value)
        sources = self._recording.returned
        return self._recording.output.replaced(self.tensor(s, values) for s in sources).value()


@final
@dataclass(frozen=True, slots=True)
class Span:
    """Calls of a recording, one after the other, and the values that are there around them."""

    bound: Bound
    """The recording, bound to a model."""
    indices: range
    """Which calls they are."""
    calls: tuple[RecordedCall, ...]
    spent: tuple[tuple[int, ...], ...]
    """For each call the numbers of the values that nothing reads after it."""
    enters: tuple[int, ...]
    """Numbers of the values that make up the state before."""
    leaves: tuple[int, ...]
    """Numbers of those that make up the state after."""


Layout: TypeAlias = tuple[torch.Size, torch.dtype, torch.device, bool]
"""Shape, dtype, device, and whether it asks for a gradient."""


def layouts_of(inputs: State) -> tuple[Layout, ...]:
    """Shape, dtype, device and whether it asks for a gradient, of each tensor.

    Args:
        inputs: A value, taken apart.
    """
    return tuple([(t.shape, t.dtype, t.device, t.requires_grad) for t in inputs.leaves])


def part_of(model: nn.Module, path: str) -> nn.Module:
    """The part of a model with a path, whatever attributes of its class have the same name."""
    for name in path.split(".") if path else ():
        model = model._modules[name]  # type: ignore[assignment]
    return model


def _said(value: object) -> str:
    """A short text of what `attributes_of` gives for an attribute."""
    plain = value[1] if isinstance(value, tuple) and len(value) == 2 else value
    text = repr(plain)
    return text if len(text) <= 80 else f"{text[:80]}..."


def module_of(model: nn.Module, target: str) -> nn.Module:
    """The module that a call names, or whose stage it names."""
    return part_of(model, target.path if isinstance(target, StagePath) else target)


def _stages_of(module: nn.Module) -> list[StageCall]:
    assert isinstance(module, StagedModule)
    return module.stages()


def _callee(
    call: RecordedCall, model: nn.Module, stages: Callable[[str], Sequence[StageCall]]
) -> Any:
    target: Any = call.target
    if isinstance(target, StagePath):
        return stages(target.path)[target.position]
    if isinstance(target, str):
        return part_of(model, target) if target else model.forward
    return getattr(target, "apply") if isinstance(target, type) else target  # noqa: B009


def described(layouts: Iterable[Layout]) -> str:
    """Layouts of tensors in words."""
    texts = [f"{dtype}{list(shape)} on {device}" for shape, dtype, device, _ in layouts]
    return ", ".join(texts) or "no tensors"


def _listed(sources: Iterable[Source]) -> str:
    return ", ".join(map(str, sources))
