"""How a module becomes a chain of stages, without running anything.

An `Outline` reads the structure of a model, once: an `nn.Sequential` is flattened, a
`StagedModule` says itself what its stages are, and any other module is one stage. `trace` makes
stages of it, in a tuple of blocks; a block is what the outer autograd graph sees as one node, a
stage is what a schedule runs as a whole.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard, final

from torch import Tensor, nn

from ..base.errors import ProfileError
from ..recompute.fsdp import has_hooks
from .wrappers import class_name, forward_attribute, is_compiled

# Modules that may hand their input on as it is, or as a view: what changes their output in
# place changes their input, too.
_MAY_RETURN_A_VIEW = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

_MOST_NAMED = 6  # parts of a fused stage that its name tells one by one


class StageCall(abc.ABC):
    """One stage as a callable object: a link of the chain that is always run whole.

    A stage can be pickled and deep-copied together with its model, so it holds modules and
    never a closure. Subclasses keep `__slots__`: a chain may have 100,000 of them.

    Attributes:
        prefix: Path of the module that owns the stage, as in the model's `state_dict`;
            empty for the model itself. `trace` sets it.
        module: The module whose parameters and buffers the stage uses.
    """

    __slots__ = ("prefix",)

    prefix: str
    module: nn.Module

    @property
    def lean(self) -> StageCall | None:
        """The same stage with a lean tape, which keeps fewer bytes and makes cheap values again.

        None where it offers none.
        """
        return None

    @property
    def made_again(self) -> tuple[int, ...]:
        """Of one with a lean tape, the calls that the last tape is to make again, from 0 on."""
        return ()

    def names_of(self, calls: Sequence[int]) -> tuple[str, ...]:
        """What people call some of its calls, each once.

        Args:
            calls: Which, counted from 0 in this stage.
        """
        return ()

    @property
    def once(self) -> bool:
        """Whether it is to run once in a step, so that its tape is kept until its backward."""
        return False

    @abc.abstractmethod
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the next state from this one.

        Args:
            x: The state that the stage before handed on: a tensor, or tuples, lists, dicts and
                dataclasses of tensors, numbers and the like.
            args: What the model was called with besides, the same for every stage.
            kwargs: The same by name.
        """

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """Name within the owner, such as "step[7]"; empty where the stage is all of it."""

    @property
    @abc.abstractmethod
    def key(self) -> Hashable:
        """Equal for stages that compute the same up to values: they cost the same.

        Made from the identity of the module, so it holds within one process, while the
        stage lives.
        """

    def likeness(self) -> Hashable:
        """Equal for stages that do the same with tensors of their own: they are measured once.

        Unlike equal keys, it does not merge their parameters. It is asked for while the stage is
        measured.

        Returns:
            None where it cannot be told.
        """
        return None

    @property
    def name(self) -> str:
        """Path in the whole model, such as "2.step[7]"."""
        return ".".join(part for part in (self.prefix, self.label) if part)

    @property
    def title(self) -> str:
        """The same, or the class of the model where the stage is all of it."""
        return self.name or class_name(self.module)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


@final
class ModuleStage(StageCall):
    """A stage that runs one module."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module, prefix: str = "") -> None:
        """Wrap a module.

        Args:
            module: Called with the state; returns the next one.
            prefix: Its path in the model.
        """
        self.prefix = prefix
        self.module = module

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module, its hooks included."""
        return self.module(x, *args, **kwargs)

    @property
    def label(self) -> str:
        """Empty: the stage is the whole module."""
        return ""

    @property
    def key(self) -> Hashable:
        """Equal for every use of the same module."""
        return ("module", id(self.module))


@final
class FusedStage(StageCall):
    """Consecutive stages that must be run as one: no state between them may be kept."""

    __slots__ = ("module", "stages")

    def __init__(self, stages: Sequence[StageCall]) -> None:
        """Join stages; those that are fused already are taken apart first.

        Args:
            stages: Two or more, in the order in which they run, with their prefixes set.
        """
        self.stages: tuple[StageCall, ...] = tuple(
            inner
            for stage in stages
            for inner in (stage.stages if isinstance(stage, FusedStage) else (stage,))
        )
        self.module = _joined([stage.module for stage in self.stages])
        self.prefix = ""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the joined stages in order."""
        for stage in self.stages:
            x = stage(x, *args, **kwargs)
        return x

    @property
    def once(self) -> bool:
        """Whether a part is to run once."""
        return any(stage.once for stage in self.stages)

    @property
    def label(self) -> str:
        """The paths of all parts, such as "0+1"; of many, the first and the last."""
        names = [stage.name for stage in self.stages]
        return "+".join(names if len(names) <= _MOST_NAMED else (names[0], "...", names[-1]))

    @property
    def key(self) -> Hashable:
        """Equal where all parts are, in the same order."""
        return ("fused", *(stage.key for stage in self.stages))


class StagedModule(nn.Module, abc.ABC):
    """A module that is itself a sequence of stages, such as an ODE block of many steps."""

    @abc.abstractmethod
    def stages(self) -> list[StageCall]:
        """List the stages in the order in which they run.

        Returns:
            New objects at every call, since `trace` writes a prefix into each; at least one.
        """

    def stages_follow_from(self) -> Hashable:
        """A key of the list of stages: a plan is refused once it has changed.

        Asked at every step; override it where it is slow to list the stages, or where the same
        number of them may be others.

        Returns:
            The number of stages; from an override anything that is equal for equal lists.
        """
        return len(self.stages())

    def sent_ahead(self, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
        """Tensors that left the stages otherwise than by the state, in a run as one graph.

        Asked after such a run alone, when gradients are to be differentiated again.

        Args:
            args: What every stage was given besides.
            kwargs: The same by name.

        Returns:
            Tensors in that graph, each with its gradient; none unless a module sends some.
        """
        return []

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the stages in order; what overrides this must compute the same.

        Args:
            x: The state that enters the first stage.
            args: What every stage is given besides; its gradient is the sum over all stages.
            kwargs: The same by name.
        """
        for stage in self.stages():
            x = stage(x, *args, **kwargs)
        return x


@final
@dataclass(frozen=True, slots=True)
class TracedBlock:
    """Consecutive stages that autograd sees as one node."""

    name: str
    """Path in the model, as in its `state_dict`; empty where the block is the whole model."""
    module: nn.Module
    """Holds all parameters and buffers that the stages use."""
    stages: tuple[StageCall, ...]
    """At least one, in the order in which they run."""


class Part(NamedTuple):
    """A module that is run as a whole, or lists its stages."""

    module: nn.Module
    path: str
    """In the model, as in its `state_dict`."""
    lists_stages: bool


@final
@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """What a model's stages are made from, found by one look at its structure."""

    name: str
    """Class of the model."""
    children: tuple[tuple[str, nn.Module], ...]
    """Path and module of each block: the model itself where it is one block."""
    parts: tuple[tuple[Part, ...], ...]
    """Of each block what is run in it, in order."""
    containers: tuple[nn.Module, ...]
    """The modules whose parts are stages, so that they are not run as a whole."""

    @classmethod
    def of(cls, model: nn.Module) -> Outline:
        """Look at a model, without running it.

        Args:
            model: Any module.
        """
        containers = list[nn.Module]()
        children: tuple[tuple[str, nn.Module], ...] = (("", model),)
        if _can_flatten(model):
            children = tuple(_children(model, ""))
            containers += [model] if len(model) else []
        parts = tuple([tuple(_parts(child, path, containers)) for path, child in children])
        return cls(type(model).__name__, children, parts, tuple(containers))


def trace(outline: Outline, *, frozen: int = 0) -> tuple[TracedBlock, ...]:
    """Cut a model into blocks of stages, without running it.

    Each child of an `nn.Sequential` is a block. A child that is an `nn.Sequential` in turn is
    flattened, to any depth, into several stages of that block; a `StagedModule` contributes
    its own stages; any other module is one stage. A model that is not an `nn.Sequential` is
    one block.

    Two things keep modules whole. A container with hooks of its own is one stage, because
    running its parts would skip them. A module with `inplace=True` is fused with the stage
    before it, also across the border of two blocks, because it would change a kept state; the
    first stage of all stays as it is and changes the caller's input, as it does without us.

    Args:
        outline: Of any module that maps a tensor to a tensor.
        frozen: How many leading stages to run as one, as `count_frozen` counts them: with no
            gradient to come back, there is no state between them to keep.

    Returns:
        The blocks in the order in which they run.

    Raises:
        ProfileError: There is no stage to run.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
        >>> [[stage.name for stage in block.stages] for block in trace(Outline.of(model))]
        [['0'], ['1.0', '1.1']]
    """
    if not outline.children:
        raise ProfileError(
            f"{outline.name} has no modules in it, so there is nothing to run; "
            "give an nn.Sequential of at least one module, a StagedModule or any other module"
        )
    owned = [
        (index, stage)
        for index, parts in enumerate(outline.parts)
        for part in parts
        for stage in _stages(part)
    ]
    fused = _fuse_in_place(owned)
    if frozen > 1:
        fused[:frozen] = [(fused[0][0], FusedStage([stage for _, stage in fused[:frozen]]))]
    return tuple(_blocks(outline.children, fused))


def count_frozen(blocks: Iterable[TracedBlock], leaves: Iterable[Tensor]) -> int:
    """How many leading stages need no gradient, and so can be run as one.

    Args:
        blocks: A model as traced.
        leaves: The tensors of the input, and of what every stage is given.

    Returns:
        Their number; 0 where there are fewer than two of them, or nothing else.
    """
    if any(leaf.requires_grad for leaf in leaves):
        return 0
    known: dict[int, bool] = {}
    stages = (stage for block in blocks for stage in block.stages)
    for count, stage in enumerate(stages):
        key = id(stage.module)
        if key not in known:
            known[key] = any(p.requires_grad for p in stage.module.parameters())
        if known[key]:
            return count if count > 1 else 0
    return 0


def _can_flatten(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether running the children in order is all that the module does."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and type(module).__call__ is nn.Module.__call__
        and forward_attribute(module) is None
        and not is_compiled(module)
        and not has_hooks(module)
    )


def _children(model: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules; `named_children` would drop a module's second appearance."""
    for name, module in model._modules.items():
        if module is not None:
            yield (f"{prefix}.{name}" if prefix else name), module


def _parts(module: nn.Module, path: str, containers: list[nn.Module]) -> Iterator[Part]:
    """What is run as a whole of a module, or lists stages; notes what is not run as a whole."""
    if _can_flatten(module) and len(module):
        containers.append(module)
        for name, child in _children(module, path):
            yield from _parts(child, name, containers)
        return
    lists_stages = isinstance(module, StagedModule) and not has_hooks(module)
    if lists_stages:
        containers.append(module)
    yield Part(module, path, lists_stages)


def _stages(part: Part) -> Iterator[StageCall]:
    """The stages of one part, before in-place modules are fused."""
    module, path = part.module, part.path
    if not part.lists_stages:
        yield ModuleStage(module, path)
        return
    assert isinstance(module, StagedModule)
    stages = module.stages()
    if not stages:
        raise ProfileError(
            f"{type(module).__name__} ({path or 'the model'}) lists no stages; "
            "its stages() must return at least one"
        )
    for stage in stages:
        if not isinstance(stage, StageCall):
            raise ProfileError(
                f"stages() of {type(module).__name__} ({path or 'the model'}) lists a "
                f"{type(stage).__name__}, which is no StageCall; for a module list "
                "ckptsched.ModuleStage(module)"
            )
        stage.prefix = path
        yield stage


def _fuse_in_place(owned: Iterable[tuple[int, StageCall]]) -> list[tuple[int, StageCall]]:
    """Join each stage that changes its input with the stages that made this input.

    The way back goes on past stages that may return a view: the state before such a stage
    lies in the same storage.

    Args:
        owned: Index of the owning block and stage, in order; a joined stage belongs to the
            block of its first part.
    """
    fused: list[tuple[int, StageCall]] = []
    for owner, stage in owned:
        group = [stage]
        if _changes_its_input(stage):
            while fused and (len(group) == 1 or _may_return_a_view(group[0].module)):
                owner, before = fused.pop()
                group.insert(0, before)
        fused.append((owner, FusedStage(group) if len(group) > 1 else stage))
    return fused


def _changes_its_input(stage: StageCall) -> bool:
    return isinstance(stage, ModuleStage) and _starts_in_place(stage.module)


def _starts_in_place(module: nn.Module) -> bool:
    """Whether the first thing that the module does to its input is to overwrite it."""
    if not isinstance(module, nn.Sequential):
        return getattr(module, "inplace", False) is True
    for child in module:
        if _starts_in_place(child):
            return True
        if not _may_return_a_view(child):
            return False
    return False


def _may_return_a_view(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return all(_may_return_a_view(child) for child in module)
    return isinstance(module, _MAY_RETURN_A_VIEW)


def _blocks(
    children: Sequence[tuple[str, nn.Module]], owned: Iterable[tuple[int, StageCall]]
) -> Iterator[TracedBlock]:
    """Put stages back into blocks; a block that lost all its stages is gone."""
    for owner, group in itertools.groupby(owned, key=lambda pair: pair[0]):
        path, module = children[owner]
        stages = tuple(stage for _, stage in group)
        last = stages[-1]
        if isinstance(last, FusedStage):
            inside = set(module.modules())
            module = _joined([module, *(s.module for s in last.stages if s.module not in inside)])
        yield TracedBlock(path, module, stages)


def _joined(modules: Sequence[nn.Module]) -> nn.Module:
    """One module that holds all these and runs them in order."""
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
