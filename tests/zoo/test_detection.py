"""Detectors of transformers, which match boxes with targets in their forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .training import Maker, Training, assert_trains_within_budgets, library

transformers = library("transformers")

SIZES = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def labels() -> list[dict[str, torch.Tensor]]:
    """Two images, of two objects and of one."""
    return [
        {
            "class_labels": torch.arange(count),
            "boxes": torch.rand(count, 4) * 0.2 + torch.tensor([0.3, 0.3, 0.1, 0.1]),
        }
        for count in (2, 1)
    ]


def made(kind: str, config: Any, side: int = 64) -> Training:
    model = getattr(transformers, kind)(config)
    batch = {"pixel_values": torch.randn(2, 3, side, side), "labels": labels()}
    return Training(model, kwargs=batch)


def backbone(*stages: str) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, out_features=[*stages]
    )


def of_detr() -> Training:
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone("stage1"),
        num_queries=5,
        num_labels=3,
        **SIZES,
    )
    return made("DetrForObjectDetection", config)


def of_conditional_detr() -> Training:
    config = transformers.ConditionalDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone("stage1"),
        num_queries=5,
        num_labels=3,
        auxiliary_loss=True,
        **SIZES,
    )
    return made("ConditionalDetrForObjectDetection", config)


def of_deformable_detr() -> Training:
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone("stage2", "stage3", "stage4"),
        num_feature_levels=3,
        num_queries=5,
        num_labels=3,
        **SIZES,
    )
    return made("DeformableDetrForObjectDetection", config)


def of_yolos() -> Training:
    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        num_labels=3,
    )
    return made("YolosForObjectDetection", config, 32)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
