"""What a model and a plan have in common, made once and checked at every step."""

from __future__ import annotations

import threading
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from .aliases import Slots
from .budget import Tier
from .context import Autocast
from .errors import PlanMismatchError
from .liveness import analyse, cut
from .plans import Plan
from .schedule import Code
from .structure import structure_digest, training_mode
from .tracing import StageCall, trace


@final
class Lock:
    """A lock that a copied or unpickled model gets anew."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


@final
class Program:
    """What a model and a plan have in common, made once: the schedule, cut and annotated."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.blocks = trace(model)
        self.stages: list[StageCall] = [stage for block in self.blocks for stage in block.stages]
        self.lock = Lock()
        self._check_model()
        chain, schedule = plan.chain, plan.schedule
        self.codes, self.numbers = schedule.codes, schedule.stages
        self.kinds = schedule.kinds
        self.liveness = analyse(schedule, len(chain))
        self.segments = cut(schedule, chain.blocks)
        if self.liveness.repeats[: self.segments.turn].any():
            raise PlanMismatchError(
                "the plan runs a stage twice before the loss, which gains nothing and is not "
                "supported; plan again"
            )
        self.random = chain.draws
        self.slots = [Slots([block.module]) for block in self.blocks]
        self.all_slots = Slots([model])
        owner = np.zeros(len(chain) + 1, dtype=np.int64)
        for k, block in enumerate(chain.blocks):
            owner[block.first : block.last + 1] = k
        self.owner = owner
        self.trained = tuple(p.requires_grad for p in self.all_slots.parameters())
        self.modules = tuple(model.modules())
        self.tensors = self._tensors()
        self.repeated: dict[object, list[int]] = {}

    def __getstate__(self) -> dict[str, object]:
        """All but what is known by the identity of modules, which a copy does not share."""
        return {**self.__dict__, "repeated": {}}

    def _check_model(self) -> None:
        chain = self.plan.chain
        if chain.signature is None:
            raise PlanMismatchError(
                "the plan was made for a chain without a model; profile the model and plan that"
            )
        if len(chain) != len(self.stages) or structure_digest(self.blocks) != (
            chain.signature.structure
        ):
            raise PlanMismatchError(
                f"the plan is for another model: it expects {len(chain)} stages in "
                f"{len(chain.blocks)} blocks with structure {chain.signature.structure[:12]}, "
                f"found {len(self.stages)} stages in {len(self.blocks)} blocks with structure "
                f"{structure_digest(self.blocks)[:12]}; plan this model anew"
            )
        if np.any(self.plan.schedule.codes == Code.COPY) or np.any(
            self.plan.schedule.sources != Tier.DEVICE
        ):
            raise PlanMismatchError(
                "the plan moves checkpoints between tiers, which the executor cannot do yet; "
                "plan for the device alone"
            )

    def _tensors(self) -> list[tuple[object, ...]]:
        owned = self.all_slots.parameters() + self.all_slots.buffers()
        return [(t.shape, t.dtype, t.device, t.stride()) for t in owned]

    def wants_gradient(self, x: Tensor) -> bool:
        """Whether a backward is possible at all."""
        if isinstance(x, Tensor) and x.requires_grad:
            return True
        return any(p.requires_grad for p in self.all_slots.parameters())

    def parameter_name(self, parameter: Tensor) -> str:
        """Name of a parameter of the model; "?" for one that it does not own now."""
        return next((n for n, p in self.model.named_parameters() if p is parameter), "?")

    def check_batch(self, x: object) -> None:
        """Refuse a batch, a mode or a choice of trained parameters that was not planned."""
        signature = self.plan.chain.signature
        assert signature is not None
        if not isinstance(x, Tensor):
            raise PlanMismatchError(f"the model takes one tensor, found a {type(x).__name__}")
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
        if x.device.type == "cpu" and torch.get_num_threads() != signature.threads:
            raise PlanMismatchError(
                f"the plan was measured with {signature.threads} threads, found "
                f"{torch.get_num_threads()}: workspaces depend on them; call "
                f"torch.set_num_threads({signature.threads}), or profile and plan again"
            )
        if x.requires_grad and not signature.input_requires_grad:
            raise PlanMismatchError(
                "the plan is for an input without gradient, found one that requires it; profile "
                "with such a sample, or detach the input"
            )
        mode = training_mode(self.model)
        if mode != signature.training:
            raise PlanMismatchError(
                f"the plan is for mode {signature.training!r}, found {mode!r}; call train() or "
                "eval() as when it was profiled, or plan again (under torch.no_grad any mode runs)"
            )
        autocast = str(Autocast.take(x.device))
        if autocast != signature.autocast:
            raise PlanMismatchError(
                f"the plan is for autocast {signature.autocast}, found {autocast}; run the model "
                "under the same, or profile under this one and plan again"
            )
        found_modules = tuple(self.model.modules())
        if len(found_modules) != len(self.modules) or any(
            now is not then for now, then in zip(found_modules, self.modules, strict=True)
        ):
            raise PlanMismatchError(
                "a module of the model was replaced, added or taken out since it was made to "
                "follow the plan; profile and plan again"
            )
        if self._tensors() != self.tensors:
            raise PlanMismatchError(
                "parameters or buffers have other shapes, dtypes, strides or devices than when the "
                "model was made to follow the plan; profile and plan again"
            )
        if tuple(p.requires_grad for p in self.all_slots.parameters()) != self.trained:
            raise PlanMismatchError(
                "other parameters require gradients than when the model was made to follow the "
                "plan; plan again after freezing or unfreezing"
            )
