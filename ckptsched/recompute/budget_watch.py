"""Compares tapes with the projected bytes, and warns once a stage if one takes more.

What a stage computes may hang on its data, on draws or on attributes of its modules; a profile
sees some of it. The look costs a walk of the tape, so it is taken where a tape seems to be another
than those seen before (see `Usage`). A run without tape takes the path of the run with tape that
each step has, so it is seen there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..base.budget import format_bytes
from ..base.errors import BudgetWarning
from ..tensors.pytree import storages
from ..workload.chain import Chain
from ..workload.graph import Graph
from ..workload.stage import StageLedger, StageParts
from .tape_contents import Contents


@final
class Overruns:
    """Warns about stages of a chain whose tapes take more bytes than projected."""

    def __init__(self, chain: Chain | Graph) -> None:
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
        saved = {home: size for part in contents for home, size in part.saved.items()}
        outputs = storage_sizes(output)
        if isinstance(self._chain, Graph) and len(stages) > 1:
            more = _beyond_values(self._chain, stages, saved, theirs | inputs.keys(), outputs)
        else:
            more = _beyond_states(stages, known, saved, inputs, outputs, theirs)
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


def _beyond_states(
    stages: Sequence[int],
    known: Sequence[StageLedger],
    saved: Mapping[int, int],
    inputs: Mapping[int, int],
    outputs: Mapping[int, int],
    theirs: AbstractSet[int],
) -> int:
    """Bytes of a tape and an output beyond what stages that hand on whole states are charged."""
    states = _States.of(known)
    handed_on = {home for k, home in enumerate(outputs) if k in states.handed_on}
    handed_on &= inputs.keys()
    if len(stages) > 1:
        # An input that is neither charged nor handed on may be gone, its identity another's.
        inputs = {h: n for k, (h, n) in enumerate(inputs.items()) if k in states.inputs}
    own = theirs | inputs.keys() | handed_on
    inside = saved.keys() - outputs.keys() - own
    more = sum(saved[home] for home in inside) - sum(map(_saved_bytes, known))
    more = max(0, more - states.between_bytes)
    bounds = known[0].bounds
    if len(known) == 1 and bounds is not None:
        largest = max((saved[home] for home in inside), default=0)
        more = max(more, largest - bounds.largest_bytes)
    if stages[0] > 1 and len(stages) == 1:  # what the chain is given is the caller's
        more += _kept(inputs, theirs, saved, states.inputs)
    more += _kept(outputs, own, saved, states.outputs)
    fresh = sum(size for home, size in outputs.items() if home not in own)
    more += max(0, fresh - states.output_bytes)
    return more


_ELSEWHERE = (-1, -1)


def _beyond_values(
    graph: Graph,
    stages: Sequence[int],
    saved: Mapping[int, int],
    own: AbstractSet[int],
    outputs: Mapping[int, int],
) -> int:
    """The same of stages by value, which may save what each other has made."""
    assert graph.lined is not None
    # Storages by who has made them; a view lies in that of what it is a view of.
    home_of: dict[tuple[int, int], tuple[int, int]] = {}
    made: dict[tuple[int, int], int] = {}
    charged = set[tuple[int, int]]()
    tapes = 0
    for i in stages:
        ledger, values = graph.stages[i - 1].ledger, graph.lined.values[i - 1]
        assert ledger is not None
        parts = _parts_of(ledger)
        tapes += _saved_bytes(ledger)
        taken = {r.input: home_of.get((r.maker, r.made), _ELSEWHERE) for r in values.reads}
        charged.update(taken[values.inputs[k]] for k in parts.saved_inputs)
        for m, place in enumerate(map(values.outputs.index, values.made)):
            source = parts.output_sources[place]
            home_of[i, m] = (i, m) if source < 0 else taken[values.inputs[source]]
            made[i, m] = parts.output_bytes[place] if source < 0 else 0
            if place in parts.saved_outputs:
                charged.add(home_of[i, m])
    inside = sum(size for home, size in saved.items() if home not in own)
    fresh = sum(size for home, size in outputs.items() if home not in own)
    within = sum(made.get(home, 0) for home in charged)
    return max(0, inside - tapes - within) + max(0, fresh - sum(made.values()))


def _saved_bytes(ledger: StageLedger) -> int:
    return ledger.tape_bytes if ledger.bounds is None else ledger.bounds.saved_bytes


def _projected(ledger: StageLedger) -> int:
    parts = ledger.parts
    return ledger.tape_bytes + (ledger.state_bytes if parts is None else sum(parts.output_bytes))


@final
@dataclass(frozen=True, slots=True)
class _States:
    """Storages of states that a tape of one or several stages is charged for."""

    inputs: frozenset[int]
    """The storages of the first stage's input, by number."""
    outputs: frozenset[int]
    """The storages of the last one's output."""
    handed_on: frozenset[int]
    """Those of them that are the input's."""
    between_bytes: int
    """Of states that neither the first stage takes nor the last one returns."""
    output_bytes: int
    """Of the storages of the output that are new."""

    @classmethod
    def of(cls, ledgers: Sequence[StageLedger]) -> _States:
        """Follow the storages from stage to stage, as each hands some of them on.

        Args:
            ledgers: Of the stages, in order.
        """
        first = _parts_of(ledgers[0])
        here = list(range(first.inputs))  # which storage each one of the state is
        sizes, charged = [0] * first.inputs, set[int]()
        for ledger in ledgers:
            parts = _parts_of(ledger)
            charged.update(here[k] for k in parts.saved_inputs)
            after = []
            for size, source in zip(parts.output_bytes, parts.output_sources, strict=True):
                if source < 0:
                    sizes.append(size)
                after.append(here[source] if source >= 0 else len(sizes) - 1)
            here = after
            charged.update(here[k] for k in parts.saved_outputs)
        given, last = set(range(first.inputs)), set(here)
        return cls(
            inputs=frozenset(charged & given),
            outputs=frozenset(k for k, home in enumerate(here) if home in charged - given),
            handed_on=frozenset(k for k, home in enumerate(here) if home in given),
            between_bytes=sum(sizes[home] for home in charged - given - last),
            output_bytes=sum(sizes[home] for home in last - given),
        )


def _parts_of(ledger: StageLedger) -> StageParts:
    """The storages of a stage one by one, also where there is one on either side."""
    return ledger.parts or StageParts(
        inputs=1,
        output_bytes=(ledger.state_bytes,),
        output_sources=(0 if ledger.output_is_view else -1,),
        saved_inputs=(0,) * ledger.input_saved,
        saved_outputs=(0,) * ledger.output_saved,
        backward_peak_bytes=(),
    )


def _kept(
    sizes: Mapping[int, int],
    theirs: AbstractSet[int],
    saved: Mapping[int, int],
    charged: AbstractSet[int],
) -> int:
    """Bytes of a state that a tape keeps, and is not charged for."""
    return sum(
        size
        for k, (home, size) in enumerate(sizes.items())
        if home in saved and home not in theirs and k not in charged
    )
