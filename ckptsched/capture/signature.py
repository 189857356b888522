"""Signs a model: a digest and descriptions of all that a plan for it depends on."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from ..base.errors import PlanMismatchError
from ..base.json_files import printable
from ..recompute.fsdp import class_before, is_sharded
from ..recompute.parameter_swap import Slot
from ..tensors.pytree import NO_EXTRAS, State
from ..tensors.wrapper_tensors import is_plain, type_name
from ..torch_state.saved_hooks import describe_hooks
from ..torch_state.surroundings import Ambient
from ..workload.stage import Signature
from .inspection import Inspection, dtype_of
from .stage_discovery import TracedBlock

_DIGITS = "0123"
_INDEX = re.compile(r"\[\d+\]$")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")


def first_by_position(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a call with the first, which the first stage takes, by position.

    Args:
        model: What is called.
        args: By position.
        kwargs: By name.

    Returns:
        The same, or the first taken from those by name as the model's forward names it; as they
        were where it is not among them.
    """
    name = "" if args else _first_parameter(model)
    if not name or name not in kwargs:
        return args, kwargs
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def without_first(model: nn.Module, kwargs: Mapping[str, Any], way: str = "or as {}=...") -> str:
    """What is wrong with a call without the first argument, and what to give.

    Args:
        model: What is called.
        kwargs: What it is called with.
        way: How to give an argument by its name.
    """
    found = f"only {', '.join(map(repr, kwargs))}" if kwargs else "nothing"
    name = _first_parameter(model)
    named = f" {way.format(name)}" if name else ""
    return f"found {found}; give what the first stage takes first, by position{named}"


def _first_parameter(model: nn.Module) -> str:
    """Name of the first argument of a model's forward; empty where it has none."""
    with suppress(TypeError, ValueError):
        for parameter in inspect.signature(model.forward).parameters.values():
            return parameter.name if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else ""
    return ""


def stage_label(block: TracedBlock, name: str) -> str:
    """Name of a stage within its block, equal for all steps of an ODE."""
    inner = name.removeprefix(block.name).removeprefix(".") if block.name else name
    return _INDEX.sub("", inner)


def structure_digest(blocks: Iterable[TracedBlock], computed_in: torch.dtype | None = None) -> str:
    """SHA-256 of the blocks, their stages, how they print, and what tensors they own.

    Args:
        blocks: A model as traced.
        computed_in: As in `dtype_of`.
    """
    described = []
    order: dict[int, int] = {}  # first appearance of each tensor: tells shared ones
    for block in blocks:
        owned = [
            (
                name,
                order.setdefault(id(tensor), len(order)),
                list(tensor.shape),
                tensor.stride(),
                str(dtype_of(tensor, computed_in)),
                tensor.requires_grad,
            )
            for name, tensor in (*block.module.named_parameters(), *block.module.named_buffers())
        ]
        names = (stage_label(block, stage.name) for stage in block.stages)
        labels = [(label, len(list(same))) for label, same in itertools.groupby(names)]
        # What modules print of themselves tells a kernel size or an integrator; an address in it
        # would differ from process to process.
        printed = _ADDRESS.sub("", _printed(block.module))
        described.append((block.name, printed, labels, owned))
    text = json.dumps(described, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _printed(module: nn.Module) -> str:
    """How a module prints, or would print if no part of it were sharded."""
    text = repr(module)
    for part in filter(is_sharded, module.modules()):
        text = re.sub(rf"\b{type(part).__name__}\b", class_before(part).__name__, text)
    return text


def describe_modes(flags: Sequence[bool]) -> str:
    """Which modules train: "train", "eval", or a digest where they differ.

    Args:
        flags: For each module whether it does, in the order of `model.modules()`.
    """
    if all(flags):
        return "train"
    if not any(flags):
        return "eval"
    return "mixed " + hashlib.sha256(bytes(flags)).hexdigest()[:12]


def describe_inputs(inputs: State, given: State) -> str:
    """The structure and layout of a call's arguments; empty for one plain tensor, nothing else.

    Such as "float32[2, 3]; tuple(), dict('mask': bool[3])": the state, then further arguments by
    position and by name.

    Args:
        inputs: The first argument, taken apart.
        given: The further ones, taken apart, as `Extras.apart` gives them.
    """
    if inputs.is_tensor and is_plain(inputs.leaves[0]) and given.tree == NO_EXTRAS.apart().tree:
        return ""
    further = given.describe(_layout).removeprefix("tuple(").removesuffix(")")
    return f"{inputs.describe(_layout)}; {further}"


def _layout(tensor: Tensor) -> str:
    text = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    if not is_plain(tensor):
        text = f"{type_name(tensor)} of {text}" if type_name(tensor) else text
        text += " conjugated" * tensor.is_conj() + " negated" * tensor.is_neg()
    if not tensor.is_contiguous():
        text += f" strides {list(tensor.stride())}"
    if tensor.device.type != "cpu":
        text += f" on {tensor.device.type}"
    return f"{text} with gradient" if tensor.requires_grad else text


def write_carries(carries: Iterable[Sequence[int]]) -> str:
    """Which tensors of each state carry a gradient, as text such as "1x0 9x1 1x11".

    Args:
        carries: For each state, from the input on, a digit up to 3 for each of its tensors.
    """
    words = ("".join(_DIGITS[flag] for flag in flags) for flags in carries)
    return " ".join(f"{len(list(same))}x{word}" for word, same in itertools.groupby(words))


def read_carries(text: str) -> list[tuple[int, ...]]:
    """Read what `write_carries` wrote; equal states share one tuple.

    Raises:
        PlanMismatchError: The text is none of that kind.
    """
    found: list[tuple[int, ...]] = []
    for part in text.split():
        count, _, word = part.partition("x")
        if not count.isdecimal() or not word or set(word) - set(_DIGITS):
            raise PlanMismatchError(
                f"the plan says {part!r} of which states carry a gradient; its file is damaged, "
                "so plan again"
            )
        found += [tuple(map(int, word))] * int(count)
    return found


@final
@dataclass(frozen=True, slots=True)
class StageFacts:
    """Facts about the stages of a chain that a profile finds, and that steps rely on."""

    carries: Sequence[tuple[int, ...]]
    """For each state, from the input on, what each of its tensors carries, one of `Carries`."""
    alone: Sequence[int]
    """For each stage how it runs without a tape, one of `Alone`."""
    own_leaves: Sequence[int]
    """For each stage whether it makes leaves that require gradients."""
    sides: Sequence[int]
    """For each stage whether it has side outputs."""

    def write(self) -> dict[str, str]:
        """The fields of a signature that keep them; empty for flags that no stage has."""
        flags = {"need_tapes": self.alone, "own_leaves": self.own_leaves, "sides": self.sides}
        texts = {n: write_carries((f,) for f in fs) if any(fs) else "" for n, fs in flags.items()}
        return {"carries": write_carries(self.carries), **texts}

    @classmethod
    def read(cls, signature: Signature, stages: int) -> StageFacts:
        """Read what `write` wrote; the flags are bytes.

        Args:
            signature: Of the model.
            stages: How many stages the chain has.

        Raises:
            PlanMismatchError: The signature tells of another number of stages.
        """
        carries = _read("carries", signature.carries or f"{stages + 1}x1", stages + 1)
        alone, own_leaves, sides = (
            bytes([flag for (flag,) in _read(name, text or f"{stages}x0", stages)])
            for name, text in (
                ("need_tapes", signature.need_tapes),
                ("own_leaves", signature.own_leaves),
                ("sides", signature.sides),
            )
        )
        return cls(carries, alone, own_leaves, sides)


def _read(what: str, text: str, count: int) -> list[tuple[int, ...]]:
    found = read_carries(text)
    if len(found) != count:
        raise PlanMismatchError(
            f"the plan's {what!r} tells of {len(found)} states or stages, and its chain has "
            f"{count}: its file is damaged; plan again"
        )
    return found


def sign(
    inspection: Inspection,
    blocks: Iterable[TracedBlock],
    inputs: State,
    given: State,
    facts: StageFacts,
    *,
    hidden: Iterable[Slot] = (),
    frozen: int = 0,
    unfit: str = "",
    foreign: bool = False,
) -> Signature:
    """The signature of a model and one batch.

    Args:
        inspection: The model.
        blocks: Its blocks.
        inputs: Its first argument, taken apart.
        given: Its further arguments, taken apart.
        facts: What the profile has found of its stages.
        hidden: Buffers that stages read and change.
        frozen: How many leading stages are run as one.
        unfit: Why the model cannot follow a plan; empty if it can.
        foreign: Whether stages draw from generators that are not torch's.

    Raises:
        PlanMismatchError: A hidden buffer belongs to a module that is none of the model's.
    """
    x = inputs.leaves[0]
    ambient = Ambient.take(x.device)
    signature = Signature(
        structure=structure_digest(blocks),
        input_shape=tuple(x.shape),
        input_stride=tuple(x.stride()),
        input_dtype=str(x.dtype),
        input_requires_grad=x.requires_grad,
        device=x.device.type,
        threads=torch.get_num_threads(),
        training=describe_modes(inspection.training()),
        autocast=str(ambient.autocast),
        torch_version=str(torch.__version__),
        inputs=describe_inputs(inputs, given),
        hidden=_names(inspection, hidden),
        frozen=frozen,
        unfit=unfit,
        foreign=foreign,
        settings=ambient.described(),
        hooks=describe_hooks(ambient.hooks),
        modes=ambient.costly_modes(),
    )
    return replace(signature, **facts.write())  # type: ignore[arg-type]


def _names(inspection: Inspection, places: Iterable[Slot]) -> tuple[str, ...]:
    """Names of buffers as in the model's `state_dict`, in order."""
    found = set()
    for place in places:
        full = inspection.name_of(place)
        if not full:
            module, name = place
            raise PlanMismatchError(
                f"buffer {name!r} of a {type(module).__name__} is read and changed by a stage, and "
                "belongs to no module of the model; register the module in the model"
            )
        found.add(printable(full))
    return tuple(sorted(found))
