"""The models of the zoo, fitted in place as a user has them, and trained some steps."""

from __future__ import annotations

import importlib

import pytest
import torch

from .training import Maker, assert_trains_in_place

pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* would keep keys and values:UserWarning"),
    pytest.mark.filterwarnings("ignore:`.*checkpointing.*` is deprecated:FutureWarning"),
]

SOURCES = (
    *("detection", "diffusers", "generative", "hand_written", "peft", "segmentation"),
    *("sequences_and_sets", "timm", "torchaudio", "torchvision", "transformers"),
)
MODELS: dict[str, Maker] = {
    f"{source}.{name}": make
    for source in SOURCES
    for name, make in importlib.import_module(f"tests.zoo.test_{source}").MODELS.items()
    # Plainly, torch's own checkpoint moves the statistics of its layers twice a step.
    if name != "densenet_checkpointed"
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_in_place(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_in_place(MODELS[name]())
