"""A table as cells, for the printer of plain text and for the terminal's."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Cells below headings; a heading may have several lines."""

    title: str
    """What the table shows."""
    headings: tuple[str, ...]
    """One a column; lines are parted by newlines."""
    rows: tuple[tuple[str, ...], ...]
    """As many cells a row as there are headings."""
    names_first: bool = False
    """Whether the first column holds names, aligned to the left."""
    texts: bool = False
    """Whether all columns hold texts, aligned to the left."""

    def __str__(self) -> str:
        """Plain text: columns aligned to the right, below a line."""
        parts = [heading.split("\n") for heading in self.headings]
        height = max((len(part) for part in parts), default=0)
        head = [tuple(part[i] if i < len(part) else "" for part in parts) for i in range(height)]
        columns = zip(*head, *self.rows, strict=True)
        widths = [max(len(cell) for cell in column) for column in columns]
        rule = tuple("-" * width for width in widths)
        lines = []
        for row in (*head, rule, *self.rows):
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            if self.texts:
                cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            elif self.names_first:
                cells[0] = row[0].ljust(widths[0])
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def to_html(self) -> str:
        """The same as a table of HTML, for notebooks."""

        def line(tag: str, row: tuple[str, ...]) -> str:
            cells = []
            for k, cell in enumerate(row):
                left = self.texts or (self.names_first and k == 0)
                text = html.escape(cell).replace("\n", "<br>")
                cells.append(
                    f'<{tag} style="text-align:{"left" if left else "right"}">{text}</{tag}>'
                )
            return f"<tr>{''.join(cells)}</tr>"

        head = f"<thead>{line('th', self.headings)}</thead>" if any(self.headings) else ""
        body = "".join(line("td", row) for row in self.rows)
        caption = f'<caption style="text-align:left">{html.escape(self.title)}</caption>'
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"
