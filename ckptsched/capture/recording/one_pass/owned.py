"""What of its own a model keeps, and where: parameters, buffers, and tensors in attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..calls import Place, is_plain_object, tensors_inside

OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def places_of(model: nn.Module) -> dict[int, Place]:
    """Where a model keeps its tensors, by identity; of several places the first.

    Args:
        model: The model.
    """
    found: dict[int, Place] = {}
    for kind in ("_parameters", "_buffers", ""):
        for path, module in model.named_modules():
            held = getattr(module, kind) if kind else vars(module)
            for name, tensor in held.items():
                if isinstance(tensor, Tensor):
                    found.setdefault(id(tensor), Place(path, kind, name))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in OF_EVERY_MODULE:
                for steps, tensor in tensors_inside(value):
                    found.setdefault(id(tensor), Place(path, "", name, steps))
    return found


def attributes_in(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The attributes of modules, and of plain objects that are attributes of them.

    Args:
        model: The model.
    """
    for module in model.modules():
        yield vars(module)
        yield from (vars(value) for value in vars(module).values() if is_plain_object(value))


def own_tensors(module: nn.Module, path: str) -> Iterator[tuple[tuple[str, str], Tensor | None]]:
    """The parameters and buffers below a module, each with the path of its owner and its name.

    Args:
        module: The module.
        path: Its own path.
    """
    for owner, part in module.named_modules(prefix=path):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(part, kind).items():
                yield (owner, name), tensor
