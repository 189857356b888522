"""What recording takes: peak bytes and seconds of `captured` over those of a forward pass.

    python -m benchmarks.recorded.recording

Each row is one model. The forward pass is one under `torch.no_grad`, measured beside it in the same
process; bytes are those beyond what the model itself takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.meters import default_meter

_TIMES = 3


class Layer(nn.Module):
    """A layer of a transformer, written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(rows, length, 3, 4, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Stack(nn.Module):
    """Layers one after the other."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Convolutions(nn.Module):
    """Convolutions with batch normalization, in place, with shortcuts."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(layers)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.relu(norm(conv(x)), inplace=True)
        return x


def models() -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Name, model and sample: with more parameters than activations, and with fewer."""
    yield "transformer, small batch", Stack(256, 12), (torch.randn(1, 64, 256),)
    yield "transformer, large batch", Stack(128, 12), (torch.randn(8, 128, 128),)
    yield "convolutions", Convolutions(32, 12), (torch.randn(8, 3, 32, 32),)


def least(run: Callable[[], Any]) -> float:
    """The least processor seconds of some runs."""
    found = []
    for _ in range(_TIMES):
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return min(found)


def table() -> str:
    """The figures."""
    lines = ["| model | peak | seconds |", "| --- | --- | --- |"]
    for name, model, sample in models():
        meter = default_meter("cpu")

        def forward(model: nn.Module = model, sample: tuple[Tensor, ...] = sample) -> None:
            with torch.no_grad():
                model(*sample)

        def recorded(model: nn.Module = model, sample: tuple[Tensor, ...] = sample) -> None:
            cs.captured(model, *sample)

        forward()
        recorded()
        _, plain = meter.measure(forward)
        _, ours = meter.measure(recorded)
        peak = ours.peak_bytes / plain.peak_bytes
        lines.append(f"| {name} | {peak:.2f} | {least(recorded) / least(forward):.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
