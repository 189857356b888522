"""FSDP2 around the blocks of a plan: gathers parameters block by block, as FSDP does itself.

FSDP gathers the parameters of a module when the module is called, and lets them go when the call
ends; in the backward it does so by hooks on the tensors that went in and came out. A plan calls
the stages inside of modules, each at its own times. So three things are done here, by torch's
public means. The node of a block is made within a call of the sharded modules that it belongs to:
FSDP gathers, lets go and reduces block by block, as it does without a plan. Stages run without
FSDP's own hooks. And where the stages of another block run again, its parameters are gathered for
as long as that takes.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, final

from torch import Tensor, nn

from ..base.errors import PlanMismatchError

_CALL = "_ckptsched_call"  # attribute of a sharded module while it is called
# torch has no public way to ask a module for its hooks. These names are part of what a
# pickled module holds, and a test shows that each kind of hook is still found under them.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

Tensors = tuple[Tensor, ...]


def _kind() -> type | None:
    """The class that `fully_shard` adds to modules; None if FSDP was not imported."""
    # Importing it takes half a second, and before anyone has done so nothing is sharded.
    found: type | None = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return found


def fsdp_is_there() -> bool:
    """Whether anyone has imported FSDP, so that something may be sharded."""
    return _kind() is not None


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with the module itself."""
    return bool(sharded_of((module,)))


def sharded_of(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Those of some modules that `fully_shard` was called with."""
    kind = _kind()
    return () if kind is None else tuple([m for m in modules if isinstance(m, kind)])


def class_before(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `fully_shard`, which gives it one derived of FSDP's and that."""
    if not is_sharded(module):
        return type(module)
    kinds = type(module).__mro__[1:]
    return next(kind for kind in kinds if issubclass(kind, nn.Module))


def own_hooks(module: nn.Module, kind: str) -> dict[Any, Any]:
    """The hooks of a module without those that FSDP has put there.

    Args:
        module: Any module.
        kind: Name of the attribute that holds them, such as "_forward_hooks".
    """
    hooks: dict[Any, Any] = vars(module).get(kind) or {}
    if not hooks or not is_sharded(module):
        return hooks
    kept = {key: hook for key, hook in hooks.items() if not _of_torch_distributed(hook)}
    return type(hooks)(kept)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after the module itself, forward or backward; FSDP's apart."""
    return any(own_hooks(module, kind) for kind in HOOKS)


def _of_torch_distributed(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")


def call_as_forward(
    module: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a function as if it were the forward of a sharded module.

    Args:
        module: The module, whose parameters FSDP gathers and lets go around the call.
        function: What to call instead of its forward.
        args: What to call it with; FSDP sees the tensors, and those that are returned.
        kwargs: The same by name.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    vars(module)[_CALL] = function
    try:
        register_fsdp_forward_method(module, _CALL)
        return getattr(module, _CALL)(*args, **kwargs)
    finally:
        vars(module).pop(_CALL, None)


@final
@dataclass(frozen=True, slots=True)
class Span:
    """A sharded module, and blocks in a row that its parameters belong to."""

    first: int
    last: int
    module: nn.Module


@final
class Sharding:
    """Maps the blocks of a model to the sharded modules that their parameters belong to."""

    def __init__(self, blocks: Sequence[nn.Module], sharded: Iterable[nn.Module]) -> None:
        """Find for each sharded module the blocks that it stands around, or is a part of.

        Args:
            blocks: The modules of the blocks, in order.
            sharded: Sharded modules, outer ones first; the model itself is none of them.

        Raises:
            PlanMismatchError: Two of them share some blocks, and neither has all of the other's.
        """
        inside = [{id(m) for m in block.modules()} for block in blocks]
        spans: list[Span] = []
        for module in sharded:
            own = {id(module), *map(id, _owners(module))}
            parts = {id(m) for m in module.modules()}
            at = [k for k, ids in enumerate(inside) if ids & own or id(blocks[k]) in parts]
            spans += [Span(run[0], run[-1], module) for run in _runs(at)]
        spans.sort(key=lambda span: (span.first, -span.last))  # stable: outer ones stay first
        _check_nested(spans)
        self._spans = tuple(spans)
        self._of_block: list[tuple[nn.Module, ...]] = [
            tuple(s.module for s in spans if s.first <= k <= s.last) for k in range(len(blocks))
        ]

    def __contains__(self, block: int) -> bool:
        """Whether the parameters of a block are gathered for it, by its index."""
        return bool(self._of_block[block])

    def check_hooks(self) -> None:
        """Refuse a step while FSDP's hooks are off: within a stage of another plan.

        Raises:
            PlanMismatchError: They are.
        """
        kind = _FORWARD_HOOKS[0]
        for module in {span.module for span in self._spans}:
            if len(own_hooks(module, kind)) == len(vars(module)[kind]):
                raise PlanMismatchError(
                    f"a {class_before(module).__name__} that is sharded by fully_shard lies in a "
                    "model that follows a plan within another that does, and FSDP can serve one of "
                    "them only; let the outer model alone follow a plan"
                )

    def run(
        self,
        run_block: Callable[[int, Tensors], Tensors],
        passed: Callable[[int, Tensors], None],
        entry: Tensors,
    ) -> Tensors:
        """Run all blocks in order, each within a call of what is sharded around it.

        Args:
            run_block: Takes the index of a block and what the block before returned.
            passed: Is given the index of a block and what FSDP has made of what it takes; the
                number of blocks for what the last one returned.
            entry: What the first block takes.
        """

        def part(first: int, stop: int, spans: Sequence[Span], *entry: Tensor) -> Tensors:
            passed(first, entry)
            return go(first, stop, spans, entry)

        def go(block: int, stop: int, spans: Sequence[Span], entry: Tensors) -> Tensors:
            while block < stop:
                if spans and spans[0].first == block:
                    outer = spans[0]
                    inner = bisect.bisect_right(spans, outer.last, key=lambda span: span.first)
                    inside = partial(part, block, outer.last + 1, spans[1:inner])
                    entry = call_as_forward(outer.module, inside, *entry)
                    block, spans = outer.last + 1, spans[inner:]
                    passed(block, entry)
                else:
                    entry = run_block(block, entry)
                    block += 1
            return entry

        return go(0, len(self._of_block), self._spans, entry)

    @contextmanager
    def gathered(self, block: int) -> Iterator[None]:
        """Gather the parameters of a block, and let go at the end of what was not there before.

        Args:
            block: Its index.
        """
        with ExitStack() as stack:
            for module in self._of_block[block]:
                owners = list(_owners(module))
                before = _in_place(owners)
                module.unshard()  # type: ignore[operator]
                if any(a is not b for a, b in zip(_in_place(owners), before, strict=True)):
                    stack.callback(module.reshard)  # type: ignore[arg-type]
            yield

    @contextmanager
    def without_hooks(self, block: int) -> Iterator[None]:
        """Take away the hooks that FSDP has put on a block, and put them back at the end.

        Args:
            block: Its index.
        """
        # torch has no public way to leave out a hook for a while. The dictionaries are part of
        # what a pickled module holds.
        modules = self._of_block[block]
        before = [{kind: vars(module)[kind] for kind in _FORWARD_HOOKS} for module in modules]
        try:
            for module in modules:
                vars(module).update({kind: own_hooks(module, kind) for kind in _FORWARD_HOOKS})
            yield
        finally:
            for module, hooks in zip(modules, before, strict=True):
                vars(module).update(hooks)


@final
class OneAtATime:
    """A context manager that is within one of many contexts at a time."""

    def __init__(self, enter: Callable[[int], AbstractContextManager[None]]) -> None:
        """Begin within none.

        Args:
            enter: Gives a context by its number.
        """
        self._enter, self._stack, self._at = enter, ExitStack(), -1

    def __enter__(self) -> OneAtATime:
        return self

    def to(self, number: int) -> None:
        """Leave the context that this is in, and enter another, unless they are the same."""
        if number != self._at:
            self._at = -1
            self._stack.close()
            self._stack.enter_context(self._enter(number))
            self._at = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _owners(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters are sharded with this one: not those in sharded parts."""
    if module._parameters:
        yield module
    for child in module.children():
        if not is_sharded(child):
            yield from _owners(child)


def _in_place(owners: Iterable[nn.Module]) -> list[Tensor | None]:
    """The tensors in the places for parameters now."""
    return [p for owner in owners for p in owner._parameters.values()]


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers in ascending order, cut where one is missing."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _check_nested(spans: Sequence[Span]) -> None:
    ends: list[Span] = []
    for span in spans:
        while ends and ends[-1].last < span.first:
            ends.pop()
        if ends and span.last > ends[-1].last:
            names = " and ".join(f"a {class_before(s.module).__name__}" for s in (ends[-1], span))
            raise PlanMismatchError(
                f"{names}, both sharded by fully_shard, have parameters in some of the same "
                "blocks, and neither in all of the other's: FSDP cannot gather them block by "
                "block; shard the two together in one module, or shard the whole model"
            )
        ends.append(span)
