"""Binds a plan to the model that it was made for, once; checks the model before each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from ..base.errors import PlanMismatchError
from ..capture.inspection import Inspection
from ..capture.policies.policy import ruled_by
from ..capture.recording.replay.own_values import OwnStretch, own_stages
from ..capture.recording.stages import Captured
from ..capture.signature import StageFacts, structure_digest
from ..capture.signature_check import Expected, refuse_tensors
from ..capture.stage_discovery import StageCall, TracedBlock, trace
from ..planner.plan import Plan
from ..recompute.budget_watch import Overruns
from ..recompute.engine import nodes_made
from ..recompute.fsdp import Sharding, sharded_of
from ..recompute.parameter_swap import Slot, Slots
from ..recompute.stateful_buffers import HiddenBuffers, changeable
from ..recompute.tape import Carries, as_asked
from ..schedule.language import Code
from ..tensors.devices import several_devices
from ..tensors.pytree import State, storages
from ..torch_state.locks import LendingLock, Locked, Stay
from ..torch_state.replay_context import ContextFn, Generators, contexts
from ..workload.chain import Chain
from ..workload.graph import Graph
from ..workload.stage import Signature
from .parameter_usage import Usage
from .script import Script

# Parameters may be kept in another dtype than they are planned for if FSDP casts them to these.
_LOW_PRECISION = (torch.bfloat16, torch.float16)

Check: TypeAlias = Literal["none", "glance", "outputs"]
"""What of the output of a stage that runs again is compared with that of its first run."""


@final
class PreparedPlan:
    """A plan bound to its model: stages, the script of operations, and what steps learn."""

    def __init__(
        self, inspection: Inspection, plan: Plan, check: Check, context_fn: ContextFn | None
    ) -> None:
        """Cut the model into the plan's stages.

        Args:
            inspection: The model.
            plan: The plan.
            check: What is compared of stages that run again.
            context_fn: What the user wants around stages; see `checkpointed`.

        Raises:
            PlanMismatchError: The plan is for another model, or no model can follow it.
        """
        self.plan = plan
        self.check: Check = check
        self.context_fn = context_fn
        self.lock = LendingLock()
        self.watch: Callable[[int, int], AbstractContextManager[object]] | None = None
        """Gives what is around operations, while a step is measured; see `step/watch`."""
        self.chain, self.signature = _chain_of(plan)
        self.facts = StageFacts.read(self.signature, len(self.chain))
        self.asks = Carries.ASKED in self.facts.carries[0]
        """Whether the first stage lets tensors of the input require a gradient."""
        self.has_sides = any(self.facts.sides)
        """Whether any stage has side outputs."""
        # -- the model
        _check_policy(inspection, self.signature)
        self.blocks = trace(inspection.outline, frozen=self.signature.frozen)
        self.stages: list[StageCall] = [stage for block in self.blocks for stage in block.stages]
        self.own = own_stages(self.stages) if isinstance(plan.chain, Graph) else ()
        """By the plan of a graph, the stages by what they read themselves."""
        self._stretches: dict[tuple[int, int], OwnStretch] = {}
        computed_in = _dtype_of_stages(self.chain, self.signature, self.blocks)
        self.inspection = _on_one_device(inspection.with_layouts(computed_in))
        self.slots = [Slots([block.module]) for block in self.blocks]
        self._sharding: tuple[tuple[nn.Module, ...], Sharding | None] = ((), None)
        # -- how it is run
        trained = _trained_by_stage(self.stages)
        # What every stage is given is known at the call only; one name stands for all of it.
        common = frozenset([0] if self.signature.inputs else ())
        self.script = Script.of(plan, lambda i: trained[i - 1] | common)
        _check_tapes(self.script, self.stages)
        self.compared = _compared(self.stages, self.script, check)
        """For each stage whether its outputs are compared when it runs again."""
        self.first_trained = _first_trained(trained, self.facts.own_leaves)
        """The first stage with trained parameters, or whose output carries a gradient without any;
        one more than there are stages if there is none."""
        # -- what stages keep for themselves
        places = self.inspection.buffer_places(self.signature.hidden)
        self.hidden = HiddenBuffers(self.slots, places)
        self.may_change = changeable(self.slots, places)
        """For each block and each of its places for buffers whether stages may change it."""
        self._buffers, self._changing = _buffers_by_stage(self.stages, self.slots, self.may_change)
        self.replays = self.chain.draws or bool(self.hidden)
        """Whether a run that does not simply go on begins with something put back."""
        # -- what steps learn
        self.varies = _varying(self.chain)
        """For each stage whether the tape of each of its runs is looked at."""
        self.expected = Expected(self.signature, plan.peak_bytes)
        self.usage = Usage(self.stages, self.facts.carries[:-1])
        self.overruns = Overruns(plan.chain)

    def __getstate__(self) -> dict[str, object]:
        """All but what is known by the identity of modules, which a copy does not share."""
        return {**self.__dict__, "_sharding": ((), None), "watch": None}

    # -- sharding

    def sharding(self) -> Sharding | None:
        """The blocks that `fully_shard` has sharded, as the model is now; None if there are none.

        Raises:
            PlanMismatchError: They are sharded in a way that a plan cannot follow.
        """
        sharded = sharded_of(self.inspection.modules[1:])
        if sharded != self._sharding[0]:
            modules = [block.module for block in self.blocks]
            self._sharding = sharded, Sharding(modules, sharded) if sharded else None
        return self._sharding[1]

    def sharded_parameters(self) -> set[int]:
        """Ids of the parameters that FSDP is still to gather."""
        sharding = self.sharding()
        if sharding is None:
            return set()
        blocks = (slots for k, slots in enumerate(self.slots) if k in sharding)
        return {id(p) for slots in blocks for p in slots.parameters()}

    def check_gathered(self, parameter: Tensor, k: int) -> None:
        """Refuse a parameter that FSDP has gathered in another dtype than planned.

        Args:
            parameter: As FSDP has gathered it.
            k: Its number among the parameters of the model.

        Raises:
            PlanMismatchError: It has another dtype.
        """
        dtype = self.inspection.layouts[k][1]
        if parameter.dtype != dtype:
            raise PlanMismatchError(
                f"the plan is for parameters of {dtype}, and FSDP has gathered some in "
                f"{parameter.dtype}: profile and plan a copy of the model whose parameters have "
                "the param_dtype of the MixedPrecisionPolicy, or shard without one"
            )

    # -- what a step runs in

    def alone(
        self, within: Sequence[Stay] = (), *, forward: bool = False
    ) -> AbstractContextManager[None]:
        """Hold the model's lock, and that of the random generators if stages draw from them.

        Args:
            within: What `made_within` gave when what runs now was made.
            forward: Whether this is a forward pass: one of a model that draws none ends with a look
                whether it did, which others that draw by turns would confuse.
        """
        draws = self.chain.draws or (forward and Generators.lock.is_wanted_elsewhere())
        # In this order: a model inside another's stage asks for its own lock after both.
        return Locked((Generators.lock, self.lock) if draws else (self.lock,), within)

    def made_within(self) -> tuple[Stay, ...]:
        """The holds of locks during which the calling thread begins a step."""
        return (*Generators.lock.mine(), *self.lock.mine())

    def first_context(self) -> AbstractContextManager[Any]:
        """The context for first runs of stages, from the user's `context_fn`."""
        return nullcontext() if self.context_fn is None else contexts(self.context_fn)[0]

    def buffers_of(self, first: int, last: int, *, changing: bool = False) -> list[Slots]:
        """The places for buffers of some stages' own modules, of each module once.

        Args:
            first: The first of the stages, counted from 1.
            last: The last of them.
            changing: Only of stages with some that stages may change.
        """
        found = (self._changing if changing else self._buffers)[first - 1 : last]
        return list({id(slots): slots for slots in found if slots is not None}.values())

    def stretch(self, first: int, last: int) -> OwnStretch:
        """By the plan of a graph, what stages that share a tape read and give.

        Args:
            first: The first of the stages, counted from 1.
            last: The last of them.
        """
        found = self._stretches.get((first, last))
        if found is None:
            found = self._stretches[first, last] = OwnStretch.of(self.own, first, last)
        return found

    # -- names for messages

    def owner_of(self, parameter: Tensor) -> str:
        """A parameter and the stage that it belongs to, in words, for an error.

        Args:
            parameter: It, or a stand-in that shares its memory.
        """
        home = storages([parameter]).keys()
        for module in self.inspection.modules:
            for name, p in module._parameters.items():
                if p is not None and storages([p]).keys() == home:
                    return self.owner_of_slot((module, name))
        return "a parameter"

    def owner_of_slot(self, place: Slot) -> str:
        """The same for the place where a parameter is kept."""
        owners = (s.name for s in self.stages if place[0] in set(s.module.modules()))
        name = self.inspection.name_of(place) or place[1]
        return f"parameter {name!r} of stage {next(owners, '')!r}"

    # -- before each step

    def input_carries(self, inputs: State) -> tuple[int, ...]:
        """What each tensor of the input carries as the first stage finds it, one of `Carries`.

        Args:
            inputs: The model's first argument, taken apart, as the caller gave it.
        """
        if not self.asks:
            return tuple(map(Carries.of, inputs.leaves))
        return tuple(
            Carries.of(leaf) or (planned if planned == Carries.ASKED else 0)
            for leaf, planned in zip(inputs.leaves, self.facts.carries[0], strict=True)
        )

    def check_batch(self, inputs: State, given: State) -> None:
        """Refuse a batch, a mode or a choice of trained parameters that was not planned.

        Args:
            inputs: The model's first argument, taken apart.
            given: Its further arguments, taken apart.

        Raises:
            PlanMismatchError: It is not as planned; the message says what is, and what would work.
        """
        refuse_tensors((*inputs.leaves, *given.leaves))
        if self.asks and len(inputs.leaves) == len(self.facts.carries[0]):
            inputs = as_asked(inputs, self.input_carries(inputs))
        self.expected.check_call(inputs, given)
        self.inspection.check(self.sharded_parameters())
        self.expected.check_modes(self.inspection.training())
        changed_settings = self.inspection.changed_settings()
        if changed_settings:
            self.usage.look_again(changed_settings)


# -- whether a plan is for a model


def _chain_of(plan: Plan) -> tuple[Chain, Signature]:
    """The chain of a plan, and the signature of the model that it was profiled from."""
    chain = plan.chain if isinstance(plan.chain, Chain) else plan.chain.lined
    if chain is None:
        raise PlanMismatchError(
            "the plan is for a graph that was made without a model; profile the model, and plan "
            "Graph.of_values(chain)"
        )
    if chain.signature is None:
        raise PlanMismatchError(
            "the plan was made for a chain without a model; profile the model and plan that"
        )
    if chain.signature.unfit:
        raise PlanMismatchError(chain.signature.unfit)
    return chain, chain.signature


def _dtype_of_stages(
    chain: Chain, signature: Signature, blocks: Sequence[TracedBlock]
) -> torch.dtype | None:
    """The dtype that parameters must be cast to when they are gathered; None for their own."""
    stages = sum(len(block.stages) for block in blocks)
    for dtype in (None, *_LOW_PRECISION) if len(chain) == stages else ():
        if structure_digest(blocks, dtype) == signature.structure:
            return dtype
    raise PlanMismatchError(
        f"the plan is for another model: it expects {len(chain)} stages in "
        f"{len(chain.blocks)} blocks with structure {signature.structure[:12]}, "
        f"found {stages} stages in {len(blocks)} blocks with structure "
        f"{structure_digest(blocks)[:12]}; plan this model anew"
    )


def _on_one_device(inspection: Inspection) -> Inspection:
    """The model, which lies on one device.

    Raises:
        PlanMismatchError: It lies on several.
    """
    owned = inspection.named_tensors()
    where = several_devices((f"{kind} {name!r}", tensor) for kind, name, tensor in owned)
    if where:
        raise PlanMismatchError(
            f"the model is on more than one device ({where}), and a plan is for one: put all "
            "of it there (model.to(device))"
        )
    return inspection


# -- what follows from the stages


def _trained_by_stage(stages: Sequence[StageCall]) -> list[frozenset[int]]:
    """For each stage the ids of its trained parameters; stages of one module share one set."""
    known: dict[int, frozenset[int]] = {}
    for stage in stages:
        if id(stage.module) not in known:
            trained = (id(p) for p in stage.module.parameters() if p.requires_grad)
            known[id(stage.module)] = frozenset(trained)
    return [known[id(stage.module)] for stage in stages]


def _first_trained(trained: Sequence[frozenset[int]], own_leaves: Sequence[int]) -> int:
    pairs = enumerate(zip(trained, own_leaves, strict=True), 1)
    return next((i for i, pair in pairs if any(pair)), len(trained) + 1)


def _varying(chain: Chain) -> bytes:
    bounds = (stage.ledger and stage.ledger.bounds for stage in chain.stages)
    # Without a count of nodes nothing tells whether tapes are alike.
    return bytes([nodes_made is None or bool(b and b.varies) for b in bounds])


def _buffers_by_stage(
    stages: Sequence[StageCall], blocks: Sequence[Slots], may_change: Sequence[Sequence[bool]]
) -> tuple[list[Slots | None], list[Slots | None]]:
    """For each stage its places for buffers, if any; and the same if any of them may change."""
    flagged = [
        zip(b.buffer_places(), m, strict=True) for b, m in zip(blocks, may_change, strict=True)
    ]
    changing = {(id(place[0]), place[1]) for block in flagged for place, may in block if may}
    known: dict[int, tuple[Slots | None, Slots | None]] = {}
    for stage in stages:
        if id(stage.module) not in known:
            slots = Slots([stage.module])
            places = slots.buffer_places()
            moves = any((id(module), name) in changing for module, name in places)
            known[id(stage.module)] = (slots if places else None, slots if moves else None)
    found = [known[id(stage.module)] for stage in stages]
    return [every for every, _ in found], [moving for _, moving in found]


def _compared(stages: Sequence[StageCall], script: Script, check: Check) -> bytes:
    """For each stage whether to look if it gives the same when it runs again.

    Where not all are asked for, the first and the last that run again are enough of the stages of
    one module, such as the steps of an ODE: what changes one changes all, as a rule.
    """
    if check == "outputs":
        return bytes([1]) * len(stages)
    chosen = bytearray(len(stages))
    latest: dict[int, int] = {}
    for i in script.repeated:
        module = id(stages[i - 1].module)
        chosen[i - 1] = module not in latest
        latest[module] = i - 1
    for k in latest.values():
        chosen[k] = 1
    return bytes(chosen)


def _check_policy(inspection: Inspection, signature: Signature) -> None:
    """Refuse a plan for a recording in which other calls may or may not be made again."""
    model = inspection.model
    if not isinstance(model, Captured):
        return
    found, planned = model.ruled, ruled_by(signature)
    if (found.never, found.always) != (planned.never, planned.always):
        words = [x.words or "no policy" for x in (planned, found)]
        raise PlanMismatchError(
            f"the plan is for the model with {words[0]}, and it was recorded with {words[1]}: give "
            "captured() what the plan was made with, or plan for this recording"
        )


def _check_tapes(script: Script, stages: Sequence[StageCall]) -> None:
    """Refuse a plan that runs a stage with a tape that it does not offer."""
    taped = script.codes == Code.TAPED_FORWARD
    for i, option in {*zip(script.numbers[taped].tolist(), script.dropped[taped], strict=True)}:
        if option > 1 or (option and stages[i - 1].lean is None):
            raise PlanMismatchError(
                f"the plan runs stage {stages[i - 1].name!r} with tape {option} of those that it "
                f"offers, and the stage has {'its own alone' if option == 1 else 'two at most'}; "
                "profile and plan the model again, with this version of ckptsched and of torch"
            )
