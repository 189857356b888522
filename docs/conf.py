"""Settings of Sphinx for the site: `make docs` builds it under build/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # what is documented is this copy of the package

import ckptsched  # noqa: E402
import ckptsched.ode  # noqa: E402

project = "ckptsched"
author = "The ckptsched authors"
copyright = f"{author}. Apache-2.0"
version = release = ckptsched.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["Thumbs.db", ".DS_Store"]
language = "en"
default_role = "code"  # single backticks in docstrings, as in Markdown
pygments_style, pygments_dark_style = "friendly", "github-dark"

html_theme = "furo"
html_title = "ckptsched"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 4  # links to headings, as GitHub has them
suppress_warnings = ["config.cache"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Callbacks of trainers are described without what they are for.
autodoc_mock_imports = ["lightning", "transformers"]
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False

# Pages that are checked by `make docs-links` alone, which needs the net.
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False


class LinkedNames(SphinxTransform):
    """`plan`, `cs.plan(...)` or `ckptsched.plan` in code becomes a link to its description."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Put a reference around each such piece of code that is not within one already."""
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().partition("(")[0]
            for prefix in ("cs.", "ckptsched."):
                name = name.removeprefix(prefix)
            short = name == literal.astext()
            if name.partition(".")[0] not in self._names(short) or _within_link(literal):
                continue
            reference = pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=f"ckptsched.{name}",
                refexplicit=True,
                refwarn=False,
            )
            literal.replace_self(reference)
            reference += literal

    def _names(self, short: bool) -> set[str]:
        """The names that are linked: bare ones only where that is not another word."""
        names = set(ckptsched.__all__) | set(ckptsched._FOR_TRAINERS)
        if short and self.env.docname != "api":
            names = {name for name in names if name != name.lower() or "_" in name}
        return names


def _within_link(node: nodes.Node) -> bool:
    parent = node.parent
    while parent is not None:
        if isinstance(parent, nodes.reference | nodes.title | pending_xref):
            return True
        parent = parent.parent
    return False


class DarkTwins(SphinxTransform):
    """A picture `x.png` beside which there is `x-dark.png` is shown as that on dark pages."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Put the dark picture after the light one, and let each be seen on its pages alone."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for light in list(self.document.findall(nodes.image)):
            path = Path(light["uri"])
            twin = path.with_name(f"{path.stem}-dark{path.suffix}")
            if (folder / twin).exists():
                dark = light.copy()
                dark["uri"] = twin.as_posix()
                light["classes"].append("only-light")
                dark["classes"] = ["only-dark"]
                light.parent.insert(light.parent.index(light) + 1, dark)


def describe(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace `<!-- described: TITLE -->` by what docstrings say of the names in that table.

    Tables are those of api.md. `ckptsched.ode` in place of a title stands for what only that
    folder exports.
    """
    source[0] = re.sub(
        r"^<!-- described: (.*) -->$", lambda found: _described(found[1]), source[0], flags=re.M
    )


def _described(what: str) -> str:
    if what == "ckptsched.ode":
        names = [name for name in vars(ckptsched.ode) if name[0] != "_"]
        home, names = ckptsched.ode, [name for name in names if name not in ckptsched.__all__]
    else:
        text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
        table = re.search(rf"^## {re.escape(what)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        if table is None:
            raise ValueError(f"docs/api.md has no section {what!r}")
        home, names = ckptsched, re.findall(r"^\| `([A-Za-z]\w*)", table[1], re.M)
    parts = [_directive(f"{home.__name__}.{name}", getattr(home, name)) for name in names]
    return "\n".join(["```{eval-rst}", *parts, "```"])


def _directive(name: str, value: object) -> str:
    """What has autodoc describe a name; nothing for a module."""
    if isinstance(value, ModuleType):
        return ""
    if isinstance(value, type):
        kind = "autoexception" if issubclass(value, Exception) else "autoclass"
        return f".. {kind}:: {name}\n   :members:\n   :show-inheritance:\n"
    if callable(value):
        return f".. autofunction:: {name}\n"
    return f".. autodata:: {name}\n   :no-value:\n"


def attributes_have_no_types(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep napoleon from reading what stands before a colon as an attribute's type."""
    if what in ("attribute", "data", "property") and lines:
        lines[:0] = ["..", ""]  # an empty comment, in which there is no colon


def setup(app: Sphinx) -> None:
    """Add the links, and the descriptions of names."""
    app.add_transform(LinkedNames)
    app.add_transform(DarkTwins)
    app.connect("source-read", describe)
    app.connect("autodoc-process-docstring", attributes_have_no_types, priority=400)
