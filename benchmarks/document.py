"""Puts what a benchmark found into its section of `docs/measured.md`."""

from __future__ import annotations

from pathlib import Path
from typing import final

_DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "measured.md"


@final
class Section:
    """The text between a benchmark's two marks.

    Args:
        name: Module of the benchmark, as the marks name it.
        document: The file; `docs/measured.md` where none is given.
    """

    def __init__(self, name: str, document: Path = _DOCUMENT) -> None:
        self.name = name
        self.document = document
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
