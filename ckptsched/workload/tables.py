"""What a chain or graph holds, as a table."""

from __future__ import annotations

from typing import Protocol

from ..base.budget import format_bytes, format_seconds
from ..base.text_table import Grid
from .stage import Block, Stage

_MOST_ROWS = 60  # in a notebook


class Staged(Protocol):
    """What has stages: a chain or a graph."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks that cover the stages, or none."""

    def stage_name(self, i: int) -> str:
        """Name of stage i for people."""


def chain_grid(chain: Staged) -> Grid:
    """A row a block; a row a stage where the chain has no blocks."""
    spans = [(block.name, block.first, block.last) for block in chain.blocks]
    spans = spans or [(chain.stage_name(i), i, i) for i in range(1, len(chain.stages) + 1)]
    rows: list[tuple[str, ...]] = []
    for name, first, last in spans:
        stages = chain.stages[first - 1 : last]
        rows.append(
            (
                name or "-",
                str(len(stages)),
                format_bytes(sum(stage.state_bytes for stage in stages)),
                format_bytes(sum(stage.tape_bytes for stage in stages)),
                format_bytes(sum(min(t.tape_bytes for t in stage.tapes) for stage in stages)),
                format_seconds(sum(stage.forward_seconds for stage in stages)),
                format_seconds(sum(stage.backward_seconds for stage in stages)),
            )
        )
    headings: tuple[str, ...] = (
        "block" if chain.blocks else "stage",
        "stages",
        "states",
        "tapes",
        "lean",
        "forward",
        "backward",
    )
    if not any(stage.other_tapes for stage in chain.stages):
        lean = headings.index("lean")
        headings, *rows = [(*row[:lean], *row[lean + 1 :]) for row in (headings, *rows)]
    title = "Blocks" if chain.blocks else "Stages"
    return Grid(title=title, headings=headings, rows=tuple(rows), names_first=True)


def chain_html(chain: Staged, heading: str) -> str:
    """The table for notebooks, cut where it is long.

    Args:
        chain: The chain or graph.
        heading: What it is, for the title.
    """
    grid = chain_grid(chain)
    rest = len(grid.rows) - _MOST_ROWS
    rows = grid.rows
    if rest > 0:
        rows = (*rows[:_MOST_ROWS], (f"and {rest} more", *("",) * (len(grid.headings) - 1)))
    shown = Grid(title=heading, headings=grid.headings, rows=rows, names_first=True)
    return shown.to_html()
