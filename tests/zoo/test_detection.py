"""Detectors of transformers, which match boxes or masks with targets in their forward."""

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


def of_rt_detr() -> Training:
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 16],
            depths=[1] * 4,
            out_features=["stage2", "stage3", "stage4"],
            layer_type="basic",
        ),
        encoder_hidden_dim=16,
        encoder_in_channels=[16] * 3,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=8,
        decoder_in_channels=[16] * 3,
        decoder_ffn_dim=32,
        decoder_layers=3,
        decoder_attention_heads=2,
        num_denoising=0,
        num_labels=3,
        anchor_image_size=None,
        hidden_expansion=1.0,
    )
    return made("RTDetrForObjectDetection", config, 96)


def masked(kind: str, config: Any) -> Training:
    model = getattr(transformers, kind)(config)
    batch = {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "mask_labels": [torch.randint(0, 2, (count, 64, 64)).float() for count in (2, 1)],
        "class_labels": [torch.arange(count) for count in (2, 1)],
    }
    return Training(model, kwargs=batch)


def of_mask_former() -> Training:
    stages = [f"stage{k}" for k in (1, 2, 3, 4)]
    decoder = {name: size for name, size in SIZES.items() if name != "encoder_layers"}
    config = transformers.MaskFormerConfig(
        backbone_config=backbone(*stages),
        decoder_config=transformers.DetrConfig(encoder_layers=1, num_queries=5, **decoder),
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )
    return masked("MaskFormerForInstanceSegmentation", config)


def of_mask2former() -> Training:
    swin = transformers.SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=[f"stage{k}" for k in (1, 2, 3, 4)],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=64,
        num_queries=5,
        num_labels=3,
        train_num_points=64,
    )
    return masked("Mask2FormerForUniversalSegmentation", config)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
