"""The models of the zoo, fitted in place as a user has them, and trained some steps."""

from __future__ import annotations

import pytest
import torch

from . import (
    test_diffusers,
    test_generative,
    test_hand_written,
    test_peft,
    test_segmentation,
    test_sequences_and_sets,
    test_timm,
    test_torchaudio,
    test_torchvision,
    test_transformers,
)
from .training import Maker, assert_trains_in_place

pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* would keep keys and values:UserWarning"),
    pytest.mark.filterwarnings("ignore:`.*checkpointing.*` is deprecated:FutureWarning"),
]

SOURCES = (
    test_diffusers,
    test_generative,
    test_hand_written,
    test_peft,
    test_segmentation,
    test_sequences_and_sets,
    test_timm,
    test_torchaudio,
    test_torchvision,
    test_transformers,
)
MODELS: dict[str, Maker] = {
    f"{source.__name__.rpartition('test_')[2]}.{name}": make
    for source in SOURCES
    for name, make in source.MODELS.items()
    # Plainly, torch's own checkpoint moves the statistics of its layers twice a step.
    if name != "densenet_checkpointed"
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_in_place(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_in_place(MODELS[name]())
