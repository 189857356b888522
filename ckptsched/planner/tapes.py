"""What a plan keeps of each stage for its backward, in words: a whole tape, a lean one, or none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from ..base.budget import format_bytes, format_seconds
from ..base.text_table import Grid
from ..schedule.language import Code, Schedule
from ..workload.chain import Chain
from ..workload.graph import Graph
from ..workload.stage import Stage, TapeOption

_NUMBER = re.compile(r"\d+")
_PLACE = re.compile(r"^\d+:")  # of the first call of a stage, before the names of its calls
_MOST_NAMED = 3  # calls that are made again, in a row
_MOST_ROWS = 12


@final
@dataclass(frozen=True, slots=True)
class StageTape:
    """The tape that the backward of a stage takes, and how it comes to be there."""

    stage: int
    """The stage, from 1."""
    option: int
    """Which of its tapes; 0 is the stage's own."""
    is_kept: bool
    """Whether it is kept from the forward pass on; else the stage runs again for it."""
    runs: int
    """How often the stage runs, with and without tape."""
    own_bytes: int
    """Bytes that the stage's own tape keeps, what the stage was given apart."""
    kept_bytes: int
    """The same with this one."""
    again: tuple[str, ...]
    """What the backward makes again first, by the names of its calls."""
    again_seconds: float
    """Seconds that this takes more than with the stage's own tape."""

    @property
    def is_lean(self) -> bool:
        """Whether it is another one than the stage's own."""
        return self.option > 0


def tapes_of(workload: Chain | Graph, schedule: Schedule) -> tuple[StageTape, ...]:
    """The tape of each stage under a schedule that is valid.

    Args:
        workload: The chain or graph.
        schedule: The schedule.
    """
    codes, stages, options = schedule.codes, schedule.stages, schedule.kinds
    turn = int(np.argmax(codes == Code.TURN))
    taped = np.flatnonzero(codes == Code.TAPED_FORWARD)
    last = dict(zip(stages[taped].tolist(), taped.tolist(), strict=True))  # the backward's
    is_run = (codes == Code.FORWARD) | (codes == Code.TAPED_FORWARD)
    runs = np.bincount(stages[is_run], minlength=len(workload) + 1)
    return tuple(
        [
            _tape(i, workload.stages[i - 1], int(options[at]), at < turn, int(runs[i]))
            for i, at in sorted(last.items())
        ]
    )


def _tape(i: int, stage: Stage, option: int, is_kept: bool, runs: int) -> StageTape:
    own, tape = stage.tapes[0], stage.tapes[option]
    return StageTape(
        *(i, option, is_kept, runs, _bytes(own), _bytes(tape), tape.again),
        max(0.0, tape.seconds - own.seconds),
    )


def _bytes(tape: TapeOption) -> int:
    """What it keeps of the output counts, and of the input nothing: that is the stage before's."""
    ledger = tape.ledger
    if ledger is None:
        return tape.tape_bytes
    if ledger.parts is not None:
        return ledger.tape_bytes + sum(
            ledger.parts.output_bytes[k] for k in ledger.parts.saved_outputs
        )
    is_own = ledger.output_saved and not ledger.output_is_view
    return ledger.tape_bytes + is_own * ledger.state_bytes


def counts_of(tapes: Iterable[StageTape]) -> dict[str, int]:
    """How many stages keep which tape from the forward pass on.

    Args:
        tapes: Those of all stages.
    """
    found = {"whole": 0, "lean": 0, "none": 0}
    for tape in tapes:
        found["none" if not tape.is_kept else "lean" if tape.is_lean else "whole"] += 1
    return found


def lines_of(tapes: Sequence[StageTape]) -> list[str]:
    """The same in words, a line for each kind that there is.

    Args:
        tapes: Those of all stages.
    """
    kept = [tape for tape in tapes if tape.is_kept]
    whole = [tape for tape in kept if not tape.is_lean]
    lean = [tape for tape in kept if tape.is_lean]
    lines = []
    if whole:
        lines.append(f"{len(whole)} keep their whole tape: {_sum(x.kept_bytes for x in whole)}")
    if lean:
        seconds = format_seconds(sum(x.again_seconds for x in lean))
        lines.append(
            f"{len(lean)} keep a lean tape: {_sum(x.kept_bytes for x in lean)} of "
            f"{_sum(x.own_bytes for x in lean)}; the rest is made again in the backward, {seconds}"
        )
    none = [tape for tape in tapes if not tape.is_kept]
    if none:
        again = sorted({tape.runs - 1 for tape in none})
        often = f"{again[0]} to {again[-1]} times" if len(again) > 1 else _times(again[0])
        more = sum(tape.is_lean for tape in none)
        then = f", {more} of them with a lean tape" if more else ""
        lines.append(f"{len(none)} keep none and run again, {often}{then}")
    return lines


def _sum(sizes: Iterable[int]) -> str:
    return format_bytes(sum(sizes))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def tape_grid(workload: Chain | Graph, tapes: Iterable[StageTape]) -> Grid:
    """A row for stages of the same names, numbers in them apart, that are treated alike.

    Args:
        workload: The chain or graph.
        tapes: Those of all stages.
    """
    groups: dict[tuple[object, ...], list[StageTape]] = {}
    for tape in tapes:
        name, again = _pattern(_named(workload, tape)), tuple(map(_pattern, tape.again))
        key = (name, again, tape.option, tape.is_kept, tape.runs)
        groups.setdefault(key, []).append(tape)
    # The largest first to be shown, all in the order of the chain.
    sizes = {key: sum(tape.own_bytes for tape in found) for key, found in groups.items()}
    shown = sorted(groups, key=lambda key: -sizes[key])[:_MOST_ROWS]
    rows = [_row(workload, found) for key, found in groups.items() if key in shown]
    if len(groups) > len(shown):
        rest = [tape for key, found in groups.items() if key not in shown for tape in found]
        cells = (_sum(x.kept_bytes for x in rest if x.is_kept), _sum(x.own_bytes for x in rest))
        rows.append(("others", str(len(rest)), "", *cells, "", "", ""))
    headings = ("stage", "stages", "tape", "keeps", "of", "runs", "made again", "takes")
    return Grid(title="Tapes", headings=headings, rows=tuple(rows), names_first=True)


def _row(workload: Chain | Graph, found: Sequence[StageTape]) -> tuple[str, ...]:
    first, alone = found[0], len(found) == 1
    name = _named(workload, first)
    names = [x if alone else _pattern(x) for x in first.again]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    kept = "lean" if first.is_lean else "whole"
    return (
        name if alone else _pattern(name),
        str(len(found)),
        kept if first.is_kept else f"none, then {kept}",
        _sum(x.kept_bytes for x in found if x.is_kept),
        _sum(x.own_bytes for x in found),
        str(first.runs),
        ", ".join(names[:_MOST_NAMED]) + more,
        format_seconds(sum(x.again_seconds for x in found)) if first.is_lean else "",
    )


def _named(workload: Chain | Graph, tape: StageTape) -> str:
    return _PLACE.sub("", workload.stage_name(tape.stage))


def _pattern(name: str) -> str:
    """A name without its numbers: those of equal layers are the same."""
    return _NUMBER.sub("*", name)
