"""Finds side outputs: tensors with a graph that a stage leaves besides its output.

A stage runs with a tape, which is then let go. What is alive of its graph after that somebody
else holds: side outputs, which a plan can follow, or what it cannot.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from ..base.errors import ProfileError
from ..recompute.side_outputs import Look, cut_all
from ..recompute.tape import record
from ..tensors.pytree import Extras, State
from ..tensors.weak import referent
from ..torch_state.torch_modes import module_tracker_at_work

_PATIENCE = 5  # milliseconds


@final
@dataclass(frozen=True, slots=True)
class Found:
    """The side outputs of a stage."""

    tensors: tuple[Tensor, ...] = ()
    """Those of one run, made leaves that want gradients."""
    piles_up: bool = False
    """Whether those of one run are still there after the next."""


def find_side_outputs(
    name: str,
    stage: Callable[..., Any],
    x: State,
    *,
    wanted: Sequence[int],
    extras: Extras,
    aliases: Iterable[Tensor],
    module: nn.Module,
    again: Callable[[], object],
    keeps: bool = True,
) -> Found:
    """Run a stage with its tape, and find its side outputs.

    Args:
        name: Of the stage, for messages.
        stage: The stage, its parameters replaced by aliases.
        x: Its input, without a graph.
        wanted: As for `sources_of`.
        extras: What else every stage is given.
        aliases: Those of its parameters, and what else collects gradients.
        module: The module that the stage runs.
        keeps: As for `tape.run_under`; without, what is found can be refused only.
        again: Called before each run, to let it take the same path.

    Raises:
        ProfileError: It leaves a graph that cannot be found again when it runs again, or keeps one
            alive by a reference cycle.
    """
    aliases = list(aliases)

    def look() -> list[Tensor]:
        look = Look()
        again()
        with _all_young():
            tape, _ = record(stage, x, wanted=wanted, extras=extras, look=look, keeps=keeps)
            lives = tape.watch()
            del tape
            found = look.take()
            if found and _only_by_cycle(found):
                _refuse_cycle(name)
        tensors = cut_all(found)
        found.clear()
        _check_gone(name, lives, aliases, module)
        # A later run that reads one shows it: it is a leaf of that run's tape.
        return [tensor.requires_grad_() for tensor in tensors]

    first = [weakref.ref(tensor) for tensor in look()]
    if not first:
        return Found()
    second = look()
    piled = [tensor.requires_grad_(False) for r in first if (tensor := referent(r)) is not None]
    return Found(tuple(second), bool(piled))


@contextmanager
def _all_young() -> Iterator[None]:
    """Keep new objects in Python's youngest generation, which is quickly collected."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _only_by_cycle(found: dict[int, Tensor]) -> bool:
    """Whether nobody holds what was found but a cycle that is to be collected."""
    references = {k: weakref.ref(tensor) for k, tensor in found.items()}
    count = len(found)
    found.clear()
    gc.collect(0)
    found |= {k: t for k, reference in references.items() if (t := referent(reference)) is not None}
    return len(found) < count


def _check_gone(
    name: str, lives: Callable[[], object], aliases: Iterable[Tensor], module: nn.Module
) -> None:
    """Raise if something that was not found holds the graph of a stage."""
    if not _is_held(lives, aliases) or module_tracker_at_work():
        return
    gc.collect()
    if not _is_held(lives, aliases):
        _refuse_cycle(name)
    places = ", ".join(whereabouts(module)) or "a list, a closure or a hook"
    raise ProfileError(
        f"stage {name!r} leaves a tensor with a graph by another way than its output ({places}), "
        "and ckptsched cannot find it again when the stage runs again: it comes straight from "
        "compiled code, or is one of its parameters; leave what an operation of torch makes of it "
        "(tensor.clone()), or return it"
    )


def _is_held(lives: Callable[[], object], aliases: Iterable[Tensor]) -> bool:
    return lives() is not None or any(is_in_a_graph(alias) for alias in aliases)


def still(holds: Callable[[], bool]) -> bool:
    """Whether something still holds after threads and the collector of cycles have finished.

    Args:
        holds: Whether it does now.
    """
    for _ in range(_PATIENCE):  # a thread of the engine lets go of its last node a moment later
        if not holds():
            return False
        time.sleep(0.001)
    gc.collect()
    return holds()


def is_in_a_graph(leaf: Tensor) -> bool:
    """Whether a graph that is alive leads to a leaf; False where torch does not tell."""
    count = getattr(leaf, "_use_count", None)
    return count is not None and count() > 1


def _refuse_cycle(name: str) -> None:
    raise ProfileError(
        f"stage {name!r} keeps the tape of each of its runs alive by a reference cycle, so its "
        "bytes are there until Python's collector comes by; a torch.autograd.Function that sets "
        "its own output on ctx does so (ctx.y = y): use ctx.save_for_backward(y)"
    )


def rewritten_weights(module: nn.Module) -> set[int]:
    """Ids of the weights that torch's own hooks make before each run, and leave as attributes.

    Those of `spectral_norm` and `weight_norm` of old, and of pruning: no loss is expected of them.

    Args:
        module: The module that a stage runs.
    """
    return {
        id(value)
        for part in module.modules()
        for name, value in vars(part).items()
        if isinstance(value, Tensor)
        and not {f"{name}_orig", f"{name}_v"}.isdisjoint(part._parameters)
    }


def whereabouts(module: nn.Module) -> Iterator[str]:
    """The attributes of a module in which tensors with a graph are."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield f"attribute {f'{path}.{name}'.removeprefix('.')!r}"
