"""How a chain grows: with the batch, with the number of steps, and along a line of two chains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, final

from ..base.errors import WorkloadError
from .chain import Chain
from .stage import LEDGER_SIZES, TAPE_SIZES, Block, Stage, StageLedger, StageParts, TapeOption

_FEWEST_STEPS = 3  # a first, a last, and one between that is copied
_SIZES = ("state_bytes", "gradient_bytes", *TAPE_SIZES)
_SECONDS = ("forward_seconds", "backward_seconds")
_CHAIN_SIZES = ("input_bytes", "input_gradient_bytes", "loss_overhead_bytes", "held_bytes")


def batch_of(chain: Chain) -> int:
    """The batch that a chain was profiled with: the first length of its input; 1 if unknown."""
    shape = chain.signature.input_shape if chain.signature is not None else ()
    return max(shape[0], 1) if shape else 1


def with_batch(chain: Chain, batch: int) -> Chain:
    """An estimate of the chain for another batch than that it was profiled with, `batch_of(chain)`.

    States, tapes, gradients of states, overheads and seconds are scaled with the batch and rounded
    up; parameter gradients stay. What an operation takes whatever the batch is scaled as well, so
    that larger batches are charged too much rather than too little. Without exact bytes or
    signature it is for planning: profile the model with the batch to run a plan.
    """
    factor = Fraction(batch, batch_of(chain))
    law = _Law(lambda size: math.ceil(size * factor), lambda seconds: seconds * float(factor))
    scaled = {id(stage): stage for stage in chain.stages}
    scaled = {key: law.stage(stage, sizes=_SIZES) for key, stage in scaled.items()}
    return law.chain([scaled[id(stage)] for stage in chain.stages], chain)


@final
@dataclass(frozen=True, slots=True)
class _Law:
    """How figures of a chain follow from those of one that was made, or of several."""

    count: Callable[..., int]
    """A number of bytes from the same number of each."""
    time: Callable[..., float]
    """Seconds, likewise."""

    def chain(self, stages: Iterable[Stage], *made: Chain) -> Chain:
        """A chain of the stages, with what else it has."""
        figures = self._figures(made, _CHAIN_SIZES, ("loss_seconds",))
        found = replace(made[0], values=(), signature=None, layouts=())
        return replace(found, stages=tuple(stages), **figures)

    def stage(self, *made: Stage, sizes: Sequence[str]) -> Stage:
        """A stage without exact bytes, whose other sizes are those of the first."""
        figures = self._figures(made, sizes)
        least = figures["state_bytes"]
        figures["tape_bytes"] = max(figures["tape_bytes"], least)
        tapes = zip(*(stage.other_tapes for stage in made), strict=False)
        figures["other_tapes"] = tuple(self._tape(least, *options) for options in tapes)
        return replace(made[0], ledger=None, **figures)

    def _tape(self, least: int, *made: TapeOption) -> TapeOption:
        figures = self._figures(made, TAPE_SIZES)
        figures["tape_bytes"] = max(figures["tape_bytes"], least)
        return replace(made[0], ledger=None, **figures)

    def _figures(
        self, made: Sequence[object], sizes: Sequence[str], seconds: Sequence[str] = _SECONDS
    ) -> dict[str, Any]:
        of = {name: [getattr(x, name) for x in made] for name in (*sizes, *seconds)}
        found: dict[str, Any] = {name: self.count(*of[name]) for name in sizes}
        return found | {name: self.time(*of[name]) for name in seconds}


def with_steps(chain: Chain, steps: int) -> Chain:
    """The chain with another number of steps, at least 1, in every block of equal steps.

    Such a block has three stages or more, all between the first and the last alike; in a chain
    without blocks it is a row of equal stages. Stages are copied or left out between the first and
    the last, so that figures and exact bytes are those of the stages that were measured; one step
    leaves the last. Without signature it is for planning: profile a model of so many to run a plan.

    Raises:
        WorkloadError: The chain has no block of equal steps.
    """
    blocks = chain.blocks or _rows(chain)
    stages: list[Stage] = []
    spans: list[Block] = []
    found = False
    for block in blocks:
        links = chain.stages[block.first - 1 : block.last]
        inner = set(links[1:-1])
        if len(links) >= _FEWEST_STEPS and len(inner) == 1:
            found = True
            first = (links[0],) if steps > 1 else ()
            links = (*first, *(tuple(inner) * (steps - 2)), links[-1])
        spans.append(replace(block, first=len(stages) + 1, last=len(stages) + len(links)))
        stages += links
    if not found:
        raise WorkloadError(
            f"none of the {len(blocks)} blocks has {_FEWEST_STEPS} or more equal steps, so the "
            "number of steps cannot be changed; profile an ODEBlock of that many steps"
        )
    return replace(
        chain,
        stages=tuple(stages),
        blocks=tuple(spans) if chain.blocks else (),
        signature=None,
        layouts=(),
    )


def _rows(chain: Chain) -> tuple[Block, ...]:
    """The rows of equal stages that the chain consists of."""
    rows: list[Block] = []
    for i, stage in enumerate(chain.stages, 1):
        if rows and stage == chain.stages[i - 2]:
            rows[-1] = replace(rows[-1], last=i)
        else:
            rows.append(Block(name="", first=i, last=i))
    return tuple(rows)


@final
@dataclass(frozen=True, slots=True)
class Line:
    """Chains along the straight line through two that were made: a guess at the others."""

    at: int
    """Size of the first."""
    first: Chain
    beyond: int
    """Size of the second, more than the first's."""
    second: Chain

    def __call__(self, size: int) -> Chain:
        """The chain at another size; figures that would be negative are 0.

        A WorkloadError where the two chains differ in their number of stages.
        """
        if len(self.first) != len(self.second):
            raise WorkloadError(
                f"chains of {len(self.first)} and {len(self.second)} stages lie on no line"
            )
        share = Fraction(size - self.at, self.beyond - self.at)

        def count(a: int, b: int) -> int:
            return max(0, math.ceil(a + (b - a) * share))

        def time(a: float, b: float) -> float:
            return max(0.0, a + (b - a) * float(share))

        law, sizes = _Law(count, time), (*_SIZES, "parameter_gradient_bytes")
        stages = (
            _with_ledgers_between(law.stage(a, b, sizes=sizes), a, b, count)
            for a, b in zip(self.first.stages, self.second.stages, strict=True)
        )
        return law.chain(stages, self.first, self.second)


def _with_ledgers_between(
    stage: Stage, a: Stage, b: Stage, count: Callable[[int, int], int]
) -> Stage:
    """A stage on the line with exact bytes where both ends have them, with each tape."""
    pairs = zip(stage.other_tapes, a.other_tapes, b.other_tapes, strict=False)
    tapes = [
        replace(tape, ledger=_ledger_between(x.ledger, y.ledger, count)) for tape, x, y in pairs
    ]
    own = _ledger_between(a.ledger, b.ledger, count)
    if own is None:  # the other tapes say nothing without it
        tapes = [replace(tape, ledger=None) for tape in tapes]
    return replace(stage, ledger=own, other_tapes=tuple(tapes))


def _ledger_between(
    a: StageLedger | None, b: StageLedger | None, count: Callable[[int, int], int]
) -> StageLedger | None:
    """Exact bytes along the line, where the two stages keep the same things."""
    if a is None or b is None:
        return None
    figures: dict[str, Any] = {n: count(getattr(a, n), getattr(b, n)) for n in LEDGER_SIZES}
    peaks = zip(a.backward_peak_bytes, b.backward_peak_bytes, strict=True)
    figures["backward_peak_bytes"] = tuple(count(x, y) for x, y in peaks)
    if a.parts is not None and b.parts is not None:
        figures["parts"] = _parts_between(a.parts, b.parts, count)
    # What tapes are compared with while a stage runs: nothing runs by these.
    ends = replace(a, bounds=None, **figures), replace(b, bounds=None, **figures)
    return ends[0] if ends[0] == ends[1] else None


def _parts_between(a: StageParts, b: StageParts, count: Callable[[int, int], int]) -> StageParts:
    """Storages one by one along the line; those of the first where they are not the same ones."""
    figures: dict[str, Any] = {}
    for name in ("output_bytes", "backward_peak_bytes"):
        ends = getattr(a, name), getattr(b, name)
        if len(ends[0]) != len(ends[1]):
            return a
        figures[name] = tuple(count(x, y) for x, y in zip(*ends, strict=True))
    return replace(a, **figures)
