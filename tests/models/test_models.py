"""The networks of the ANODE paper: shapes, counts, and that each becomes the chain it should."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import models
from ckptsched.capture.stage_discovery import Outline, trace
from ckptsched.ode import ODEBlock, find_tableau
from models import deep_mlp, ode_mlp, ode_resnet18, ode_resnet_small, ode_squeezenext23

IMAGE_MODELS = [(ode_resnet18, 3), (ode_resnet_small, 1), (ode_squeezenext23, 3)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ode_blocks(model: nn.Module) -> list[ODEBlock]:
    return [m for m in model.modules() if isinstance(m, ODEBlock)]


@pytest.mark.parametrize(("build", "channels"), IMAGE_MODELS)
@pytest.mark.parametrize("classes", [1, 10, 100])
def test_logits_have_one_column_a_class(
    build: Callable[..., nn.Sequential], channels: int, classes: int
) -> None:
    model = build(num_classes=classes, method="euler", steps=1)
    assert model(torch.zeros(2, channels, 32, 32)).shape == (2, classes)


@pytest.mark.parametrize(("build", "channels"), IMAGE_MODELS)
def test_image_models_are_stem_four_groups_and_head(
    build: Callable[..., nn.Sequential], channels: int
) -> None:
    model = build(method="rk4", steps=3)
    groups = [f"{kind}{group}" for group in range(1, 5) for kind in ("transition", "ode")]
    blocks = trace(Outline.of(model))
    assert [block.name for block in blocks] == ["stem", *groups, "head"]
    for block in blocks:
        if block.name.startswith("ode"):
            assert isinstance(block.module, ODEBlock)
            assert [s.name for s in block.stages] == [f"{block.name}.step[{i}]" for i in range(3)]
        elif block.name.startswith("transition"):
            assert len(block.stages) == 1
    assert len(ode_blocks(model)) == 4


@pytest.mark.parametrize(("build", "channels"), IMAGE_MODELS)
def test_a_group_changes_shape_in_its_transition_only(
    build: Callable[..., nn.Sequential], channels: int
) -> None:
    state = torch.zeros(1, channels, 32, 32)
    sides = []
    for block in trace(Outline.of(build(steps=1))):
        before = state.shape
        for stage in block.stages:
            state = stage(state)
        if isinstance(block.module, ODEBlock):
            assert state.shape == before
            sides.append(state.shape[-1])
    first = 16 if build is ode_resnet_small else 32
    assert sides == [first, first // 2, first // 4, first // 8]


@pytest.mark.parametrize(
    ("build", "arguments", "expected"),
    [
        # The ordinary ResNet-18 for CIFAR-10 has as many: f has the layers of a basic block.
        (ode_resnet18, {}, 11_173_962),
        (ode_resnet18, {"num_classes": 100}, 11_220_132),
        (ode_squeezenext23, {}, 461_466),
        (ode_resnet_small, {}, 90_778),
        (ode_mlp, {}, 4 * (16 * 16 + 16)),
        (deep_mlp, {"width": 4, "depth": 3}, 3 * (4 * 4 + 4)),
    ],
)
def test_parameter_counts(
    build: Callable[..., nn.Sequential], arguments: dict[str, int], expected: int
) -> None:
    assert parameters(build(**arguments)) == expected


@pytest.mark.parametrize(("build", "channels"), IMAGE_MODELS)
def test_steps_and_method_add_no_parameters(
    build: Callable[..., nn.Sequential], channels: int
) -> None:
    model = build(method="rk4", steps=7)
    assert parameters(model) == parameters(build(method="euler", steps=1))
    for block in ode_blocks(model):
        assert (block.tableau, block.steps) == (find_tableau("rk4"), 7)


def test_squeezenext_f_is_the_papers() -> None:
    block = ode_blocks(ode_squeezenext23())[1]
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    found = [(c.in_channels, c.out_channels, c.kernel_size) for c in convolutions]
    assert found == [
        (64, 32, (1, 1)),
        (32, 16, (1, 1)),
        (16, 32, (1, 3)),
        (32, 32, (3, 1)),
        (32, 64, (1, 1)),
    ]
    assert all(c.bias is not None for c in convolutions)


def test_resnet_f_is_the_papers() -> None:
    f = ode_blocks(ode_resnet18(width=8))[0].f
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in f] == kinds * 2
    assert (f(torch.randn(2, 8, 4, 4)) >= 0).all()


def test_width_scales_all_groups() -> None:
    channels = [
        next(iter(block.parameters())).shape[0] for block in ode_blocks(ode_resnet18(width=4))
    ]
    assert channels == [4, 8, 16, 32]


def test_mlps_are_chains_of_the_stated_length() -> None:
    assert [len(block.stages) for block in trace(Outline.of(ode_mlp(steps=5)))] == [1, 5, 1]
    deep = Outline.of(deep_mlp(width=4, depth=3))
    assert [len(block.stages) for block in trace(deep)] == [2, 2, 2]
    assert ode_mlp(width=4)(torch.zeros(3, 4)).shape == (3, 4)
    assert deep_mlp(width=4)(torch.zeros(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("name", [n for n in dir(models) if n.startswith(("ode_", "deep_"))])
def test_every_model_is_built_without_arguments(name: str) -> None:
    assert isinstance(getattr(models, name)(), nn.Sequential)


@pytest.mark.parametrize("method", ["euler", "heun", "rk4"])
def test_gradients_at_the_start_are_finite_and_reach_every_parameter(method: str) -> None:
    torch.manual_seed(0)
    model = ode_resnet_small(method=method, steps=4, widths=(4, 4, 8, 8))
    loss = nn.functional.cross_entropy(model(torch.randn(8, 1, 32, 32)), torch.arange(8))
    loss.backward()
    assert loss.item() < 10
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
