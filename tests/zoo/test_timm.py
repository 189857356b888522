"""Networks of timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .training import Maker, Training, assert_trains_within_budgets, library

timm = library("timm")


def made(name: str, side: int = 32, rows: int = 8, cuts: str = "dear", **settings: Any) -> Training:
    model = timm.create_model(name, num_classes=5, **settings)
    return Training(model, (torch.randn(rows, 3, side, side),), cuts=cuts)


VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


def of_vit() -> Training:
    return made("vit_tiny_patch16_224", **VIT, drop_rate=0.1, drop_path_rate=0.3)


def of_vit_registers() -> Training:
    return made("vit_small_patch16_rope_224", **VIT)


def of_deit_distilled() -> Training:
    return made("deit_tiny_distilled_patch16_224", **VIT)


def of_beit() -> Training:
    # Between dear calls lie stages whose tapes keep more storages than are told apart to the byte.
    return made("beit_base_patch16_224", **VIT, cuts="smallest")


def of_eva() -> Training:
    return made("eva02_tiny_patch14_224", **VIT)


def of_convnext() -> Training:
    return made("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), drop_path_rate=0.3)


def of_mixer() -> Training:
    model = timm.models.mlp_mixer.MlpMixer(
        img_size=32, patch_size=8, embed_dim=32, num_blocks=2, num_classes=5
    )
    return Training(model, (torch.randn(8, 3, 32, 32),))


def of_swin_v2() -> Training:
    settings = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16}
    return made("swinv2_tiny_window8_256", **settings, depths=(2, 2), num_heads=(2, 4))


def of_resnet() -> Training:
    return made(
        "resnet10t", block_args={"attn_layer": "se"}, channels=(8, 16, 32, 64), stem_width=8
    )


def of_efficientnet() -> Training:
    return made("tinynet_e", drop_path_rate=0.2)


def of_xcit() -> Training:
    return made("xcit_nano_12_p16_224", depth=2, embed_dim=32, num_heads=4)


def of_features() -> Training:
    return made("resnet10t", features_only=True, channels=(8, 16, 32, 64), stem_width=8)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
