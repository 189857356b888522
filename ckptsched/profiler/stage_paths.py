"""Finds other paths of a stage, which it takes on other data or other random draws.

A stage that reads values of tensors (`item`, a mask as an index, `nonzero`) may compute something
else on the next batch, or on the next draw, and take other bytes. Such a stage is found by the
operations that it runs, and run with other draws and on other inputs of the same layout. Steps of
one module that the clock alone tells apart are looked at, too, at a few of their times.

What attributes of a module decide, and what no input here brings out, is not seen: that is left to
the look at tapes while the model trains (`Overruns`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.errors import CkptschedError
from ..capture.stage_discovery import ModuleStage, StageCall
from ..capture.wrappers import is_compiled
from ..memory.meters import storage_bytes
from ..recompute.parameter_swap import Slots
from ..recompute.side_outputs import Look, cut_all
from ..recompute.stateful_buffers import BufferWatch, every_generator, is_write_only
from ..recompute.tape import Carries, Tape, record
from ..tensors.pytree import Extras, State, copied, storages
from ..tensors.wrapper_tensors import is_plain
from ..torch_state.foreign_generators import foreign_generators
from ..torch_state.replay_context import AnyGenerator, RandomState, uncompiled
from .side_output_search import find_side_outputs
from .stage_kind import (
    StageKind,
    Standing,
    gradients_of_sides,
    held_of_input,
    layout,
    leave_sides,
)

_DRAWS = 16  # a layer that is kept one time in six is kept in one of them, 19 times in 20
_POSITIONS = 4
_MOST_PATHS = 8  # that are weighed
_PATIENCE, _LEAST_PATIENCE = 50, 10_000  # operations of a run: times those of the first, and any

# Operations whose output, or what they take, hangs on values, and which torch has no tag for.
_BY_NAME = frozenset({"aten::_pack_padded_sequence", "aten::linalg_matrix_exp"})
# With a mask as an index, what is chosen hangs on values.
_WITH_INDICES = frozenset(
    {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
)
_LEAVES_TORCH = frozenset({"tolist", "numpy", "__array__", "__dlpack__"})


class _EnoughError(CkptschedError):
    """A run has too many operations."""


@final
class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and notes whether one reads values of tensors."""

    def __init__(self, most: float = float("inf")) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read, self.count, self.most = False, 0, most

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Have torch not import its compiler for this mode, which takes seconds: see `uncompiled`.

        Where torch does not ask, it imports the compiler and nothing else changes.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count > self.most:
            raise _EnoughError(f"a stage has run {self.count} operations on another input")
        self.read = self.read or _reads(func, args)
        return func(*args, **(kwargs or {}))


@final
class _Functions(TorchFunctionMode):
    """Notes whether values leave torch for Python, which may decide by them."""

    def __init__(self) -> None:
        super().__init__()
        self.read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read = self.read or getattr(func, "__name__", "") in _LEAVES_TORCH
        return func(*args, **(kwargs or {}))


def _reads(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation hands values to Python, or its output has a shape that they decide."""
    name = func.name().partition(".")[0]
    if name in _WITH_INDICES:
        masks = (torch.bool, torch.uint8)
        return any(isinstance(k, Tensor) and k.dtype in masks for k in args[1])
    tags = func.tags
    return (
        torch.Tag.data_dependent_output in tags
        or torch.Tag.dynamic_output_shape in tags
        or name in _BY_NAME
    )


@final
@dataclass(frozen=True, slots=True)
class Path:
    """Layout and bytes of one path of a stage; equal for runs that take the same path."""

    output: tuple[Any, ...]
    """Layout of the output."""
    sources: tuple[int, ...]
    """For each tensor of the output which of the input's storages it lies in; -1 for none."""
    saved: frozenset[int]
    """Storages of the input that the tape keeps, by number, and -1 - k for the output's."""
    sides: tuple[Any, ...]
    """Layout of what it leaves by another way."""
    output_bytes: int
    side_bytes: int
    saved_bytes: int
    largest_bytes: int
    nodes: int

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Larger for what is likely to take more."""
        return self.output_bytes, self.side_bytes, self.saved_bytes, self.nodes


@final
class Variations:
    """Finds the paths of kinds of stages while a model is surveyed."""

    def __init__(self, *, grow: bool = True) -> None:
        """Begin.

        Args:
            grow: Whether the stages after one are to be given the largest output that it has
                shown, where its outputs differ in layout; else what it made of the sample.
        """
        self.grow = grow
        self.grown = False
        """Whether any stage was given another layout than the sample leads to."""

    def __call__(self, kind: StageKind, calls: Sequence[StageCall]) -> None:
        """Find the paths of a kind; it becomes the one that takes the most.

        Args:
            kind: The kind, just examined.
            calls: The stages that run this computation, in order.
        """
        device = kind.x.leaves[0].device
        own = every_generator(kind.call.module.modules(), kind.extras.apart().constants())
        watch = BufferWatch(Slots([kind.call.module]))
        before = RandomState.take(device, own)

        def again() -> None:
            before.restore()
            watch.put_back(kind.hidden)

        try:
            reads, count = _reads_values(kind)
            kind.varies = reads or kind.foreign  # what Python draws it may decide by, unseen
            again()
            apart = [] if isinstance(kind.call, ModuleStage) else _spread(calls[1:])
            candidates: Iterable[StageKind] = (replace(kind, call=call) for call in apart)
            if kind.varies:
                candidates = itertools.chain(candidates, _candidates(kind, own))
            elif not apart:
                return
            paths = _Paths(kind, before, again, max(_LEAST_PATIENCE, _PATIENCE * count))
            for candidate in candidates:
                paths.look(candidate)
                changed = [place for place in watch.changed() if not is_write_only(place)]
                kind.hidden = tuple(dict.fromkeys((*kind.hidden, *changed)))
            kind.draws, kind.foreign = paths.draws, paths.foreign
            if paths.looks:
                paths.let_look(kind)
            if len(paths.found) > 1:
                self._take(kind, paths, again)
        finally:
            again()
            if kind.looks:  # they are another run's now
                leave_sides(kind)
                again()

    def _take(self, kind: StageKind, paths: _Paths, again: Callable[[], None]) -> None:
        """Let a kind be the path that takes the most, and have the others beside it."""
        largest, *others = paths.chosen()
        sample = paths.sample
        for path in (largest, *others):
            again()
            path.begin()
            path.output = path.run()
        handed = kind.output
        if layout(handed.leaves) != layout(largest.output.leaves):
            if self.grow:
                handed, self.grown = largest.output, True
            else:  # states are as the sample has them
                others = [path for path in (largest, *others) if path is not sample]
                largest, handed = sample, sample.output
        kind.call, kind.x, kind.extras = largest.call, largest.x, largest.extras
        kind.standing, kind.begins_with = largest.standing, largest.begins_with
        kind.output, kind.hands_on, kind.others = largest.output, handed, others
        kind.sides, kind.left_bytes = largest.sides, largest.left_bytes
        kind.carries = tuple(paths.carries)
        for other in others:
            other.carries = kind.carries


@final
class _Paths:
    """The paths of a stage that have been seen, and a run that takes each."""

    def __init__(
        self, kind: StageKind, begins_with: RandomState, again: Callable[[], None], most: float
    ) -> None:
        """Begin with what the stage makes of the sample.

        Args:
            kind: The stage.
            begins_with: The random state as the sample found it.
            again: Puts that back, and hidden buffers.
            most: After how many operations a run is given up.
        """
        self.sample = replace(kind, begins_with=begins_with)
        self.found: dict[Path, StageKind] = {}
        self.carries = list(kind.carries)
        self.draws, self.foreign = kind.draws, kind.foreign
        self.looks = self._looked = kind.looks
        self._piles_up = kind.piles_up
        self._again, self._most = again, most
        self.look(self.sample)

    def look(self, kind: StageKind) -> None:
        """Run a stage, and keep it if its path is new and may take the most."""
        if kind.varies and not self.looks and self._leaves(kind):
            self._discover(kind)
        kind.looks = self.looks
        try:
            tape, output, left = self._run(kind)
        except Exception:  # what a stage refuses is no path of it
            return
        if len(output.leaves) != len(self.carries):
            return  # a step refuses it by name
        if left and not self._looked:
            kind.left_bytes += held_of_input(kind.x, left)
        kind.sides = gradients_of_sides(left)
        self.carries = [_either(a, b) for a, b in zip(self.carries, tape.carries, strict=True)]
        self.found.setdefault(path_of(kind, tape, output), kind)
        if len(self.found) > _MOST_PATHS:
            wanted = {*_most(self.found)}
            self.found = {
                path: kept
                for path, kept in self.found.items()
                if path in wanted or kept is self.sample
            }

    def _begin(self, kind: StageKind) -> None:
        self._again()
        kind.begin()

    def _run(self, kind: StageKind) -> tuple[Tape, State, list[Tensor]]:
        self._begin(kind)
        device = kind.x.leaves[0].device
        foreign = foreign_generators(kind.call.module.modules())
        before = RandomState.take(device, foreign)
        with nullcontext() if _holds_compiled(kind) else _Operations(self._most):
            found = kind.recorded(kind.x)
        after = RandomState.take(device, foreign)
        self.draws = self.draws or before != after
        self.foreign = self.foreign or before.foreign != after.foreign
        return found

    def _leaves(self, kind: StageKind) -> bool:
        """Whether a run leaves something besides its output, as that of the sample has not."""
        self._begin(kind)
        look = Look()
        try:
            with nullcontext() if _holds_compiled(kind) else _Operations(self._most):
                tape, _ = record(
                    kind.call, kind.x, wanted=kind.wanted, extras=kind.extras, look=look
                )
        except Exception:  # of the stage's, or torch.func allows no hooks of what is saved
            return False
        lives = tape.watch()
        del tape
        return bool(cut_all(look.take())) or lives() is not None

    def _discover(self, kind: StageKind) -> None:
        """Look closer at it.

        Raises:
            ProfileError: A plan cannot follow it.
        """
        found = find_side_outputs(
            kind.call.title,
            kind.call,
            kind.x,
            wanted=kind.wanted,
            extras=kind.extras,
            aliases=kind.aliases,
            module=kind.call.module,
            again=partial(self._begin, kind),
        )
        for tensor in found.tensors:
            tensor.requires_grad_(False)
        self.looks, self._piles_up = bool(found.tensors), found.piles_up

    def let_look(self, kind: StageKind) -> None:
        """Have all runs of a stage look for what some paths leave.

        Args:
            kind: The stage, whose paths have been looked at.
        """
        for path in (kind, *self.found.values()):
            path.looks, path.piles_up = True, self._piles_up
        kind.begins_with = self.sample.begins_with  # how many it leaves hangs on its draws

    def chosen(self) -> list[StageKind]:
        """The largest of the paths, then others that may take the most in some respect."""
        return [self.found[path] for path in _most(self.found)]


def _holds_compiled(kind: StageKind) -> bool:
    """Whether modules of a stage are compiled: a mode would have them compiled anew."""
    return any(
        is_compiled(module) or hasattr(module, "_orig_mod") for module in kind.call.module.modules()
    )


def _reads_values(kind: StageKind) -> tuple[bool, int]:
    """Whether a stage reads values, and how many operations a run of it has."""
    operations, functions = _Operations(), _Functions()
    with torch.no_grad(), uncompiled(), functions, operations:
        try:
            kind.run()
        except Exception:  # not every extension runs among modes: nothing is known then
            return False, 0
    return operations.read or functions.read, operations.count


def _either(one: Carries, other: Carries) -> Carries:
    """What a tensor is taken to carry if it carries different things on two paths."""
    if one is other or not (one and other):
        return max(one, other)
    return Carries.GRAPH


def path_of(kind: StageKind, tape: Tape, output: State) -> Path:
    """The path that a run has taken.

    Args:
        kind: The stage; the bytes that a walk of the tape finds are noted in it.
        tape: Of the run.
        output: What it has made.
    """
    kind.note_contents(tape, output)
    (contents,) = tape.contents()
    inputs, outputs = [*storages(kind.x.leaves)], [*storages(output.leaves)]
    kept = {k for k, home in enumerate(inputs) if home in contents.saved}
    kept |= {-1 - k for k, home in enumerate(outputs) if home in contents.saved}
    return Path(
        output=layout(output.leaves),
        sources=tuple([inputs.index(h) if h in inputs else -1 for h in outputs]),
        saved=frozenset(kept),
        sides=layout(kind.sides),
        output_bytes=storage_bytes(output.leaves),
        side_bytes=storage_bytes(kind.sides),
        saved_bytes=kind.saved_bytes + kind.used_bytes,
        largest_bytes=kind.largest_bytes,
        nodes=contents.nodes,
    )


def _most(found: dict[Path, StageKind]) -> list[Path]:
    """The largest path, and of the others those that may take the most in some respect."""
    paths = sorted(found, key=lambda path: path.size, reverse=True)
    alike: dict[Any, Path] = {}
    for path in paths:  # the largest of each way to hand storages on
        alike.setdefault((path.sources, path.saved, path.sides), path)
    by_nodes = sorted(paths, key=lambda path: path.nodes)
    by_saved = sorted(paths, key=lambda path: path.saved_bytes, reverse=True)
    by_largest = sorted(paths, key=lambda path: path.largest_bytes, reverse=True)
    wanted = [paths[0], by_saved[0], by_largest[0], by_nodes[-1], by_nodes[0]]
    wanted += [*alike.values(), *by_largest, *by_saved]
    return list(dict.fromkeys(wanted))[:_MOST_PATHS]


def _spread(calls: Sequence[StageCall]) -> list[StageCall]:
    """Some of the calls, the last among them."""
    count = min(_POSITIONS, len(calls))
    return [calls[(k + 1) * len(calls) // count - 1] for k in range(count)]


def _candidates(kind: StageKind, own: Sequence[AnyGenerator]) -> Iterator[StageKind]:
    """The stage with other draws, and on other inputs."""
    device = kind.x.leaves[0].device
    states = _seeded(device, own)
    if kind.draws:
        for _ in range(_DRAWS):
            yield replace(kind, begins_with=next(states))
    given = kind.extras.apart()
    for way in _WAYS:
        random = next(states)
        x = _changed(kind.x, way, kind.standing)
        others = _changed(given, way, None)
        fixed = kind.standing.fixed | storages(others.leaves).keys()
        yield replace(
            kind,
            x=x,
            extras=Extras.of(others) if given.leaves else kind.extras,
            standing=replace(kind.standing, fixed=frozenset(fixed)),
            begins_with=random,
        )


def _seeded(device: torch.device, own: Sequence[AnyGenerator]) -> Iterator[RandomState]:
    """Random states, the same ones each time."""
    seed = 0
    while True:
        seed += 1
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        for generator in own:
            generator.manual_seed(seed)
        yield RandomState.take(device, own)


@torch.no_grad()
def _changed(state: State, way: Callable[[Tensor], Tensor], standing: Standing | None) -> State:
    """The same layout with other values; what is fixed, or wants a gradient of its own, stays."""
    mine = [tensor for tensor in state.leaves if tensor.requires_grad]
    fixed = set(standing.fixed) if standing else set(storages(mine))
    made = copied(state, fixed)
    leaves = []
    for leaf, old in zip(made.leaves, state.leaves, strict=True):
        if not is_plain(old):
            leaves.append(leaf)
            continue
        if old.untyped_storage()._cdata in fixed:
            leaves.append(old)
            continue
        if leaf.numel():
            with suppress(RuntimeError):  # elements that share memory, dtypes that know no mean
                leaf.copy_(way(old))
        leaves.append(leaf)
    return made.replaced(leaves)


# ---- other inputs: values that such tensors have, in other places or of another size


def _noise(x: Tensor) -> Tensor:
    """Of the same mean and spread; integers between the least and the largest."""
    if x.dtype == torch.bool:
        return torch.rand(x.shape, device=x.device) < 0.5
    if not (x.is_floating_point() or x.is_complex()):
        low, high = int(x.min()), int(x.max())
        return torch.randint(low, high + 1, x.shape, device=x.device)
    spread = x.std() if x.numel() > 1 else x.abs()
    return x.mean() + spread * torch.randn_like(x)


def _negated(x: Tensor) -> Tensor:
    return ~x if x.dtype == torch.bool else -x if x.is_floating_point() else x.flip(0)


def _scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor if x.is_floating_point() or x.is_complex() else x


def _reversed(x: Tensor) -> Tensor:
    return x.flip(0) if x.dim() else x


def _one_row(row: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[row].expand(x.shape) if x.dim() else x


def _highest(x: Tensor) -> Tensor:
    """Everything as the largest value is: all true, all of the last class."""
    return torch.full_like(x, x.max().item()) if not x.is_complex() else x


def _lowest(x: Tensor) -> Tensor:
    return torch.full_like(x, x.min().item()) if not x.is_complex() else x


def _all_true(x: Tensor) -> Tensor:
    """Masks without gaps; what else there is as it is."""
    is_mask = x.dtype == torch.bool or bool(((x == 0) | (x == 1)).all())
    return torch.ones_like(x) if is_mask else x


def _all_false(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.dtype == torch.bool else x


_WAYS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(_noise, _noise, _negated, _reversed, _one_row(0), _one_row(-1)),
    *(_scaled(4.0), _scaled(0.25), _highest, _lowest, _all_true, _all_false),
)
