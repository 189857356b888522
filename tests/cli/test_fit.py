"""`ckptsched fit`: the forecast of a model that is never run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import ckptsched as cs
from ckptsched.cli.commands import main

NETS = """
from torch import nn


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, ids, mask):
        x = self.words(ids)
        return self.out(x * mask.unsqueeze(-1) if mask.all() else x)


class ReadsData(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 4)
        self.scale = self.line.weight.sum().item()

    def forward(self, x):
        return self.line(x)
"""


@pytest.fixture
def nets(folder: Path) -> Path:
    (folder / "named_of_test.py").write_text(NETS)
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["fit", *arguments])


def test_it_prints_what_the_function_tells(folder: Path) -> None:
    options = ("--device", "T4", "--optimizer", "sgd", "--dtype", "fp16", "--arg", "depth=2")
    result = run("nets_of_test:mlp", "--input", "6x4", *options)
    assert result.exit_code == 0, result.output
    layers = [m for i in (4, 8, 8) for m in (torch.nn.Linear(i, 8), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 2))
    asked = {"device": "T4", "optimizer": "sgd", "dtype": "fp16"}
    found = cs.will_it_fit(model, torch.zeros(6, 4), **asked)
    assert result.stdout == f"{found}\n"
    result = run("nets_of_test:mlp", "--input", "6x4", *options, "--json", "-")
    assert json.loads(result.stdout) == found.to_json()


def test_inputs_have_names_and_dtypes(nets: Path) -> None:
    inputs = ("--input", "ids=int64:8x12", "--input", "mask=bool:8x12")
    result = run("named_of_test:Named", *inputs, "--device-memory", "1MiB", "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["plain_bytes"]["batch"] == 8 * 12 * (8 + 1)
    assert found["plain_bytes"]["parameters"] == 4 * (50 * 16 + 16 * 50 + 50)


def test_a_model_that_reads_data_while_it_is_made_is_made_with_data(nets: Path) -> None:
    result = run("named_of_test:ReadsData", "--input", "8x4", "--device", "L4")
    assert result.exit_code == 0, result.output


def test_the_exit_code_says_whether_a_plan_fits(folder: Path) -> None:
    result = run("nets_of_test:mlp", "--input", "600x4", "--device-memory", "4kB")
    assert result.exit_code == 1
    assert "no plan fits" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a model needs inputs: give their shapes"),
        (("--input", "6y4"), "the input '6y4' is not a shape"),
        (("--input", "complex64:6x4"), "the dtype 'complex64' is unknown; give one of float32"),
        (("--input", "a=6x4", "--input", "a=6x4"), "'a' comes twice"),
        (("--input", "1a=6x4"), "'1a' is no name of an argument"),
        (("--input", "6x4"), "neither a device nor its memory was given"),
        (("--input", "6x4", "--device", "H1000"), "did you mean H100?"),
    ],
)
def test_what_cannot_be_asked_is_said(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("nets_of_test:mlp", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
