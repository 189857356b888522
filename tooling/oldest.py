"""Prints the oldest versions that pyproject.toml admits, as requirements for pip.

    python tooling/oldest.py test plot examples > oldest.txt

Of "torch>=2.9" it prints "torch~=2.9.0": the newest bug fixes of the oldest version promised.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_OLDEST = re.compile(r"^(?P<name>[\w.-]+)(?:\[[^]]*\])?\s*(?:>=|~=)(?P<version>[\d.]+)")


def oldest(requirement: str) -> str:
    """The oldest version of one requirement.

    Args:
        requirement: As in pyproject.toml, such as "pulp>=3.3.1,<4".

    Raises:
        ValueError: It names no oldest version.
    """
    match = _OLDEST.match(requirement)
    if match is None:
        raise ValueError(f"{requirement!r} names no oldest version; write name>=version")
    version = match["version"]
    return f"{match['name']}~={version}" + (".0" if version.count(".") == 1 else "")


def requirements(project: dict[str, object], extras: list[str]) -> list[str]:
    """Those of a project and some of its extras.

    Args:
        project: The table "project" of pyproject.toml.
        extras: Names of extras.
    """
    own, optional = project["dependencies"], project["optional-dependencies"]
    assert isinstance(own, list)
    assert isinstance(optional, dict)
    found = [*own, *(line for extra in extras for line in optional[extra])]
    return sorted({oldest(line) for line in found if not line.startswith(f"{project['name']}[")})


if __name__ == "__main__":
    with (Path(__file__).resolve().parents[1] / "pyproject.toml").open("rb") as file:
        print("\n".join(requirements(tomllib.load(file)["project"], sys.argv[1:])))
