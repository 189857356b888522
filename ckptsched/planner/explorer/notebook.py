"""Plans in notebooks: a table of figures, and a small picture of the bytes over the step."""

from __future__ import annotations

import html
import itertools

import numpy as np

from ...base.budget import format_bytes
from ...base.text_table import Grid
from ..plan_words import Planned, heading_of, rows_of

_WIDTH, _HEIGHT, _COLUMNS = 640, 120, 320


def plan_html(plan: Planned) -> str:
    """A plan as a piece of HTML without script."""
    rows = tuple(rows_of(plan))
    table = Grid(title=heading_of(plan), headings=("", ""), rows=rows, texts=True)
    return table.to_html() + _picture(plan)


def _picture(plan: Planned) -> str:
    """Bytes over the operations as SVG; several operations share a column, which has their most."""
    sizes = plan.trace.timeline
    columns = max(1, min(_COLUMNS, len(sizes)))
    edges = np.linspace(0, len(sizes), columns + 1).astype(int).tolist()
    top = max(plan.budget_bytes, plan.peak_bytes, 1)
    width = _WIDTH / columns
    path = [f"M0,{_HEIGHT}"]
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        y = _HEIGHT * (1 - int(sizes[a:b].max()) / top)
        path.append(f"L{k * width:.1f},{y:.1f}H{(k + 1) * width:.1f}")
    budget = _HEIGHT * (1 - plan.budget_bytes / top) + 0.5
    label = html.escape(
        f"Bytes over {len(sizes)} operations: the peak of {format_bytes(plan.peak_bytes)} is "
        f"within the budget of {format_bytes(plan.budget_bytes, budget=True)}"
    )
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT + 1}" '
        f'width="{_WIDTH}" style="max-width:100%"><title>{label}</title>'
        f'<path d="{"".join(path)}V{_HEIGHT}Z" fill="#56b4e9"/>'
        f'<path d="M0,{budget:.1f}H{_WIDTH}" stroke="currentColor" stroke-dasharray="6 4"/></svg>'
    )
