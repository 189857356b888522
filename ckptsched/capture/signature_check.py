"""Checks a call, and the settings around it, against the signature of its plan."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from ..base.budget import format_bytes
from ..base.errors import BudgetWarning, PlanMismatchError
from ..recompute.stateful_buffers import unsteady_weight
from ..tensors.devices import several_devices
from ..tensors.pytree import State
from ..tensors.wrapper_tensors import cannot_be_followed
from ..torch_state.replay_context import caching
from ..torch_state.saved_hooks import describe_hooks
from ..torch_state.settings import difference
from ..torch_state.surroundings import Ambient
from ..workload.stage import Signature
from .inspection import Inspection
from .signature import describe_inputs, describe_modes

# They choose the kernels of a convolution's backward when that runs; those of attention's backward
# were chosen in the forward.
_OF_BACKWARDS = ("mkldnn", "cudnn", "cudnn.benchmark", "cudnn.deterministic")


def refuse_tensors(leaves: Sequence[Tensor]) -> None:
    """Raise if a stage cannot be run again on some tensors.

    Args:
        leaves: The tensors of a call's arguments.

    Raises:
        PlanMismatchError: One was made in inference mode, or its storage cannot be followed.
    """
    if any(leaf.is_inference() for leaf in leaves):
        raise PlanMismatchError(
            "the batch was made under torch.inference_mode, so autograd cannot keep it; give a "
            "clone made outside (x.clone())"
        )
    for leaf in leaves:
        reason = cannot_be_followed(leaf, without_data=True)
        if reason:
            raise PlanMismatchError(f"a tensor that the model is called with {reason}")


@final
class Expected:
    """The call, modes and settings that a plan was profiled with, checked before each step."""

    def __init__(self, signature: Signature, peak_bytes: int) -> None:
        """Record what to expect.

        Args:
            signature: Of the model when it was profiled.
            peak_bytes: The projected peak, to be named where it may not hold.
        """
        self._signature, self._peak_bytes = signature, peak_bytes
        # What was found to be right last: it rarely changes.
        self._settings: tuple[object, ...] | None = None
        self._steady_in: list[bool] | None = None
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, object]:
        """All but what this process has found."""
        return {**self.__dict__, "_settings": None, "_steady_in": None, "_told": set()}

    def check_call(self, inputs: State, given: State) -> None:
        """Raise if a call is not like the one that the model was profiled with.

        Args:
            inputs: The model's first argument, taken apart.
            given: Its further arguments, taken apart.

        Raises:
            PlanMismatchError: Structure, shape, dtype, strides, device, number of threads or which
                tensors require a gradient differ.
        """
        for check in (self._check_structure, self._check_device, self._check_threads):
            check(inputs, given)

    def _check_structure(self, inputs: State, given: State) -> None:
        expected = self._signature
        found = describe_inputs(inputs, given)
        if found != expected.inputs:
            then, now = (text or "one tensor" for text in (expected.inputs, found))
            raise PlanMismatchError(
                f"the plan is for a call with {then}; found {now}; call the model so, or "
                "profile and plan for this"
            )
        if not found:
            self._check_tensor(inputs.leaves[0])

    def _check_tensor(self, x: Tensor) -> None:
        """The same for a call with one tensor, with less to say."""
        expected = self._signature
        then = (expected.input_shape, expected.input_dtype, expected.device)
        now = (tuple(x.shape), str(x.dtype), x.device.type)
        if then != now:
            raise PlanMismatchError(
                f"the plan is for a batch of shape {then[0]}, {then[1]} on {then[2]}; "
                f"found {now[0]}, {now[1]} on {now[2]}; give such a batch, or plan for this "
                "one (under torch.no_grad any batch runs)"
            )
        if tuple(x.stride()) != expected.input_stride:
            raise PlanMismatchError(
                f"the plan is for a batch with strides {expected.input_stride}, found "
                f"{tuple(x.stride())}: another memory format takes other bytes; copy the batch "
                "(torch.empty_strided(shape, strides).copy_(x)), or plan for this one"
            )
        if x.requires_grad and not expected.input_requires_grad:
            raise PlanMismatchError(
                "the plan is for an input without gradient, found one that requires it; profile "
                "with such a sample, or detach the input"
            )

    def _check_device(self, inputs: State, given: State) -> None:
        expected = self._signature
        device = inputs.leaves[0].device.type
        if device != expected.device:
            raise PlanMismatchError(
                f"the plan is for inputs on {expected.device}, found {device}; move "
                "them, or profile and plan there"
            )
        where = several_devices(("the batch", leaf) for leaf in (*inputs.leaves, *given.leaves))
        if where:
            raise PlanMismatchError(
                f"the call has tensors on more than one device ({where}), and a plan is for one: "
                "move them there"
            )

    def _check_threads(self, inputs: State, given: State) -> None:
        expected = self._signature
        threads = torch.get_num_threads()
        if inputs.leaves[0].device.type == "cpu" and threads != expected.threads:
            raise PlanMismatchError(
                f"the plan was measured with {expected.threads} threads, found "
                f"{threads}: workspaces depend on them; call "
                f"torch.set_num_threads({expected.threads}), or profile and plan again"
            )

    def check_modes(self, training: Sequence[bool]) -> None:
        """Raise if modules are in another mode (train or eval) than when the model was profiled.

        Args:
            training: For each module whether it trains, in the order of `model.modules()`.

        Raises:
            PlanMismatchError: It does.
        """
        expected = self._signature.training
        mode = describe_modes(training)
        if mode != expected:
            raise PlanMismatchError(
                f"the plan is for mode {expected!r}, found {mode!r}; call "
                f"{'model.eval()' if expected == 'eval' else 'model.train()'} as when it "
                "was profiled, or profile and plan in the mode to train in (under torch.no_grad "
                "any mode runs)"
            )

    def check(self, ambient: Ambient, inspection: Inspection) -> None:
        """Raise if settings change results or bytes; warn once if saved-tensor hooks change bytes.

        Args:
            ambient: What is around the first run of stages.
            inspection: The model.

        Raises:
            PlanMismatchError: Autocast or a setting of torch is not as planned, or
                `parametrize.cached()` is in force and holds a weight that stages would compute
                otherwise.
        """
        expected = self._signature
        if str(ambient.autocast) != expected.autocast:
            raise PlanMismatchError(
                f"the plan is for autocast {expected.autocast}, found {ambient.autocast}; run the "
                "model under the same, or profile under this one and plan again"
            )
        if ambient.settings != self._settings:
            self._check_settings(ambient)
            self._settings = ambient.settings
        if caching():
            self._check_cached(ambient, inspection)
        hooks = describe_hooks(ambient.hooks)
        if hooks != expected.hooks and hooks not in self._told:
            self._told.add(hooks)
            self._tell_of(hooks)
        modes = ambient.costly_modes()
        if modes or expected.modes:
            self._check_modes(modes)

    def check_modes_of_backward(self, ambient: Ambient, forward: Ambient) -> None:
        """Say once where modes are around a backward that were not around when it was measured.

        Args:
            ambient: What is around the backward.
            forward: What was around the forward.
        """
        if forward.counts_flops_of(ambient):
            peak = self._peak_bytes
            self._tell_once(
                "FlopCounterMode is around this forward and its backward, and hangs hooks on the "
                "graph that hold what has been gone back through: the step may take more than the "
                f"projected peak of {peak} bytes ({format_bytes(peak)}); count in a step of its "
                "own, or leave the mode before the backward"
            )
        modes = ambient.costly_modes(in_backward=True)
        if modes:
            self._check_modes(modes, "backward")

    def check_backward(self, ambient: Ambient) -> None:
        """Warn once if other kernels may run in a backward than were measured.

        Args:
            ambient: What is around the backward.
        """
        found = [text for text in ambient.described() if _name(text) in _OF_BACKWARDS]
        known = [text for text in self._signature.settings if _name(text) in _OF_BACKWARDS]
        wrong = difference(known, found)
        if wrong is None or wrong[0] in self._told:
            return
        name, then, now = wrong
        self._told.add(name)
        warnings.warn(
            f"{name} was {then} when the backward was measured and is {now} in this one, with "
            f"which other kernels may run: the step may take more than the projected peak of "
            f"{self._peak_bytes} bytes; call backward under the same, or profile under this",
            BudgetWarning,
            stacklevel=2,
        )

    def _check_settings(self, ambient: Ambient) -> None:
        wrong = difference(self._signature.settings, ambient.described())
        if wrong is not None:
            name, expected, found = wrong
            raise PlanMismatchError(
                f"the plan is for {name}: {expected}, found {found}, with which other kernels may "
                "run; run the model under the same, or profile under this and plan again"
            )

    def _check_cached(self, ambient: Ambient, inspection: Inspection) -> None:
        modes = inspection.training()
        if self._steady_in == modes:
            return
        unsteady = unsteady_weight(inspection.modules, ambient.device)
        if unsteady:
            raise PlanMismatchError(
                f"{unsteady} is another each time it is computed; parametrize.cached() computes it "
                "once, and stages that follow a plan do whenever they read it: call the model "
                "outside of cached()"
            )
        self._steady_in = modes

    def _tell_of(self, hooks: str) -> None:
        then, now = (
            f"packed by {text}" if text else "not packed" for text in (self._signature.hooks, hooks)
        )
        warnings.warn(
            f"what autograd saves was {then} when the model was profiled and is {now}: the step "
            f"may take more than the projected peak of {self._peak_bytes} bytes, by what packing "
            "takes, which only profiling among the same saved-tensor hooks can tell; do so, and "
            "plan again",
            BudgetWarning,
            stacklevel=2,
        )

    def _check_modes(self, found: tuple[str, ...], where: str = "forward") -> None:
        """Say once what modes take that no figure of the plan has."""
        expected, peak = self._signature, self._peak_bytes
        then, now = Counter(expected.modes), Counter(found)
        if expected.mode_bytes and not then.keys().isdisjoint(now):
            more = peak + expected.mode_bytes
            self._tell_once(
                f"this step runs among {_listed(then & now)}, which kept {expected.mode_bytes} "
                "bytes for good of one run of each stage and its backward when the model was "
                f"profiled, and no plan provides for that: {peak} bytes ({format_bytes(peak)}) are "
                f"projected, and {more} ({format_bytes(more)}) or more may be taken; let it keep "
                "no tensors, or leave it off"
            )
        said = f"the step may take more than the projected peak of {peak} bytes"
        if now - then:
            new = _listed(now - then)
            self._tell_once(
                f"this {where} runs among {new}, and profile did not: what a mode computes and "
                f"keeps itself is in no figure of the plan, so {said} ({format_bytes(peak)}); "
                f"profile and plan inside of it (with {new.rpartition('.')[2]}(): ...), or leave "
                "it off"
            )
        if then - now and where == "forward":
            self._tell_once(
                f"profile ran among {_listed(then - now)}, and this forward does not: other "
                f"operations may run than were measured, so {said} ({format_bytes(peak)}); run the "
                "model inside of it, or profile and plan without"
            )

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, BudgetWarning, stacklevel=2)


def _listed(modes: Counter[str]) -> str:
    return " and ".join(modes)


def _name(setting: str) -> str:
    return setting.partition(": ")[0]
