"""What the command line names: models as `module:callable`, inputs as `8x3x32x32`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, final

from ..base.errors import ProfileError

if TYPE_CHECKING:
    import torch
    from torch import nn

_SHAPE = re.compile(r"\d+(x\d+)*")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64")
_WHOLE = ("int32", "bool")  # besides, for inputs without data
_SEED = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """How a model is made and what it is fed, as the command line says it."""

    shape: str | None = None
    """Sizes joined by x, the batch first."""
    dtype: str = "float32"
    """Name of a torch dtype."""
    device: str = "cpu"
    """Where model and input lie."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the callable that makes the model."""


@final
@dataclass(frozen=True, slots=True)
class Target:
    """A model and one batch for it."""

    model: nn.Module
    """The model, on its device."""
    sample: torch.Tensor
    """The batch, on the same device."""


def load_target(target: str, inputs: Inputs) -> Target:
    """Make a model and a batch for it.

    Args:
        target: See `load_model`.
        inputs: How to make them.

    Raises:
        ProfileError: One of them cannot be made.
    """
    model = load_model(target, inputs.arguments)
    if inputs.shape is None:
        raise ProfileError(
            f"the model {target!r} needs an input: give its shape, the batch first, such as "
            "--input 8x3x32x32"
        )
    sample = sample_input(inputs.shape, inputs.dtype, inputs.device)
    return Target(move(model, inputs.device), sample)


def load_model(target: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Find and make a model as servers find applications, from the current folder first.

    Args:
        target: `module:callable`, such as "models.resnet:ode_resnet18"; what it names may
            be a module object already.
        arguments: Keyword arguments of the callable.

    Returns:
        The model; its weights are the same at every call.

    Raises:
        ProfileError: Nothing of that name, or something that gives no `nn.Module`.
    """
    import torch
    from torch import nn

    module_name, separator, path = target.partition(":")
    if not separator or not module_name or not path:
        raise ProfileError(
            f"the model {target!r} is neither a chain file that exists nor module:callable, "
            "such as models.resnet:ode_resnet18"
        )
    found = _find(_import(module_name, target), path, target)
    given = dict(arguments or {})
    if isinstance(found, nn.Module):
        if given:
            raise ProfileError(f"{target!r} is a model already: it takes no arguments ({given})")
        return found
    if not callable(found):
        raise ProfileError(f"{target!r} is a {type(found).__name__}, not a callable")
    call = f"{target}({', '.join(f'{key}={value!r}' for key, value in given.items())})"
    torch.manual_seed(_SEED)  # the same weights for profile, plan and verify
    try:
        model = found(**given)
    except Exception as error:
        raise ProfileError(f"{call} failed: {_cause(error)}") from error
    if not isinstance(model, nn.Module):
        raise ProfileError(
            f"{call} returned {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


def sample_input(shape: str, dtype: str = "float32", device: str = "cpu") -> torch.Tensor:
    """Make an input of a shape: normal numbers, or zeros where they are integers.

    Args:
        shape: Sizes joined by x, such as "8x3x32x32", the batch first.
        dtype: Name of a torch dtype.
        device: Where the input lies.

    Raises:
        ProfileError: A shape, dtype or device that cannot be made.
    """
    import torch

    sizes = _sizes_of(shape)
    if dtype not in _DTYPES:
        raise ProfileError(f"the dtype {dtype!r} is unknown; give one of {', '.join(_DTYPES)}")
    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(_SEED)
    try:
        if not kind.is_floating_point:
            return torch.zeros(sizes, dtype=kind, device=device)
        return torch.randn(sizes, generator=generator).to(device=device, dtype=kind)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ProfileError(f"no input of {shape} on {device!r}: {line}") from error


def load_without_data(target: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Make a model whose tensors lie on the meta device, or one with data where it needs that.

    Args:
        target: See `load_model`.
        arguments: Keyword arguments of the callable.

    Raises:
        ProfileError: It can be made neither way.
    """
    import torch

    try:
        with torch.device("meta"):
            return load_model(target, arguments)
    except ProfileError:  # such as one that reads a number of a tensor while it is made
        return load_model(target, arguments)


def inputs_without_data(texts: Sequence[str]) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """The arguments of a call, by position and by name, on the meta device where they are floating.

    Whole numbers are ones, which a model may look at: a mask of ones leaves nothing out.

    Args:
        texts: Each `[NAME=][DTYPE:]SHAPE`, such as "input_ids=int64:8x2048" or "8x3x32x32".

    Raises:
        ProfileError: None is given, or one cannot be read, or a name comes twice.
    """
    taken: list[torch.Tensor] = []
    named: dict[str, torch.Tensor] = {}
    for text in texts:
        name, separator, rest = text.rpartition("=")
        dtype, _, shape = rest.rpartition(":")
        if separator and (not name.isidentifier() or name in named):
            again = "comes twice" if name in named else "is no name of an argument"
            raise ProfileError(
                f"the input {text!r}: {name!r} {again}; give each once, such as "
                "input_ids=int64:8x2048"
            )
        tensor = _without_data(shape, dtype or "float32")
        if separator:
            named[name] = tensor
        else:
            taken.append(tensor)
    if not texts:
        raise ProfileError(
            "a model needs inputs: give their shapes, the batch first, such as --input 8x3x32x32 "
            "or --input input_ids=int64:8x2048"
        )
    return tuple(taken), named


def _without_data(shape: str, dtype: str) -> torch.Tensor:
    import torch

    sizes = _sizes_of(shape)
    if dtype not in (*_DTYPES, *_WHOLE):
        known = ", ".join((*_DTYPES, *_WHOLE))
        raise ProfileError(f"the dtype {dtype!r} is unknown; give one of {known}")
    kind: torch.dtype = getattr(torch, dtype)
    if kind.is_floating_point:
        return torch.empty(sizes, dtype=kind, device="meta")
    return torch.ones(sizes, dtype=kind)


def _sizes_of(shape: str) -> list[int]:
    if not _SHAPE.fullmatch(shape) or "0" in shape.split("x"):
        raise ProfileError(
            f"the input {shape!r} is not a shape: give sizes of 1 or more joined by x, the "
            "batch first, such as 8x3x32x32"
        )
    return [int(size) for size in shape.split("x")]


def move(model: nn.Module, device: str) -> nn.Module:
    """Move a model to a device.

    Raises:
        ProfileError: There is no such device.
    """
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ProfileError(f"the model cannot be moved to {device!r}: {line}") from error


def _import(name: str, target: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing == name or name.startswith(f"{missing}."):
            raise ProfileError(
                f"the model {target!r} was not found: there is no module {missing!r} in the "
                f"current folder ({folder}) or on Python's path; run from the folder that "
                "holds it, or install it"
            ) from error
        raise ProfileError(
            f"the model {target!r} does not import: {name!r} needs {missing!r}, which is not "
            f"installed; {_cause(error)}"
        ) from error
    except Exception as error:
        raise ProfileError(f"the model {target!r} does not import: {_cause(error)}") from error


def _find(module: ModuleType, path: str, target: str) -> Any:
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            near = difflib.get_close_matches(part, names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else _names(found, names)
            where = getattr(module, "__file__", None) or module.__name__
            raise ProfileError(
                f"the model {target!r} was not found: {where} has no {part!r}; {hint}"
            )
        found = getattr(found, part)
    return found


def _names(owner: Any, names: list[str]) -> str:
    own = [
        name
        for name in names
        if callable(getattr(owner, name)) and not isinstance(getattr(owner, name), ModuleType)
    ]
    return f"it has {', '.join(own[:8])}" if own else "it has nothing that can be called"


def _cause(error: BaseException) -> str:
    """Type, message and place of an error, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({error.filename}, line {error.lineno})"
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {message}{place}"
