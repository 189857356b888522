"""Networks of segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .training import Maker, Training, assert_trains_within_budgets, library

smp = library("segmentation_models_pytorch")


ENCODER = "tu-tf_mobilenetv3_small_minimal_100"


def made(kind: str, encoder: str = ENCODER, **settings: Any) -> Training:
    model = getattr(smp, kind)(encoder, encoder_weights=None, classes=3, **settings)
    return Training(model, (torch.randn(2, 3, 64, 64),))


SMALL: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (32, 16, 16)}


def of_unet() -> Training:
    return made("Unet", **SMALL, decoder_attention_type="scse")


def of_unet_plus() -> Training:
    return made("UnetPlusPlus", **SMALL, aux_params={"classes": 2, "dropout": 0.2})


def of_fpn() -> Training:
    return made("FPN", decoder_pyramid_channels=16, decoder_segmentation_channels=32)


def of_deeplab_plus() -> Training:
    return made("DeepLabV3Plus", decoder_channels=16)


def of_linknet() -> Training:
    return made("Linknet", encoder_depth=3)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
