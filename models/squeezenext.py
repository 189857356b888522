"""SqueezeNext in which every block that keeps its shape is an ODE block.

Reference:
    Gholami, Keutzer, Biros, ANODE (arXiv 1902.10298), and the code released with it, where
    the network is called SqNxt_23_1x.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from ckptsched.ode import ODEBlock

_STEM_CHANNELS = 64
_GROUP_CHANNELS = (32, 64, 128, 256)
_HEAD_CHANNELS = 128


def ode_squeezenext23(
    num_classes: int = 10, method: str = "euler", steps: int = 2, in_channels: int = 3
) -> nn.Sequential:
    """SqueezeNext-23 for images of about 32x32 pixels, with four ODE blocks, as in the paper.

    Args:
        num_classes: Outputs, at least 1.
        method: Integrator, as `ODEBlock` takes it.
        steps: Time steps of each ODE block.
        in_channels: Channels of the images.

    Returns:
        A chain for inputs of shape (batch, in_channels, height, width).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Sequential(*_unit(in_channels, _STEM_CHANNELS, 3))
    )
    before = _STEM_CHANNELS
    for group, channels in enumerate(_GROUP_CHANNELS, start=1):
        stride = 1 if group == 1 else 2
        layers[f"transition{group}"] = Transition(before, channels, stride)
        layers[f"ode{group}"] = ODEBlock(
            _squeeze(channels, channels, inner=channels // 2), method=method, steps=steps
        )
        before = channels
    layers["head"] = nn.Sequential(
        *_unit(before, _HEAD_CHANNELS, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(_HEAD_CHANNELS, num_classes),
    )
    return nn.Sequential(layers)


class Transition(nn.Module):
    """The ordinary block that opens a group: it changes channels and may halve the resolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Build ReLU(squeeze(x) + ReLU(shortcut(x))).

        Args:
            in_channels: Channels of the input; differ from those of the output.
            out_channels: Channels of the output.
            stride: By which height and width shrink.
        """
        super().__init__()
        # Where the resolution halves, the first convolution keeps the channels; where the
        # channels become fewer, it squeezes twice as hard.
        inner = in_channels if stride == 2 else in_channels // 4
        self.squeeze = _squeeze(in_channels, out_channels, inner=inner, stride=stride)
        self.shortcut = nn.Sequential(*_unit(in_channels, out_channels, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, height, width) to (batch, out, height / stride, width / stride)."""
        return torch.relu(self.squeeze(x) + self.shortcut(x))


def _squeeze(in_channels: int, out_channels: int, *, inner: int, stride: int = 1) -> nn.Sequential:
    """Two 1x1 convolutions down, 1x3 and 3x1 in place of 3x3, one 1x1 up again."""
    return nn.Sequential(
        *_unit(in_channels, inner, 1, stride),
        *_unit(inner, inner // 2, 1),
        *_unit(inner // 2, inner, (1, 3)),
        *_unit(inner, inner, (3, 1)),
        *_unit(inner, out_channels, 1),
    )


def _unit(
    in_channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]:
    """Convolution that keeps the resolution up to its stride, batch normalization, ReLU."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    # The bias is the released code's, though batch normalization takes it away again.
    conv = nn.Conv2d(
        in_channels, out_channels, (height, width), stride, (height // 2, width // 2), bias=True
    )
    nn.init.xavier_normal_(conv.weight, gain=math.sqrt(2))
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU()
