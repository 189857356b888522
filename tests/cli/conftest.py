"""A folder with networks and a chain, from which commands are called."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.small_chains import mixed_chain

NETS = """
import torch
from torch import nn

import ckptsched as cs

ready = nn.Sequential(nn.Linear(3, 3))
number = 3


def mlp(width=8, depth=3, activation="tanh"):
    kinds = {"tanh": nn.Tanh, "relu": nn.ReLU}
    layers = [nn.Linear(4, width), kinds[activation]()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), kinds[activation]()]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def not_a_model():
    return "weights"


def ode(steps=4):
    return cs.ODEBlock(nn.Linear(4, 4), steps=steps)


class Zoo:
    mlp = staticmethod(mlp)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with networks and a chain file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "nets_of_test.py").write_text(NETS)
    mixed_chain().save(tmp_path / "chain.json")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_of_test"):
            del sys.modules[name]
