"""What a model and a plan have in common, made once and checked at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from ..base.budget import Tier
from ..base.errors import PlanMismatchError
from ..capture.inspection import Inspection
from ..capture.signature import (
    describe_inputs,
    describe_modes,
    read_carries,
    structure_digest,
)
from ..capture.stage_discovery import StageCall, trace
from ..capture.surroundings_check import Expected
from ..planner.plan import Plan
from ..recompute.engine import nodes_made
from ..recompute.fsdp import Sharding, sharded_of
from ..recompute.parameter_swap import Place, Slots
from ..recompute.stateful_buffers import HiddenBuffers, is_write_only
from ..recompute.tape import Carries, as_asked
from ..schedule.language import Code
from ..simulator.liveness import Liveness, Segment, analyse, cut
from ..tensors.devices import several_devices
from ..tensors.pytree import State, storages
from ..tensors.wrapper_tensors import cannot_be_followed
from ..torch_state.locks import InTurn, Stay, Turn
from ..torch_state.replay_context import ContextFn, Generators, contexts
from ..workload.chain import Chain
from ..workload.stage import Signature
from .budget_watch import Overruns
from .operation_fusion import find_stretches
from .parameter_usage import Usage

# Parameters may be kept in another dtype than they are planned for if FSDP casts them to these.
_LOW_PRECISION = (torch.bfloat16, torch.float16)

Check: TypeAlias = Literal["none", "glance", "outputs"]
"""What of the output of a stage that runs again is compared with that of its first run."""

# What `Liveness` says of an operation, as bits of one number: there are many, and each is asked.
KEEPS_OUTPUT, FREES_INPUT, RESTORES, SNAPSHOTS = 1, 2, 4, 8


@final
@dataclass(frozen=True, slots=True)
class Touched:
    """The blocks, by index, that a segment's operations run."""

    all: tuple[int, ...]
    again: tuple[int, ...]
    """Those with stages that have run before."""


@final
class Program:
    """What a model and a plan have in common, made once: the schedule, cut and annotated."""

    def __init__(
        self,
        inspection: Inspection,
        plan: Plan,
        *,
        check: Check = "glance",
        context_fn: ContextFn | None = None,
    ) -> None:
        self.plan = plan
        self.check: Check = check
        self.context_fn = context_fn
        signature = plan.chain.signature
        self.blocks = trace(inspection.model, frozen=signature.frozen if signature else 0)
        self.stages: list[StageCall] = [stage for block in self.blocks for stage in block.stages]
        self.lock = Turn()
        if not isinstance(plan.chain, Chain):
            raise PlanMismatchError(
                "the plan is for a graph, and models are run as chains; profile the model and "
                "plan the chain"
            )
        self.chain, chain, schedule = plan.chain, plan.chain, plan.schedule
        self.inspection = inspection.with_layouts(self._check_model())
        where = several_devices(
            (f"{kind} {name!r}", tensor) for kind, name, tensor in inspection.named_tensors()
        )
        if where:
            raise PlanMismatchError(
                f"the model is on more than one device ({where}), and a plan is for one: put all "
                "of it there (model.to(device))"
            )
        self.codes, self.numbers = schedule.codes, schedule.stages
        self.kinds = schedule.kinds
        liveness = analyse(schedule, len(chain))
        self.facts = _pack(liveness)
        self.snapshots_input = liveness.snapshots_input
        self.segments = cut(schedule, chain.blocks)
        if liveness.repeats[: self.segments.turn].any():
            raise PlanMismatchError(
                "the plan runs a stage twice before the loss, which gains nothing and is not "
                "supported; plan again"
            )
        self.stretches = find_stretches(
            schedule,
            liveness,
            self.segments,
            plan.trace.peak_position,
            self._collectors(),
        )
        self.slots = [Slots([block.module]) for block in self.blocks]
        assert chain.signature is not None
        places = inspection.buffer_places(chain.signature.hidden)
        self.random, self.hidden = chain.draws, HiddenBuffers(self.slots, places)
        # Whether a run that does not simply go on begins with something put back.
        self.replays = self.random or bool(self.hidden)
        self.glanced = self._to_glance_at(liveness)
        self.may_change = self._changeable(places)
        owner = np.zeros(len(chain) + 1, dtype=np.int32)
        for k, block in enumerate(chain.blocks):
            owner[block.first : block.last + 1] = k
        self.owner = owner
        self.touched = {
            segment: self._touched(segment, liveness)
            for segment in (*self.segments.forward, *self.segments.backward)
        }
        self.own_leaves = bytes(flags[0] for flags in self._flags("own_leaves", len(chain)))
        self.first_trained = self._first_trained()
        self.expected = Expected(chain.signature, plan.peak_bytes)
        self.carries = self._flags("carries", len(chain) + 1)
        self.asks = Carries.ASKED in self.carries[0]
        self.usage = Usage(self.stages, self.carries[:-1])
        self.overruns = Overruns(chain)
        self.varies = self._varies()
        self._sharding: tuple[tuple[nn.Module, ...], Sharding | None] = ((), None)
        self.run_alone = bytes(flags[0] for flags in self._flags("need_tapes", len(chain)))
        self.sides = bytes(flags[0] for flags in self._flags("sides", len(chain)))
        self.has_sides = any(self.sides)

    def __getstate__(self) -> dict[str, object]:
        """All but what is known by the identity of modules, which a copy does not share."""
        return {**self.__dict__, "_sharding": ((), None)}

    def _check_model(self) -> torch.dtype | None:
        """Refuse a model that the plan is not for.

        Returns:
            The dtype that parameters must be cast to when they are gathered, if they must.
        """
        chain = self.chain
        if chain.signature is None:
            raise PlanMismatchError(
                "the plan was made for a chain without a model; profile the model and plan that"
            )
        if chain.signature.unfit:
            raise PlanMismatchError(chain.signature.unfit)
        planned = chain.signature.structure
        found = (d for d in (None, *_LOW_PRECISION) if structure_digest(self.blocks, d) == planned)
        computed_in = next(found, torch.float32)
        if len(chain) != len(self.stages) or computed_in is torch.float32:
            raise PlanMismatchError(
                f"the plan is for another model: it expects {len(chain)} stages in "
                f"{len(chain.blocks)} blocks with structure {chain.signature.structure[:12]}, "
                f"found {len(self.stages)} stages in {len(self.blocks)} blocks with structure "
                f"{structure_digest(self.blocks)[:12]}; plan this model anew"
            )
        options = (self.plan.schedule.codes == Code.TAPED_FORWARD) & (self.plan.schedule.kinds > 0)
        if options.any():
            raise PlanMismatchError(
                f"the plan runs {options.sum()} stages with another tape than their own, which the "
                "executor cannot do; plan for a chain whose stages offer one tape each"
            )
        if np.any(self.plan.schedule.codes == Code.COPY) or np.any(
            self.plan.schedule.sources != Tier.DEVICE
        ):
            raise PlanMismatchError(
                "the plan moves checkpoints between tiers, which the executor cannot do yet; "
                "plan for the device alone"
            )
        return computed_in

    def _flags(
        self, what: Literal["carries", "need_tapes", "own_leaves", "sides"], count: int
    ) -> list[tuple[int, ...]]:
        """What the signature says of each tensor of each state, or of each stage."""
        assert self.chain.signature is not None
        unsaid = int(what == "carries")
        found = read_carries(getattr(self.chain.signature, what) or f"{count}x{unsaid}")
        if len(found) != count:
            raise PlanMismatchError(
                f"the plan's {what!r} tells of {len(found)} states or stages, and its chain has "
                f"{count}: its file is damaged; plan again"
            )
        return found

    def _varies(self) -> bytes:
        """For each stage whether the tape of each run is looked at."""
        if nodes_made is None:  # nothing tells whether tapes are alike
            return bytes([1]) * len(self.chain)
        bounds = (stage.ledger and stage.ledger.bounds for stage in self.chain.stages)
        return bytes([bool(b and b.varies) for b in bounds])

    def _touched(self, segment: Segment, liveness: Liveness) -> Touched:
        part = slice(segment.start, segment.stop)
        numbers = self.numbers[part]
        again = numbers[liveness.repeats[part]]
        return Touched(*(tuple(np.unique(self.owner[x]).tolist()) for x in (numbers, again)))

    def _to_glance_at(self, liveness: Liveness) -> bytes:
        """For each stage whether to look if it gives the same when it runs again.

        Of the stages of one module, such as the steps of an ODE, the first and the last that run
        again are enough: what changes one changes all, as a rule.
        """
        chosen = np.zeros(len(self.chain), dtype=np.uint8)
        latest: dict[int, int] = {}
        for i in np.unique(self.numbers[liveness.repeats] - 1).tolist():
            module = id(self.stages[i].module)
            chosen[i] = module not in latest
            latest[module] = i
        chosen[list(latest.values())] = 1
        return chosen.tobytes()

    def _collectors(self) -> Callable[[int], frozenset[int]]:
        """Gives what the backward of a stage may add gradients to, by identity."""
        signature = self.chain.signature
        # What every stage is given is known at the call only; one name stands for all of it.
        common = frozenset([0] if signature is not None and signature.inputs else ())
        known: dict[int, frozenset[int]] = {}

        def collects(i: int) -> frozenset[int]:
            module = self.stages[i - 1].module
            found = known.get(id(module))
            if found is None:
                found = common.union(id(p) for p in module.parameters() if p.requires_grad)
                known[id(module)] = found
            return found

        return collects

    def _changeable(self, places: list[Place]) -> list[list[bool]]:
        """For each block and each of its places for buffers whether stages may change it."""
        hidden = {(id(module), name) for module, name in places}
        return [
            [(id(p[0]), p[1]) in hidden or is_write_only(p) for p in slots.buffer_places()]
            for slots in self.slots
        ]

    def sharding(self) -> Sharding | None:
        """Which blocks `fully_shard` has sharded, as the model is now; None where it has none.

        Raises:
            PlanMismatchError: They are sharded in a way that a plan cannot follow.
        """
        sharded = sharded_of(self.inspection.modules[1:])
        if sharded != self._sharding[0]:
            modules = [block.module for block in self.blocks]
            self._sharding = sharded, Sharding(modules, sharded) if sharded else None
        return self._sharding[1]

    def _first_trained(self) -> int:
        """The first stage with trained parameters, or whose output carries a gradient without any.

        Returns:
            Its number; one more than there are stages if there is none.
        """
        known: dict[int, bool] = {}
        for i, stage in enumerate(self.stages, 1):
            module = stage.module
            trained = known.get(id(module))
            if trained is None:
                trained = known[id(module)] = any(p.requires_grad for p in module.parameters())
            if trained or self.own_leaves[i - 1]:
                return i
        return len(self.stages) + 1

    def sharded_parameters(self) -> set[int]:
        """Ids of the parameters that FSDP is still to gather."""
        sharding = self.sharding()
        if sharding is None:
            return set()
        blocks = (slots for k, slots in enumerate(self.slots) if k in sharding)
        return {id(p) for slots in blocks for p in slots.parameters()}

    def alone(
        self, within: Sequence[Stay] = (), *, forward: bool = False
    ) -> AbstractContextManager[None]:
        """Keep other threads from the model, and from drawing random numbers if it draws some.

        Args:
            within: What `made_within` gave when what runs now was made.
            forward: Whether this is a forward pass: one of a model that draws none ends with a look
                whether it did, which others that draw by turns would confuse.
        """
        draws = self.random or (forward and Generators.turn.is_wanted_elsewhere())
        # In this order: a model inside another's stage asks for its own lock after both.
        return InTurn((Generators.turn, self.lock) if draws else (self.lock,), within)

    def made_within(self) -> tuple[Stay, ...]:
        """The turns during which the calling thread begins a step: those of a model around it."""
        return (*Generators.turn.mine(), *self.lock.mine())

    def owner_of(self, parameter: Tensor) -> str:
        """A parameter and the stage that it belongs to, in words, for an error.

        Args:
            parameter: It, or a stand-in that shares its memory.
        """
        home = storages([parameter]).keys()
        for module in self.inspection.modules:
            for name, p in module._parameters.items():
                if p is not None and storages([p]).keys() == home:
                    return self.owner_of_place((module, name))
        return "a parameter"

    def owner_of_place(self, place: Place) -> str:
        """The same for the place where a parameter is kept."""
        owners = (s.name for s in self.stages if place[0] in set(s.module.modules()))
        name = self.inspection.name_of(place) or place[1]
        return f"parameter {name!r} of stage {next(owners, '')!r}"

    def input_carries(self, inputs: State) -> tuple[int, ...]:
        """What the first stage finds of each tensor of the input, one of `Carries`.

        Args:
            inputs: The model's first argument, taken apart, as the caller gave it.
        """
        if not self.asks:
            return tuple(map(Carries.of, inputs.leaves))
        return tuple(
            Carries.of(leaf) or (planned if planned == Carries.ASKED else 0)
            for leaf, planned in zip(inputs.leaves, self.carries[0], strict=True)
        )

    def first_context(self) -> AbstractContextManager[Any]:
        """What the user wants around the first run of stages."""
        return nullcontext() if self.context_fn is None else contexts(self.context_fn)[0]

    def check_batch(self, inputs: State, given: State) -> None:
        """Refuse a batch, a mode or a choice of trained parameters that was not planned.

        Args:
            inputs: The model's first argument, taken apart.
            given: Its further arguments, taken apart.
        """
        signature = self.plan.chain.signature
        assert signature is not None
        if any(leaf.is_inference() for leaf in (*inputs.leaves, *given.leaves)):
            raise PlanMismatchError(
                "the batch was made under torch.inference_mode, so autograd cannot keep it; give a "
                "clone made outside (x.clone())"
            )
        for leaf in (*inputs.leaves, *given.leaves):
            reason = cannot_be_followed(leaf, without_data=True)
            if reason:
                raise PlanMismatchError(f"a tensor that the model is called with {reason}")
        if self.asks and len(inputs.leaves) == len(self.carries[0]):
            inputs = as_asked(inputs, self.input_carries(inputs))
        found = describe_inputs(inputs, given)
        if found != signature.inputs:
            expected, actual = (text or "one tensor" for text in (signature.inputs, found))
            raise PlanMismatchError(
                f"the plan is for a call with {expected}; found {actual}; call the model so, or "
                "profile and plan for this"
            )
        if not found:
            self._check_tensor(inputs.leaves[0], signature)
        first = inputs.leaves[0]
        if first.device.type != signature.device:
            raise PlanMismatchError(
                f"the plan is for inputs on {signature.device}, found {first.device.type}; move "
                "them, or profile and plan there"
            )
        where = several_devices(("the batch", leaf) for leaf in (*inputs.leaves, *given.leaves))
        if where:
            raise PlanMismatchError(
                f"the call has tensors on more than one device ({where}), and a plan is for one: "
                "move them there"
            )
        if first.device.type == "cpu" and torch.get_num_threads() != signature.threads:
            raise PlanMismatchError(
                f"the plan was measured with {signature.threads} threads, found "
                f"{torch.get_num_threads()}: workspaces depend on them; call "
                f"torch.set_num_threads({signature.threads}), or profile and plan again"
            )
        self.inspection.check(self.sharded_parameters())
        mode = describe_modes(self.inspection.training())
        if mode != signature.training:
            raise PlanMismatchError(
                f"the plan is for mode {signature.training!r}, found {mode!r}; call "
                f"{'model.eval()' if signature.training == 'eval' else 'model.train()'} as when it "
                "was profiled, or profile and plan in the mode to train in (under torch.no_grad "
                "any mode runs)"
            )
        changed_settings = self.inspection.changed_settings()
        if changed_settings:
            self.usage.look_again(changed_settings)

    def check_gathered(self, parameter: Tensor, k: int) -> None:
        """Refuse a parameter that FSDP has gathered in another dtype than planned.

        Args:
            parameter: As FSDP has gathered it.
            k: Its number among the parameters of the model.
        """
        dtype = self.inspection.layouts[k][1]
        if parameter.dtype != dtype:
            raise PlanMismatchError(
                f"the plan is for parameters of {dtype}, and FSDP has gathered some in "
                f"{parameter.dtype}: profile and plan a copy of the model whose parameters have "
                "the param_dtype of the MixedPrecisionPolicy, or shard without one"
            )

    def _check_tensor(self, x: Tensor, signature: Signature) -> None:
        """The same for a batch that is one tensor, with less to say."""
        expected = (signature.input_shape, signature.input_dtype, signature.device)
        found = (tuple(x.shape), str(x.dtype), x.device.type)
        if expected != found:
            raise PlanMismatchError(
                f"the plan is for a batch of shape {expected[0]}, {expected[1]} on {expected[2]}; "
                f"found {found[0]}, {found[1]} on {found[2]}; give such a batch, or plan for this "
                "one (under torch.no_grad any batch runs)"
            )
        if tuple(x.stride()) != signature.input_stride:
            raise PlanMismatchError(
                f"the plan is for a batch with strides {signature.input_stride}, found "
                f"{tuple(x.stride())}: another memory format takes other bytes; copy the batch "
                "(torch.empty_strided(shape, strides).copy_(x)), or plan for this one"
            )
        if x.requires_grad and not signature.input_requires_grad:
            raise PlanMismatchError(
                "the plan is for an input without gradient, found one that requires it; profile "
                "with such a sample, or detach the input"
            )


def _pack(liveness: Liveness) -> bytes:
    """One byte an operation, of the bits that are named above."""
    flags = (liveness.keeps_output, liveness.frees_input, liveness.restores, liveness.snapshots)
    bits = (KEEPS_OUTPUT, FREES_INPUT, RESTORES, SNAPSHOTS)
    pairs = zip(flags, bits, strict=True)
    return np.sum([flag.astype(np.uint8) * bit for flag, bit in pairs], 0, np.uint8).tobytes()
