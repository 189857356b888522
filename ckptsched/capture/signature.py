"""What of a model a plan depends on: its blocks, parameters, buffers and modes."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import PlanMismatchError
from ..base.json_files import printable
from ..recompute.fsdp import class_before, is_sharded
from ..recompute.parameter_swap import Place
from ..tensors.pytree import NO_EXTRAS, State
from ..tensors.wrapper_tensors import is_plain, type_name
from ..torch_state.saved_hooks import describe_hooks
from ..torch_state.surroundings import Ambient
from ..workload.stage import Signature
from .stage_discovery import Block

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


def stage_label(block: Block, name: str) -> str:
    """Name of a stage within its block, equal for all steps of an ODE."""
    inner = name.removeprefix(block.name).removeprefix(".") if block.name else name
    return _INDEX.sub("", inner)


def structure_digest(blocks: Iterable[Block], computed_in: torch.dtype | None = None) -> str:
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


def dtype_of(tensor: Tensor, computed_in: torch.dtype | None) -> torch.dtype:
    """The dtype in which stages find a parameter or buffer.

    Args:
        tensor: It, as the model owns it.
        computed_in: What FSDP casts parameters of floating point to when it gathers them; None
            where it leaves them.
    """
    cast = computed_in and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return computed_in if computed_in and cast else tensor.dtype


def _printed(module: nn.Module) -> str:
    """How a module prints, or would print if no part of it were sharded."""
    text = repr(module)
    for part in filter(is_sharded, module.modules()):
        text = re.sub(rf"\b{type(part).__name__}\b", class_before(part).__name__, text)
    return text


def training_mode(model: nn.Module) -> str:
    """Which modules train: "train", "eval", or a digest where they differ."""
    return describe_modes([module.training for module in model.modules()])


def describe_modes(flags: Sequence[bool]) -> str:
    """The same of whether each module trains, in the order of `model.modules()`."""
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
    """What `write_carries` wrote; equal states share one tuple.

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


def sign(
    model: nn.Module,
    blocks: Iterable[Block],
    inputs: State,
    given: State,
    carries: Iterable[Sequence[int]],
    need_tapes: Sequence[int] = (),
    own_leaves: Sequence[bool] = (),
    sides: Sequence[bool] = (),
    hidden: Iterable[Place] = (),
    frozen: int = 0,
) -> Signature:
    """The signature of a model and one batch.

    Args:
        model: The model.
        blocks: Its blocks.
        inputs: Its first argument, taken apart.
        given: Its further arguments, taken apart.
        carries: For each state, from the input on, which of its tensors carry a gradient.
        need_tapes: For each stage how it runs without a tape.
        own_leaves: For each stage whether it makes leaves that require gradients.
        sides: For each stage whether it has side outputs.
        hidden: Places of buffers that stages read and change.
        frozen: How many leading stages are run as one.

    Raises:
        PlanMismatchError: A hidden buffer belongs to a module that is none of the model's.
    """
    x = inputs.leaves[0]
    ambient = Ambient.take(x.device)
    return Signature(
        structure=structure_digest(blocks),
        input_shape=tuple(x.shape),
        input_stride=tuple(x.stride()),
        input_dtype=str(x.dtype),
        input_requires_grad=x.requires_grad,
        device=x.device.type,
        threads=torch.get_num_threads(),
        training=training_mode(model),
        autocast=str(ambient.autocast),
        torch_version=str(torch.__version__),
        inputs=describe_inputs(inputs, given),
        carries=write_carries(carries),
        need_tapes=write_carries((flag,) for flag in need_tapes) if any(need_tapes) else "",
        own_leaves=write_carries((flag,) for flag in own_leaves) if any(own_leaves) else "",
        sides=write_carries((flag,) for flag in sides) if any(sides) else "",
        hidden=_names(model, hidden),
        frozen=frozen,
        settings=ambient.described(),
        hooks=describe_hooks(ambient.hooks),
        modes=ambient.costly_modes(),
    )


def _names(model: nn.Module, places: Iterable[Place]) -> tuple[str, ...]:
    """Names of buffers as in the model's `state_dict`, in order."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = set()
    for module, name in places:
        if id(module) not in paths:
            raise PlanMismatchError(
                f"buffer {name!r} of a {type(module).__name__} is read and changed by a stage, and "
                "belongs to no module of the model; register the module in the model"
            )
        found.add(printable(f"{paths[id(module)]}.{name}".removeprefix(".")))
    return tuple(sorted(found))


def find_places(model: nn.Module, names: Iterable[str]) -> list[Place]:
    """The places that a signature names.

    Args:
        model: The model.
        names: Of buffers, as in its `state_dict`.

    Raises:
        PlanMismatchError: The model has no such buffer.
    """
    wanted = set(names)
    places: dict[str, Place] = {}
    for path, module in model.named_modules() if wanted else ():
        for name in module._buffers:
            full = printable(f"{path}.{name}".removeprefix("."))
            if full in wanted and places.setdefault(full, (module, name)) != (module, name):
                raise PlanMismatchError(
                    f"two buffers of the model are called {full!r} once control characters are "
                    "written as escapes, and one of them is read and changed; give it another name"
                )
    for full in sorted(wanted - places.keys()):
        raise PlanMismatchError(
            f"the plan says that the buffer {full!r} is read and changed, and the model has "
            "none of that name; profile and plan again"
        )
    return [places[full] for full in sorted(wanted)]
