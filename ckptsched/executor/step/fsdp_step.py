"""One step of a model whose parts FSDP shards: when its parameters are gathered.

A parameter that is sharded has two forms, one tensor each: its shard, which is in the module while
nothing runs, and all of it, which FSDP gathers. The second is the same tensor each time, so what
stages run on is taken from there when their block begins, and is in place again whenever they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import NoReturn, final

import torch
from torch import Tensor

from ...base.errors import ExecutionError, PlanMismatchError
from ...recompute.fsdp import OneAtATime, Sharding, Tensors
from ...schedule.language import Code
from ...tensors.pytree import State
from .forward_snapshot import ForwardSnapshot

# Dtype of the tokens between blocks. What FSDP casts these to, it would have cast states to.
TOKEN = torch.float64

_DROP = int(Code.DROP)


@final
class Gathering:
    """Parameters of each block of one step, as shards or gathered by FSDP."""

    def __init__(self, sharding: Sharding, seen: ForwardSnapshot) -> None:
        """Note the shards.

        Args:
            sharding: Which blocks are sharded.
            seen: What the step has found, with parameters of these blocks as they were.

        Raises:
            PlanMismatchError: The step is a part of one that takes care of the same blocks.
        """
        sharding.check_hooks()
        self._sharding, self._seen = sharding, seen
        self._in_place = [slots.in_place() for slots in seen.prepared.slots]
        self._numbers = {id(p): k for k, p in enumerate(seen.parameters)}
        self._waiting = set(seen.waiting)
        self._shards = [seen.parameters[k] for k in seen.waiting]
        self._versions = [shard._version for shard in self._shards]

    def run(
        self,
        run_block: Callable[[int, Tensors], Tensors],
        state_before: Callable[[int], State],
        entry: Tensors,
    ) -> Tensors:
        """Run all blocks in order, each within calls of what is sharded around it.

        Args:
            run_block: Runs the block of an index on what the one before returned: one token.
            state_before: Gives the state that the block of an index takes, and the output for the
                number of blocks.
            entry: What the first block takes.

        Returns:
            The last token; of another dtype than `TOKEN` if the output is to be cast to it.

        Raises:
            PlanMismatchError: FSDP casts what a block takes.
        """

        def checked(block: int, entry: Tensors) -> Tensors:
            _check_cast(block, state_before(block), entry, exactly=True)
            return run_block(block, entry)

        def passed(block: int, entry: Tensors) -> None:
            _check_cast(block, state_before(block), entry, exactly=False)

        return self._sharding.run(checked, passed, entry)

    def begin(self, block: int) -> dict[int, Tensor]:
        """Take a block's parameters as FSDP has gathered them.

        Args:
            block: Its index.

        Returns:
            What is there now, by the id of what was there when the step began.

        Raises:
            PlanMismatchError: They were gathered in another dtype than planned.
        """
        seen, before = self._seen, self._in_place[block]
        if block not in self._sharding:
            return {}
        self._in_place[block] = seen.prepared.slots[block].in_place()
        found: dict[int, Tensor] = {}
        for then, now in zip(before, self._in_place[block], strict=True):
            if then is None or now is None:
                continue
            found[id(then)], k = now, self._numbers[id(then)]
            if k in self._waiting:
                self._waiting.remove(k)
                seen.prepared.check_gathered(now, k)
                seen.replace(k, now)
        seen.bound[block] = seen.prepared.slots[block].bind(seen.alias_of)
        return found

    def check(self) -> None:
        """Raise if a shard was changed since the step began.

        Raises:
            ExecutionError: One was. Torch does not tell of all changes: an optimizer that treats
                many tensors in one call goes unseen.
        """
        for shard, version in zip(self._shards, self._versions, strict=True):
            if shard._version != version:
                name = self._seen.prepared.inspection.parameter_name(shard)
                raise ExecutionError(
                    f"the shard of parameter {name!r} was changed in place between "
                    "forward and backward; call backward before optimizer.step"
                )

    def one_at_a_time(self) -> OneAtATime:
        """A context in which the stages of one block at a time run."""
        return OneAtATime(self._one_block)

    @contextmanager
    def _one_block(self, block: int) -> Iterator[None]:
        if block not in self._sharding:
            with self._seen.parameters_replaced((block,), self._seen.bound):
                yield
        elif self._is_gathered(block):  # by FSDP itself
            with (
                self._sharding.without_hooks(block),
                self._seen.parameters_replaced((block,), self._seen.bound),
            ):
                yield
        else:
            with self._sharding.gathered(block):
                if not self._is_gathered(block):
                    self._refuse(block)
                with self._one_block(block):
                    yield

    def _is_gathered(self, block: int) -> bool:
        """Whether a block has the parameters with which it began."""
        return all(map(is_, self._seen.prepared.slots[block].in_place(), self._in_place[block]))

    def _refuse(self, block: int) -> NoReturn:
        name = self._seen.prepared.blocks[block].name
        raise ExecutionError(
            f"FSDP has not gathered the parameters of block {name!r} in the tensors in which "
            "it had them in the forward pass, so its stages cannot run; leave "
            "set_unshard_in_backward at True, or shard the model as a whole"
        )

    def by_block(self, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """Cut a range of operations at the borders of blocks.

        Args:
            start: Position of the first.
            stop: Position after the last.

        Yields:
            Positions of a part, as above, and the index of its block; None for drops alone.
        """
        script = self._seen.prepared.script
        codes, numbers, owner = script.codes.data, script.numbers.data, script.owner
        current: int | None = None
        for p in range(start, stop):
            if codes[p] != _DROP:
                block = int(owner[numbers[p]])
                if current is not None and block != current:
                    yield start, p, current
                    start = p
                current = block
        yield start, stop, current


def _check_cast(block: int, state: State, entry: Tensors, *, exactly: bool) -> None:
    """Refuse to go on where FSDP would have cast a state that a run keeps from it.

    Args:
        block: The index of the block that takes the state.
        state: The state as it is.
        entry: The input as FSDP has passed it on, or the token that stands for another state.
        exactly: Whether the state is taken so; else a cast that loses nothing may still be undone.
    """
    if block == 0:
        casts = [(a.dtype, b.dtype) for a, b in zip(state.leaves, entry, strict=True)]
    elif entry[0].dtype == TOKEN:
        casts = []
    else:
        casts = [(t.dtype, entry[0].dtype) for t in state.leaves if t.is_floating_point()]
    for found, cast in casts:
        if found != cast and (exactly or torch.promote_types(found, cast) != cast):
            raise PlanMismatchError(
                f"FSDP casts what block number {block} takes from {found} to {cast}, and a plan is "
                "for states that are handed on as they are; profile and plan in the dtype of the "
                "MixedPrecisionPolicy, and give the same for all parts and for the whole model"
            )
