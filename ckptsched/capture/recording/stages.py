"""A recorded model as a chain: each stretch of calls between two cuts is a stage."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from ...base.budget import format_bytes
from ...base.errors import PlanMismatchError, ProfileError
from ...recompute.fsdp import has_hooks
from ...recompute.tape_contents import SHOWS_WHAT_IS_SAVED
from ...tensors.pytree import State
from ...torch_state.replay_context import OneWay, RandomState, Recomputing
from ..compiled_stages import CompiledStage, Compiler, code_of
from ..inspection import Inspection, inspect_model
from ..likeness import InDoubtError, Likeness
from ..model_state import left_as_it_was
from ..policies.policy import NO_POLICY, NOTHING_RULED, Named, Policy, Ruled, said
from ..stage_discovery import StageCall, StagedModule
from ..wrappers import plain_forward, share
from .calls import StagePath
from .cuts import (
    CallCosts,
    candidate_cuts,
    cuts_beside_once,
    cuts_beside_whole,
    dear_cuts,
    every_cut,
    lean_cuts,
    measure,
    smallest_cuts,
)
from .lean_stage import LeanStage
from .record import record
from .recording import Bound, Recording, Span, module_of, part_of
from .replay.written_stage import Written, write


@final
class Parts(nn.Module):
    """The modules whose parameters and buffers a stage uses, each where the model keeps it.

    It owns nothing itself: what asks for its modules, parameters or buffers is told of theirs.
    """

    def __init__(self, whole: Sequence[nn.Module], alone: Sequence[nn.Module]) -> None:
        """Put modules together.

        Args:
            whole: Modules that count with all that is below them.
            alone: Modules that count without what is below them.
        """
        super().__init__()
        self.__dict__["_whole"] = tuple(whole)
        self.__dict__["_alone"] = tuple(alone)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those that were put together, and what is below those that count whole."""
        memo = set() if memo is None else memo
        dot = f"{prefix}." if prefix else ""
        for k, module in enumerate(self.__dict__["_whole"]):
            yield from module.named_modules(memo, f"{dot}{k}", remove_duplicate)
        for k, module in enumerate(self.__dict__["_alone"], len(self.__dict__["_whole"])):
            if module not in memo or not remove_duplicate:
                memo.add(module)
                yield f"{dot}{k}", module


@final
class CapturedStage(StageCall):
    """The calls between two cuts."""

    __slots__ = ("_cheap", "_lean", "_named", "_once", "_span", "_whole", "_written", "module")

    module: nn.Module

    def __init__(
        self,
        span: Span,
        module: nn.Module,
        whole: Mapping[str, nn.Module] = MappingProxyType({}),
        cheap: Sequence[bool] = (),
        named: Sequence[str] = (),
        once: bool = False,
    ) -> None:
        """Take some calls of a recording.

        Args:
            span: The calls.
            module: What has the parameters and buffers that the calls use.
            whole: The modules that they call, by path.
            cheap: For each whether a lean tape may leave what it makes out; empty for a stage
                that has no such tape.
            named: For each what people call it; empty for one that computes nothing.
            once: Whether it has a call that is to run once a step.
        """
        self.prefix, self.module, self._once = "", module, once
        self._span, self._whole = span, whole
        self._cheap, self._named = tuple(cheap), tuple(named)
        self._written = Written()
        self._lean = LeanStage(self, span, cheap, named) if cheap else None

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Make the calls, of the values that are alive before; give those alive after."""
        run = self._written.run
        if run is None:
            run = self._written.run = write(self._span)
        return run(x)

    @property
    def lean(self) -> LeanStage | None:
        """The same calls with a lean tape; None where none of them is cheap."""
        return self._lean

    @property
    def enters(self) -> tuple[int, ...]:
        """Numbers of the values that make up the state before."""
        return self._span.enters

    @property
    def leaves(self) -> tuple[int, ...]:
        """Numbers of those that make up the state after."""
        return self._span.leaves

    @property
    def reads(self) -> frozenset[int]:
        """Numbers of the values that its calls read or make."""
        return frozenset(n for call in self._span.calls for n in (*call.values, *call.makes))

    def between(self, enters: tuple[int, ...], leaves: tuple[int, ...]) -> CapturedStage:
        """The same calls from and to other states.

        Args:
            enters: Numbers of the values before: at least all that the calls read of those.
            leaves: Numbers of the values after.
        """
        span = replace(self._span, enters=enters, leaves=leaves)
        stage = CapturedStage(span, self.module, self._whole, self._cheap, self._named, self._once)
        stage.prefix = self.prefix
        return stage

    @property
    def once(self) -> bool:
        """Whether it is to run once a step."""
        return self._once

    @property
    def label(self) -> str:
        """The names of the first and the last call."""
        span = self._span
        first, end = said(span.calls[0]), said(span.calls[-1])
        return f"{span.indices.start}:{first}" + (f" to {end}" if len(span.calls) > 1 else "")

    @property
    def key(self) -> Hashable:
        """Of its own: equal stages have parameters of their own (see `likeness`)."""
        span = self._span
        return ("captured", id(span.bound), span.enters, span.leaves, span.indices)

    def _called(self, target: str) -> nn.Module | StageCall:
        """The module that a call names, or the stage of one."""
        if not isinstance(target, StagePath):
            return self._whole[target]
        span = self._span
        pairs = zip(span.indices, span.calls, strict=True)
        at = next(k for k, call in pairs if call.target is target)
        stage: StageCall = span.bound.callee(at)
        return stage

    def likeness(self) -> Hashable:
        """The calls, with their tensors and modules in the order in which they come up."""
        found, span = Likeness(), self._span
        try:
            calls, local = found.calls(
                span.calls,
                lambda source: span.bound.tensor(source, {}),
                self._called,
                span.enters,
            )
            owned = found.owned(self.module.modules())
        except (InDoubtError, LookupError, AttributeError):  # what an earlier call would put there
            return None
        spent = tuple([tuple([local.get(n, -1) for n in gone]) for gone in span.spent])
        return calls, owned, spent, tuple([local[n] for n in span.leaves]), self._cheap


@final
class Captured(StagedModule):
    """A recorded model: called with the tensors of the arguments, it gives those of the result."""

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        cuts: Sequence[int],
        live_bytes: Sequence[int],
        compiler: Compiler | None = None,
        costs: CallCosts | None = None,
        ruled: Ruled = NOTHING_RULED,
    ) -> None:
        """Cut a recording.

        Args:
            model: The model, with which it shares all that it owns.
            recording: Of the model.
            cuts: Before which calls to cut, in ascending order.
            live_bytes: For each cut the bytes of the tensors that are alive there.
            compiler: Compiles the stages; None where they run as they are.
            costs: What its calls take; None for stages without lean tapes.
            ruled: The calls that run once a step, and those that lean tapes may make again.
        """
        super().__init__()
        share(model, self)
        self.training = model.training
        self.__dict__["_model"] = model
        self.__dict__["recording"] = recording
        self.__dict__["cuts"] = tuple(cuts)
        self.__dict__["live_bytes"] = tuple(live_bytes)
        self.__dict__["compiler"] = compiler
        self.__dict__["_costs"] = costs
        self.__dict__["ruled"] = ruled

    @property
    def model(self) -> nn.Module:
        """The model that was recorded."""
        return cast(nn.Module, self.__dict__["_model"])

    @property
    def cuts(self) -> tuple[int, ...]:
        """Before which calls a stage begins, the first apart."""
        return cast(tuple[int, ...], self.__dict__["cuts"])

    @property
    def ruled(self) -> Ruled:
        """The calls that run once a step, and those that lean tapes may make again."""
        return cast(Ruled, self.__dict__["ruled"])

    @property
    def recording(self) -> Recording:
        """The calls, and what they were recorded for."""
        return cast(Recording, self.__dict__["recording"])

    @property
    def compiler(self) -> Compiler | None:
        """What compiles the stages; None where they run as they are."""
        return cast("Compiler | None", self.__dict__["compiler"])

    def take(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The tensors of a call of the model, which this module takes in its place.

        Args:
            args: What the model is called with.
            kwargs: The same by name.

        Raises:
            PlanMismatchError: The model was recorded for another structure or other shapes, or
                would take another way.
        """
        inputs = State.of((args, kwargs), opaque=True)
        self.check(inputs)
        return self.recording.tensors(self.model, inputs)

    def check(self, inputs: State) -> None:
        """See that a call of the model would go the way that was recorded.

        Args:
            inputs: What it is called with, as `(args, kwargs)`, taken apart.

        Raises:
            PlanMismatchError: It would not; nothing has run.
        """
        try:
            self.recording.check(self.model, inputs)
        except PlanMismatchError as error:
            error.before_step = True
            raise

    def give(self, tensors: Sequence[Tensor], *, keep: bool = True) -> Any:
        """What the model gives, made of what this module gives.

        Args:
            tensors: The output of this module.
            keep: Whether tensors that the model keeps as attributes are put there, as its forward
                would do.
        """
        recording = self.recording
        numbers = recording.live(len(recording.calls))
        values = dict(zip(numbers, tensors, strict=True))
        return Bound(recording, self.model).result(values, keep=keep)

    def __repr__(self) -> str:
        """The calls, the cuts between them with their live bytes, and the guards."""
        cuts = dict(zip(self.__dict__["cuts"], self.__dict__["live_bytes"], strict=True))
        lines = [*self.recording.lines()]
        for k in reversed(cuts):
            lines.insert(k + 1, f"---- cut: {format_bytes(cuts[k])} alive")
        return "\n".join(lines)

    def stages(self) -> list[StageCall]:
        """The stretches between the cuts."""
        recording = self.recording
        bound = Bound(recording, self, self.model)
        edges = [0, *self.__dict__["cuts"], len(recording.calls)]
        costs = self.__dict__["_costs"]
        return [
            _stage(bound.span(start, stop), self, self.compiler, costs, self.ruled)
            for start, stop in itertools.pairwise(edges)
        ]

    def stages_follow_from(self) -> Hashable:
        """The cuts: a recording does not change."""
        cuts: tuple[int, ...] = self.__dict__["cuts"]
        return cuts


def captured(
    model: nn.Module,
    *sample: Any,
    kwargs: Mapping[str, Any] | None = None,
    cuts: Literal["lean", "dear", "smallest", "every"] = "lean",
    compile: bool | str = False,
    never_recompute: Named | Iterable[Named] = (),
    always_recompute: Named | Iterable[Named] = (),
) -> Captured:
    """Record what a model does with a batch, and cut it into stages: any module becomes a chain.

    Only tensors of the batch steer the recording by their shapes; what else steers it is checked by
    `take`. The model is left as it was.

    Args:
        model: Any module.
        sample: What it is called with.
        kwargs: The same by name.
        cuts: Where to cut: wherever no leaner cut is near, once between calls that are dear to
            make again, where the live bytes are smallest, or wherever a cut may lie.
        compile: Whether `torch.compile` compiles each stage, so that seconds and bytes are those of
            compiled code and gradients differ by its rounding; a text names a backend. Stages that
            are equal share what is compiled; what cannot be compiled runs as it is. Random numbers
            are drawn as without it.
        never_recompute: Calls that a step makes once: those in modules of these classes, or with
            these paths (`"blocks.*.attention"`, say, as in `named_modules`), those of these
            functions of torch (`torch.nn.functional.scaled_dot_product_attention`, also where a
            module of torch.nn calls it), custom autograd Functions or operators
            (`torch.ops.aten.mm`); one or several. No lean tape makes them again, and a plan keeps
            the tape of the stages that have them until their backward. See also `keep`.
        always_recompute: Calls, named likewise, that lean tapes may make again in the backward
            whatever they cost, so that stages offer leaner tapes. Plans choose, as ever.

    Returns:
        A module that shares all that the model owns, for `profile`, `plan`, `checkpointed` and
        `verify`. It takes the tensors of a call as a tuple, which `take` makes, and gives a tuple,
        of which `give` makes what the model gives. Printed, it shows the calls, the cuts with the
        bytes that are alive there, parts that are called whole and why, and guards.

    Raises:
        ProfileError: The model cannot be taken apart, or there is no compiler; the message says
            what is in the way. Or a name is that of no call, one call is named by both, or a call
            that is always to be made again draws random numbers, has effects, or may have.

    Example:
        >>> print(captured(model, ids, kwargs={"labels": ids}))
    """
    policy = Policy.of(never_recompute, always_recompute)
    inspection = inspect_model(model, "captured", ProfileError)
    inputs = State.of((sample, dict(kwargs or {})), opaque=True)
    if not inputs.leaves:
        raise ProfileError("captured needs a sample to call the model with, found no tensor in it")
    if has_hooks(inspection.model):
        raise ProfileError(
            "the model itself has hooks, which a recording of its forward would leave out; take "
            "them off, or put the model into a module that calls it"
        )
    ways = {"lean": lean_cuts, "dear": dear_cuts, "smallest": smallest_cuts, "every": every_cut}
    if cuts not in ways:
        raise ProfileError(f"cuts is {cuts!r}; give one of {', '.join(map(repr, ways))}")
    compiler = Compiler("inductor" if compile is True else compile) if compile else None
    recording, costs = _recorded(inspection, inputs, policy)
    ruled = policy.ruled(inspection.model, recording.calls, costs)
    return _cut(inspection.model, recording, costs, ways[cuts](costs), ruled, compiler)


def capture_as_before(
    inspection: Inspection,
    inputs: State,
    cuts: Sequence[int],
    policy: Policy | Ruled = NO_POLICY,
    like: Recording | None = None,
) -> Captured:
    """Record the forward of a model, its own hooks apart, and cut it where it was cut before.

    Args:
        inspection: The model.
        inputs: What it is called with, as `(args, kwargs)`, taken apart, with some tensor.
        cuts: Before which calls to cut, in ascending order.
        policy: What is never or always made again, by name, or as it was found before.
        like: A recording of the model for a batch of other sizes; see `record`.

    Raises:
        ProfileError: The model cannot be taken apart, or not there.
    """
    recording, costs = _recorded(inspection, inputs, policy, like)
    if isinstance(policy, Policy):
        ruled = policy.ruled(inspection.model, recording.calls, costs)
    else:
        ruled = policy.checked(recording.calls, costs)
    if not set(cuts) <= set(every_cut(costs)):
        raise ProfileError(
            f"the model makes {len(recording.calls)} calls on this batch, which cannot be cut "
            f"before calls {', '.join(map(str, cuts))}"
        )
    return _cut(inspection.model, recording, costs, cuts, ruled)


def candidates(
    inspection: Inspection, inputs: State, policy: Policy = NO_POLICY
) -> tuple[Captured, ...]:
    """Record the forward of a model, its own hooks apart, with each cut that may be the best.

    Which is depends on the budget: finer stages have more to choose from, and cost more.

    Args:
        inspection: The model.
        inputs: What it is called with, as `(args, kwargs)`, taken apart, with some tensor.
        policy: What is never or always made again.

    Returns:
        Lean cuts, and those between dear calls where they are others.

    Raises:
        ProfileError: The model cannot be taken apart.
    """
    recording, costs = _recorded(inspection, inputs, policy)
    ruled = policy.ruled(inspection.model, recording.calls, costs)
    ways = candidate_cuts(costs)
    found = [_cut(inspection.model, recording, costs, cuts, ruled) for cuts in ways]
    return tuple({captured.cuts: captured for captured in reversed(found)}.values())[::-1]


def _recorded(
    inspection: Inspection,
    inputs: State,
    policy: Policy | Ruled,
    like: Recording | None = None,
) -> tuple[Recording, CallCosts]:
    device = inputs.leaves[0].device
    with plain_forward(inspection.model):
        recording = record(inspection, inputs, device, like)
    left = left_as_it_was(inspection, RandomState.take(device), lazily=True)
    with left, OneWay(), Recomputing(), torch.enable_grad():
        tensors = [leaf.detach() for leaf in recording.tensors(inspection.model, inputs)]
        closely = bool(policy if isinstance(policy, Policy) else policy.always)
        return recording, measure(recording, inspection.model, tensors, closely=closely)


def _cut(
    model: nn.Module,
    recording: Recording,
    costs: CallCosts,
    cuts: Sequence[int],
    ruled: Ruled,
    compiler: Compiler | None = None,
) -> Captured:
    once = [k in ruled.never for k in range(len(recording.calls))]
    cuts = sorted({*cuts, *cuts_beside_whole(recording, costs), *cuts_beside_once(costs, once)})
    live = [costs.live_bytes[k] for k in cuts]
    return Captured(model, recording, cuts, live, compiler, costs, ruled)


def _stage(
    span: Span,
    model: nn.Module,
    compiler: Compiler | None,
    costs: CallCosts | None,
    ruled: Ruled,
) -> StageCall:
    calls = span.calls
    whole = {c.target: module_of(model, c.target) for c in calls if isinstance(c.target, str)}
    paths = dict.fromkeys(p.path for c in calls for p in c.places if p.kind)
    alone = [part_of(model, path) for path in paths if path not in whole]
    parts = Parts(list(dict.fromkeys(whole.values())), alone)
    cheap, named = list[bool](), list[str]()
    # A tape of torch 2.9 does not show what hooks have packed.
    if costs is not None and compiler is None and SHOWS_WHAT_IS_SAVED:
        makes = [costs.makes_bytes[k] for k in span.indices]
        cheap = [ruled.may_be_made_again(k, costs.cheap[k]) for k in span.indices]
        named = [
            said(call) if made or call.writes else ""
            for call, made in zip(calls, makes, strict=True)
        ]
        if not any(map(operator.and_, cheap, makes)):
            cheap = []
    once = not ruled.never.isdisjoint(span.indices)
    stage = CapturedStage(span, parts, whole, cheap, named, once)
    if compiler is None:
        return stage
    called = [whole[call.target] for call in calls if isinstance(call.target, str)]
    code = code_of(calls, called, span.leaves)
    return stage if isinstance(code, str) else CompiledStage(stage, span, code, compiler, called)
