"""Where an object walks through the package, followed through real calls.

    python tooling/walk.py
    python tooling/walk.py --each

Two networks are fitted and trained for one step each: a chain as it is, and one that is recorded.
Every call of a function of the package is looked at that is given the very object as an argument:
the model itself, or a schedule. In the order in which these calls happen,

- a *file* is one with such a function in it,
- a *stay* is a run of such calls in one file,
- a *climb* is a step from a stay to one in a folder that comes before it in the order in which
  folders import each other: the object goes back to where it has been or should have been.

Attributes, closures and objects that hold the object are not counted, nor methods of its own: to
ask an inspection, or the object itself, is no walk. Where a generator goes on it is not counted
again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import ckptsched
from ckptsched.schedule.language import Schedule
from tests.test_architecture import FOLDERS

_PACKAGE = Path(ckptsched.__file__).parent
_RESUMES = 3  # these bits of RESUME's argument are set where a generator goes on


@dataclass
class Walk:
    """The calls that were given an object, in order."""

    is_it: Callable[[object], bool]
    calls: list[tuple[str, str]] = field(default_factory=list)
    """The file, below the package, and the function of each."""

    def look(self, frame: FrameType, event: str, argument: object) -> None:
        """Note a call, as `sys.setprofile` tells of it."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(_PACKAGE)):
            return
        if code.co_code[frame.f_lasti + 1] & _RESUMES:
            return
        count = code.co_argcount + code.co_kwonlyargcount
        values = frame.f_locals
        given = [self.is_it(values.get(name)) for name in code.co_varnames[:count]]
        if any(given) and not (given[0] and code.co_varnames[0] == "self"):
            file = Path(code.co_filename).relative_to(_PACKAGE).as_posix()
            self.calls.append((file, code.co_qualname))

    @property
    def stays(self) -> list[str]:
        """The files in which the object stays, one after the other."""
        files = [file for file, _ in self.calls]
        return [file for i, file in enumerate(files) if not i or file != files[i - 1]]

    @property
    def climbs(self) -> int:
        """How often it goes back to an earlier folder."""
        ranks = [_rank(file) for file in self.stays]
        return sum(now < before for before, now in pairwise(ranks))

    def __str__(self) -> str:
        return f"{len(self.stays)} stays, {len(set(self.stays))} files, {self.climbs} climbs"


def _rank(file: str) -> int:
    folder = file.partition("/")[0]
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


@contextmanager
def followed(is_it: Callable[[object], bool]) -> Iterator[Walk]:
    """Follow an object while the block runs.

    Args:
        is_it: Whether a value is the object.
    """
    walk = Walk(is_it)
    sys.setprofile(walk.look)
    try:
        yield walk
    finally:
        sys.setprofile(None)


class Recorded(nn.Module):
    """A small network that is no chain: two paths that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: shape (batch, 64)."""
        y = torch.tanh(self.first(x))
        return torch.relu(self.second(y)) + y


def model_walk(model: nn.Module) -> Walk:
    """Follow a model from `fit` through the first step.

    Args:
        model: Takes shape (batch, 64).
    """
    x = torch.randn(4096, 64)
    with followed(lambda value: value is model) as walk:
        ckptsched.fit(model, x, budget="90%")
        model(x).sum().backward()
    return walk


def schedule_walk(model: nn.Module) -> Walk:
    """Follow the schedules of a plan from the solver through the first step.

    Args:
        model: Takes shape (batch, 64).
    """
    x = torch.randn(4096, 64)
    chain = ckptsched.profile(model, x)
    with followed(lambda value: isinstance(value, Schedule)) as walk:
        plan = ckptsched.plan(chain, budget="90%", cache=False)
        ckptsched.checkpointed(model, plan)(x).sum().backward()
    return walk


def main() -> None:
    """Print how far a model and a schedule walk."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--each", action="store_true", help="print each stay, and its functions")
    each = parser.parse_args().each
    torch.manual_seed(0)
    layers = [module for _ in range(12) for module in (nn.Linear(64, 64), nn.Tanh())]
    chain = nn.Sequential(*layers)
    walks = {
        "model, a chain": model_walk(chain),
        "model, recorded": model_walk(Recorded()),
        "schedule": schedule_walk(nn.Sequential(*layers)),
    }
    for name, walk in walks.items():
        print(f"{name}: {walk}")
        if each:
            for (file, function), count in Counter(walk.calls).items():
                print(f"  {count:4} {file} {function}")


if __name__ == "__main__":
    main()
