"""The examples of trainers: each trains as without a plan, and shows that it keeps its budget."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from examples import train_accelerate, train_hf_trainer, train_lightning, train_loops

# Of the libraries' own, here are warnings of many kinds.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::ckptsched.base.errors.BudgetWarning"),
]

TEXTS = ["--layers", "2", "--batch", "8", "--limit", "20", "--epochs", "1"]
IMAGES = ["--batch", "32", "--limit", "80", "--epochs", "1"]
EXAMPLES = {
    "hugging face": (train_hf_trainer, TEXTS),
    "lightning": (train_lightning, [*IMAGES, "--method", "euler", "--steps", "3"]),
    "accelerate": (train_accelerate, TEXTS),
    "accelerate, bf16": (train_accelerate, [*TEXTS, "--precision", "bf16", "--accumulate", "2"]),
    "torchvision": (train_loops, [*IMAGES, "--layers", "2"]),
    "timm": (train_loops, [*IMAGES, "--layers", "2", "--loop", "timm"]),
}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """What accelerate keeps for the process, taken back: it has one precision for all."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_a_trainer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example, arguments = EXAMPLES[name]
    planned = run(example, [*arguments, "--budget", "75%"])
    printed = capsys.readouterr().out
    plain = run(example, [*arguments, "--budget", "none"])
    assert planned.losses == plain.losses
    assert len(plain.losses) == 3
    assert plain.verification is None
    expected = plain.state_dict() if name == "lightning" else plain.model.state_dict()
    found = planned.state_dict() if name == "lightning" else planned.model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    compared = planned.verification
    assert compared.ok
    assert compared.max_gradient_difference == 0
    assert compared.measured_peak_bytes <= compared.budget_bytes < compared.plain_peak_bytes
    for line in ("asked for as 75%", "measured peak", "largest gradient difference  0"):
        assert line in printed


def run(example: ModuleType, arguments: list[str]) -> Any:
    AcceleratorState._reset_state(True)
    return example.main(arguments)
