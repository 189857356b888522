"""The pages of the documentation: their code, headings and links, as the tests read them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SITE = sorted(DOCS.glob("**/*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE]


def name_of(page: Path) -> str:
    """A page's path below the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def python_in(page: Path) -> str:
    """The Python of a page, one program, each line where it stands on the page.

    Blocks within an HTML comment count, too: they make ready what readers have already.
    """
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside = inside and line != "```"
        kept.append(line if inside else "")
        inside = inside or line == "```python"
    return "\n".join(kept)


def libraries_of(code: str) -> set[str]:
    """The top-level modules that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^(```+).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    """What links to headings of a page may name, as GitHub and MyST make it of them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}
