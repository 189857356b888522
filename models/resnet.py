"""Residual networks in which every block that keeps its shape is an ODE block.

Reference:
    Gholami, Keutzer, Biros, ANODE (arXiv 1902.10298), and the code released with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ckptsched.ode import ODEBlock


def ode_resnet18(
    num_classes: int = 10,
    method: str = "euler",
    steps: int = 2,
    width: int = 64,
    in_channels: int = 3,
) -> nn.Sequential:
    """ResNet-18 for images of about 32x32 pixels, with four ODE blocks, as in the paper.

    With `method="euler"` and one step it is the ordinary ResNet-18 for CIFAR but for the ReLU
    that ends f, in number of parameters, too.

    Args:
        num_classes: Outputs, at least 1.
        method: Integrator, as `ODEBlock` takes it.
        steps: Time steps of each ODE block.
        width: Channels of the first group; the others have 2, 4 and 8 times as many.
        in_channels: Channels of the images.

    Returns:
        A chain for inputs of shape (batch, in_channels, height, width).
    """
    return _ode_resnet(
        stem=_stem(in_channels, width, stride=1),
        widths=(width, 2 * width, 4 * width, 8 * width),
        num_classes=num_classes,
        method=method,
        steps=steps,
    )


def ode_resnet_small(
    num_classes: int = 10,
    method: str = "rk4",
    steps: int = 8,
    widths: tuple[int, int, int, int] = (16, 16, 32, 32),
    in_channels: int = 1,
) -> nn.Sequential:
    """The network of `ode_resnet18`, narrow enough to train on a few CPU cores.

    The stem halves the resolution; otherwise only the widths differ.

    Args:
        num_classes: Outputs, at least 1.
        method: Integrator, as `ODEBlock` takes it.
        steps: Time steps of each ODE block.
        widths: Channels of the four groups.
        in_channels: Channels of the images.

    Returns:
        A chain for inputs of shape (batch, in_channels, height, width).
    """
    return _ode_resnet(
        stem=_stem(in_channels, widths[0], stride=2),
        widths=widths,
        num_classes=num_classes,
        method=method,
        steps=steps,
    )


class Transition(nn.Module):
    """The ordinary residual block that opens a group: it may change channels and resolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Build ReLU(BN(conv(ReLU(BN(conv x)))) + shortcut(x)).

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            stride: By which height and width shrink.
        """
        super().__init__()
        self.residual = nn.Sequential(
            _conv3x3(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            _conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, height, width) to (batch, out, height / stride, width / stride)."""
        return torch.relu(self.residual(x) + self.shortcut(x))


def _ode_resnet(
    *, stem: nn.Module, widths: Sequence[int], num_classes: int, method: str, steps: int
) -> nn.Sequential:
    """Stem, groups of a transition and an ODE block, head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    before = widths[0]
    for group, channels in enumerate(widths, start=1):
        stride = 1 if group == 1 else 2
        layers[f"transition{group}"] = Transition(before, channels, stride)
        layers[f"ode{group}"] = ODEBlock(_right_hand_side(channels), method=method, steps=steps)
        before = channels
    layers["head"] = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)
    )
    return nn.Sequential(layers)


def _right_hand_side(channels: int) -> nn.Sequential:
    """ReLU(BN(conv(ReLU(BN(conv z))))): no shortcut, since the integrator adds z."""
    return nn.Sequential(
        _conv3x3(channels, channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        _conv3x3(channels, channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _stem(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        _conv3x3(in_channels, channels, stride), nn.BatchNorm2d(channels), nn.ReLU()
    )


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    # No bias: batch normalization follows and would take it away again.
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
