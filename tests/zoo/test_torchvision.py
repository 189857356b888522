"""Networks of torchvision: classification, segmentation, detection, video, optical flow."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models import (
    convnext,
    densenet,
    detection,
    efficientnet,
    maxvit,
    optical_flow,
    segmentation,
    swin_transformer,
    video,
)
from torchvision.models._utils import IntermediateLayerGetter

import ckptsched as cs

from .training import Maker, Training, assert_trains_within_budgets


def images(side: int = 32, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, side, side)


def of_resnet() -> Training:
    return Training(
        tv.resnet.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5), (images(),)
    )


def of_resnext() -> Training:
    model = tv.resnet.ResNet(
        tv.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4, zero_init_residual=True
    )
    return Training(model, (images().to(memory_format=torch.channels_last),))


def of_densenet() -> Training:
    model = densenet.DenseNet(8, (2, 2, 2), 16, drop_rate=0.1, num_classes=5)
    return Training(model, (images(),))


def of_densenet_checkpointed() -> Training:
    model = densenet.DenseNet(8, (2, 2), 16, memory_efficient=True, num_classes=5)
    return Training(model, (images(),))


def of_mobilenet() -> Training:
    return Training(tv.mobilenet_v3_small(width_mult=0.5, num_classes=5), (images(),))


def of_efficientnet() -> Training:
    config = partial(efficientnet.MBConvConfig, width_mult=0.25, depth_mult=1.0)
    model = efficientnet.EfficientNet(
        [config(1, 3, 1, 32, 32, 1), config(4, 3, 2, 32, 64, 2), config(4, 5, 2, 64, 64, 2)],
        dropout=0.2,
        stochastic_depth_prob=0.5,
        num_classes=5,
    )
    return Training(model, (images(),))


def of_convnext() -> Training:
    blocks = [convnext.CNBlockConfig(16, 32, 2), convnext.CNBlockConfig(32, None, 2)]
    return Training(convnext.ConvNeXt(blocks, 0.5, num_classes=5), (images(),))


def of_swin() -> Training:
    model = swin_transformer.SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [4, 4], dropout=0.1, stochastic_depth_prob=0.5, num_classes=5
    )
    return Training(model, (images(),))


def of_swin_v2() -> Training:
    model = swin_transformer.SwinTransformer(
        *([2, 2], 16, [2, 2], [2, 4], [4, 4]),
        num_classes=5,
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )
    return Training(model, (images(),))


def of_vit() -> Training:
    model = tv.VisionTransformer(32, 8, 2, 4, 32, 64, dropout=0.1, num_classes=5)
    return Training(model, (images(),))


def of_maxvit() -> Training:
    model = maxvit.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 8, stochastic_depth_prob=0.2)
    return Training(model, (images(),))


def of_googlenet() -> Training:
    model = tv.GoogLeNet(num_classes=5, aux_logits=True, init_weights=False)
    return Training(model, (images(64),))


def of_shufflenet() -> Training:
    model = tv.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 64], num_classes=5)
    return Training(model, (images(),))


def of_regnet() -> Training:
    return Training(tv.regnet_y_400mf(num_classes=5), (images(),), cuts="lean")


def backbone(layers: dict[str, str]) -> nn.Module:
    whole = tv.resnet.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1])
    return IntermediateLayerGetter(whole, layers)


def of_deeplab() -> Training:
    model = segmentation.DeepLabV3(
        backbone({"layer4": "out", "layer3": "aux"}),
        segmentation.deeplabv3.DeepLabHead(512, 3, (2, 4)),
        segmentation.fcn.FCNHead(256, 3),
    )
    return Training(model, (images(),))


def targets(rows: int, side: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for row in range(rows):
        corner = torch.rand(row + 1, 2) * side / 2
        boxes = torch.cat([corner, corner + 4 + torch.rand(row + 1, 2) * side / 3], 1)
        found.append({"boxes": boxes, "labels": torch.randint(1, 4, (row + 1,))})
    return found


def pyramid() -> nn.Module:
    whole = tv.resnet.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1])
    return detection.backbone_utils.BackboneWithFPN(
        whole, {"layer2": "0", "layer3": "1"}, [128, 256], 32
    )


def refused_retinanet() -> Training:
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
    model = detection.RetinaNet(
        pyramid(), 4, min_size=64, max_size=64, anchor_generator=anchors, topk_candidates=10
    )
    return Training(model, ([*images(64)], targets(2, 64)))


def refused_fcos() -> Training:
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    model = detection.FCOS(pyramid(), 4, min_size=64, max_size=64, anchor_generator=anchors)
    return Training(model, ([*images(64)], targets(2, 64)))


def refused_faster_rcnn() -> Training:
    anchors = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,)), ((1.0,),) * 3)
    model = detection.FasterRCNN(
        pyramid(),
        4,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        box_batch_size_per_image=8,
    )
    return Training(model, ([*images(64)], targets(2, 64)))


def of_video() -> Training:
    model = video.r3d_18(num_classes=5)
    return Training(model, (torch.randn(2, 3, 4, 16, 16),))


def of_raft() -> Training:
    model = optical_flow.raft_small()
    call: dict[str, Any] = {"kwargs": {"num_flow_updates": 2}, "overestimated": True}
    return Training(model, (images(128, 1), images(128, 1)), **call)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}
REFUSED: dict[str, Maker] = {
    name.removeprefix("refused_"): make
    for name, make in globals().items()
    if name.startswith("refused_")
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_that_reads_values_in_its_own_forward_is_refused_with_the_line(name: str) -> None:
    torch.manual_seed(0)
    training = REFUSED[name]()
    with pytest.raises(
        cs.ProfileError, match=r"reads values .*detection/.*py, line \d+.*module of"
    ):
        cs.captured(training.model, *training.args)


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
