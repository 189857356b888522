"""Compares tapes with what was projected, and says once a stage where one takes more.

What a stage computes may hang on its data, on draws or on attributes of its modules; a profile
sees some of it. The look costs a walk of the tape, so it is taken where a tape seems to be another
than those seen before (see `usage`). A run without tape takes the path of the run with tape that
each step has, so it is seen there.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import final

from torch import Tensor

from .budget import format_bytes
from .errors import BudgetWarning
from .stages import StageLedger
from .tape_walk import Contents
from .trees import storages
from .workload import Chain


@final
class Overruns:
    """The stages of a chain whose tapes take more than was projected."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._told: set[int] = set()

    def look(
        self,
        stages: Sequence[int],
        contents: Sequence[Contents],
        inputs: Mapping[int, int],
        output: Iterable[Tensor],
        theirs: AbstractSet[int],
        aliases: Sequence[Tensor],
    ) -> None:
        """Warn where a tape takes more than was projected; once a stage.

        Args:
            stages: Whose tape it is, counted from 1.
            contents: What each stage's part of the tape holds.
            inputs: The storages of the first stage's input, as `storage_sizes` gives them.
            output: The tensors of the last one's output.
            theirs: Storages that no tape is charged for, by identity.
            aliases: What collects gradients.
        """
        ledgers = [self._chain.stages[i - 1].ledger for i in stages]
        known = [ledger for ledger in ledgers if ledger is not None]
        if len(known) < len(ledgers) or not self._told.isdisjoint(stages):
            return
        if len(stages) > 1 and any(ledger.parts is not None for ledger in known):
            # States of several storages are handed on through a shared tape in ways that the sum
            # of single ledgers does not tell; such stages are looked at one by one.
            return
        outputs = storage_sizes(output)
        charged, every = _inputs_of(known[0])
        if len(stages) > 1:
            # An input that the tape is not charged for may be gone, and its identity another's.
            inputs = {h: n for k, (h, n) in enumerate(inputs.items()) if every or k in charged}
            charged, every = (), True
        saved = {home: size for part in contents for home, size in part.saved.items()}
        inside = saved.keys() - inputs.keys() - outputs.keys() - theirs
        more = sum(saved[home] for home in inside) - sum(map(_saved_bytes, known))
        more = max(0, more - _between(known))
        bounds = known[0].bounds
        if len(known) == 1 and bounds is not None:
            largest = max((saved[home] for home in inside), default=0)
            more = max(more, largest - bounds.largest_bytes)
        if stages[0] > 1:  # what the chain is given is the caller's
            more += _kept(inputs, theirs, saved, charged, every)
        own = theirs | inputs.keys()
        more += _kept(outputs, own, saved, *_outputs_of(known[-1]))
        more += _larger(outputs, own, known[-1])
        sizes = {id(alias): alias.nbytes for alias in aliases}
        for part, ledger in zip(contents, known, strict=True):
            if ledger.bounds is not None:
                used = sum(sizes.get(leaf, 0) for leaf in part.leaves)
                more += max(0, used - ledger.bounds.used_bytes)
        if more > 0:
            self._tell(stages, sum(map(_projected, known)), more)

    def _tell(self, stages: Sequence[int], projected: int, more: int) -> None:
        self._told.update(stages)
        names = [self._chain.stage_name(i) for i in (stages[0], stages[-1])]
        what = f"stage {names[0]!r} has"
        if len(stages) > 1:
            what = f"stages {names[0]!r} to {names[1]!r} have"
        found = projected + more
        warnings.warn(
            f"{what} a tape and an output of {found} bytes ({format_bytes(found)}), and "
            f"{projected} bytes ({format_bytes(projected)}) were projected, so the step may exceed "
            "its budget: what is computed depends on data, on random draws or on attributes of "
            "the model, and the profile has not seen this; profile with a "
            "batch that takes the most, and the model as it is now, and plan again",
            BudgetWarning,
            stacklevel=2,
        )


def storage_sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the storages in which tensors lie, by identity, in order."""
    found = storages(tensors)
    return {home: leaves[0].untyped_storage().nbytes() for home, leaves in found.items()}


def _saved_bytes(ledger: StageLedger) -> int:
    return ledger.tape_bytes if ledger.bounds is None else ledger.bounds.saved_bytes


def _projected(ledger: StageLedger) -> int:
    parts = ledger.parts
    return ledger.tape_bytes + (ledger.state_bytes if parts is None else sum(parts.output_bytes))


def _inputs_of(ledger: StageLedger) -> tuple[tuple[int, ...], bool]:
    """The storages of the input that the tape is charged for, and whether these are all."""
    parts = ledger.parts
    return (() if parts is None else parts.saved_inputs), parts is None and ledger.input_saved


def _outputs_of(ledger: StageLedger) -> tuple[tuple[int, ...], bool]:
    parts = ledger.parts
    return (() if parts is None else parts.saved_outputs), parts is None and ledger.output_saved


def _kept(
    sizes: Mapping[int, int],
    theirs: AbstractSet[int],
    saved: Mapping[int, int],
    charged: tuple[int, ...],
    every: bool,
) -> int:
    """Bytes of a state that a tape keeps, and is not charged for."""
    return sum(
        size
        for k, (home, size) in enumerate(sizes.items())
        if home in saved and home not in theirs and not every and k not in charged
    )


def _between(ledgers: Sequence[StageLedger]) -> int:
    """Bytes of the states inside a tape of several stages that it is charged for."""
    total = 0
    for before, after in itertools.pairwise(ledgers):
        if any(map(any, (_outputs_of(before), _inputs_of(after)))):
            total += _projected(before) - before.tape_bytes
    return total


def _larger(outputs: dict[int, int], own: AbstractSet[int], ledger: StageLedger) -> int:
    """How much larger an output is than projected."""
    fresh = sum(size for home, size in outputs.items() if home not in own)
    parts = ledger.parts
    if parts is not None:
        return max(0, fresh - parts.new_bytes)
    return max(0, fresh - (0 if ledger.output_is_view else ledger.state_bytes))
