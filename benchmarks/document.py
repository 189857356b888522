"""What benchmarks found, as text: goals, tables, and their pages in `docs/measured`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from ckptsched.base.text_table import Grid

_PAGES = Path(__file__).resolve().parents[1] / "docs" / "measured"


@final
class Section:
    """The text between a benchmark's two marks.

    Args:
        name: Module of the benchmark, as the marks name it.
        document: The file; the page of its name in `docs/measured` where none is given.
    """

    def __init__(self, name: str, document: Path | None = None) -> None:
        self.name = name
        self.document = document or _PAGES / f"{name.removeprefix('benchmarks.')}.md"
        self.start = f"<!-- written by {name} -->"
        self.end = f"<!-- end of what {name} writes -->"

    def write(self, body: str) -> None:
        """Replace the section; ends the program where the marks are missing."""
        text = self.document.read_text(encoding="utf-8")
        before, start, rest = text.partition(self.start)
        _, end, after = rest.partition(self.end)
        if not start or not end:
            raise SystemExit(f"{self.document.name} lacks the marks {self.start} and {self.end}")
        self.document.write_text(f"{before}{start}\n\n{body}\n\n{end}{after}", encoding="utf-8")
        print(f"written to {self.document.name}")


@final
@dataclass(frozen=True)
class Goal:
    """A goal, and whether the rows show that it was met."""

    what: str
    """The goal."""
    met: bool | None
    """None where nothing of it was run."""
    shown_by: str
    """The figures that say so."""

    def __str__(self) -> str:
        """One line."""
        verdict = {True: "met", False: "NOT MET", None: "not run"}[self.met]
        return f"{verdict:8} {self.what}: {self.shown_by}"


def to_markdown(grid: Grid) -> str:
    """A table for a page of `docs/measured`, below its title."""
    headings = [heading.replace("\n", " ") for heading in grid.headings]
    lines = [f"## {grid.title}", "", _markdown(headings), _markdown(["---"] * len(headings))]
    return "\n".join([*lines, *(_markdown(row) for row in grid.rows)])


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
