"""The explorer's page: one file of HTML with its style, script and data, that asks for nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from ..plan_words import Workload
from .content import Front, Shown, page_data

SCRIPTS = ("data.js", "words.js", "timeline.js", "details.js", "front.js", "network.js", "page.js")
"""The script, in the order in which its files are read."""


def page_of(
    chain: Workload, shown: Sequence[Shown], front: Front | None = None, selected: int = 0
) -> str:
    """A page that shows plans of a chain or graph.

    Args:
        chain: What was planned.
        shown: The plans, of the least budget first.
        front: What the picture of the trade-off has besides the plans.
        selected: Which of the plans is shown first.

    Returns:
        HTML that needs no other file.
    """
    return page_from(page_data(chain, shown, front or Front(), selected))


def page_from(data: dict[str, Any]) -> str:
    """The page with some data; see `content.page_data`."""
    parts = {
        "TITLE": html.escape(str(data["title"])),
        "STYLE": asset("style.css"),
        "DATA": _inside_script(json.dumps(data, separators=(",", ":"), allow_nan=False)),
        "SCRIPT": "\n".join(asset(name) for name in SCRIPTS),
    }
    # Piece by piece, so that a name of a module that looks like a mark stays what it is.
    found = asset("page.html")
    pieces = []
    for name in parts:
        before, _, found = found.partition(f"<!--{name}-->")
        pieces += [before, parts[name]]
    return "".join([*pieces, found])


def asset(name: str) -> str:
    """The text of one of the page's source files."""
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _inside_script(text: str) -> str:
    """JSON that ends no element and begins no comment of HTML, whatever names it has."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
