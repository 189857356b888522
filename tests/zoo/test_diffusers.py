"""Denoisers and an autoencoder of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .training import Maker, Training, assert_trains_within_budgets, library

diffusers = library("diffusers")

LATENT = (2, 4, 8, 8)


def of_unet() -> Training:
    model = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        dropout=0.1,
    )
    return Training(model, (torch.randn(2, 3, 16, 16), torch.tensor([3, 700])))


def of_unet_conditional() -> Training:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    kwargs = {"encoder_hidden_states": torch.randn(2, 7, 16)}
    return Training(model, (torch.randn(LATENT), torch.tensor([3, 700])), kwargs)


def of_autoencoder() -> Training:
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return Training(model, (torch.randn(2, 3, 16, 16),), {"sample_posterior": True})


def of_dit() -> Training:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=100,
    )
    kwargs = {"timestep": torch.tensor([3, 70]), "class_labels": torch.tensor([1, 5])}
    return Training(model, (torch.randn(LATENT),), kwargs)


def of_flux() -> Training:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    kwargs: dict[str, Any] = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(6, 3),
    }
    return Training(model, kwargs=kwargs)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
