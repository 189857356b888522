"""The networks of the executor's benchmark, as chains that every method runs in its own way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ckptsched import StagedModule
from ckptsched.capture.stage_discovery import ModuleStage, Outline, StageCall, TracedBlock, trace
from ckptsched.ode import ODEBlock
from models import ode_mlp, ode_resnet18, ode_squeezenext23


@final
@dataclass(frozen=True)
class Network:
    """One model with its batch and its loss."""

    name: str
    model: nn.Module
    x: Tensor
    loss: Callable[[Any], Tensor]
    what: str
    """Sizes, for people."""
    finer: nn.Module | None = None
    """The same parameters and operations in more stages, for us alone."""

    @property
    def blocks(self) -> tuple[TracedBlock, ...]:
        """What is checkpointed per block: the modules that a user's `nn.Sequential` lists."""
        return trace(Outline.of(self.model))

    @property
    def steps(self) -> tuple[StageCall, ...]:
        """What is checkpointed per step: the finest pieces, which are our stages, too."""
        return tuple(stage for block in self.blocks for stage in block.stages)

    @property
    def solves_odes(self) -> bool:
        """Whether it has ODE blocks, as the ANODE method wants them."""
        return any(isinstance(block.module, ODEBlock) for block in self.blocks)

    def step(self, forward: Callable[[Tensor], Any]) -> Tensor:
        """One training step without the optimizer's part; returns the loss."""
        output = forward(self.x)  # held until the end, as a training loop holds it
        value = self.loss(output)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()


Maker = Callable[[torch.device, bool], Network]


def make(name: str, device: torch.device, quick: bool) -> Network:
    """A network of `NETWORKS`, from the same random numbers each time."""
    torch.manual_seed(0)
    return NETWORKS[name](device, quick)


def _classifier(name: str, model: nn.Module, x: Tensor, what: str) -> Network:
    labels = torch.arange(len(x), device=x.device) % 10
    return Network(name, model.to(x.device), x, lambda y: functional.cross_entropy(y, labels), what)


def _ode_resnet(device: torch.device, quick: bool) -> Network:
    width, steps, batch = (8, 4, 2) if quick else (24, 16, 8)
    model = ode_resnet18(method="euler", steps=steps, width=width)
    what = f"ODE ResNet-18 of width {width}, Euler, {steps} steps a block, {batch}x3x32x32"
    return _classifier("ode-resnet", model, torch.randn(batch, 3, 32, 32, device=device), what)


def _ode_squeezenext(device: torch.device, quick: bool) -> Network:
    steps, batch = (2, 2) if quick else (16, 8)
    model = ode_squeezenext23(method="euler", steps=steps)
    what = f"ODE SqueezeNext-23, Euler, {steps} steps a block, {batch}x3x32x32"
    return _classifier("ode-squeezenext", model, torch.randn(batch, 3, 32, 32, device=device), what)


def _mlp(device: torch.device, quick: bool) -> Network:
    steps, batch = (30, 16) if quick else (1000, 128)
    what = f"an MLP of width 16 as right-hand side, RK4, {steps} steps, batch {batch}"
    x = torch.randn(batch, 16, device=device)
    return _classifier("mlp-rk4", ode_mlp(16, "rk4", steps), x, what)


class Normed(nn.Module):
    """x to (x, f(norm(x))): the first stage of a residual branch."""

    def __init__(self, norm: nn.Module, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = norm, f

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.f(self.norm(x))


class Beside(nn.Module):
    """(x, h) to (x, f(h))."""

    def __init__(self, *f: nn.Module) -> None:
        super().__init__()
        self.f = nn.Sequential(*f)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0], self.f(pair[1])


class Added(nn.Module):
    """(x, h) to shortcut(x) + f(h), or ReLU of that: the last stage of a residual branch."""

    def __init__(self, f: nn.Module, shortcut: nn.Module | None = None, relu: bool = False) -> None:
        super().__init__()
        self.f, self.relu = f, relu
        self.shortcut = shortcut or nn.Identity()

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        y = self.f(pair[1])
        y += self.shortcut(pair[0])
        return functional.relu(y, inplace=True) if self.relu else y


class Parts(StagedModule):
    """Modules in order, each a stage."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def stages(self) -> list[StageCall]:
        return [ModuleStage(part) for part in self.parts]


def _fine_bottleneck(block: Any) -> Parts:
    """A stage a convolution, and one for each normalization and what follows it."""
    return Parts(
        Normed(nn.Identity(), block.conv1),
        Beside(block.bn1, nn.ReLU(inplace=True)),
        Beside(block.conv2),
        Beside(block.bn2, nn.ReLU(inplace=True)),
        Beside(block.conv3),
        Added(block.bn3, block.downsample, relu=True),
    )


def _resnet50(device: torch.device, quick: bool) -> Network:
    """The layers of torchvision's model in the order of its forward."""
    from torchvision.models import resnet50

    net = resnet50(num_classes=10).to(device)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    groups = (net.layer1, net.layer2, net.layer3, net.layer4)
    head = nn.Sequential(net.avgpool, nn.Flatten(1), net.fc)
    finer = (nn.Sequential(*(_fine_bottleneck(block) for block in group)) for group in groups)
    batch, size = (2, 32) if quick else (4, 128)
    x = torch.randn(batch, 3, size, size, device=device)
    what = f"torchvision's ResNet-50, {batch}x3x{size}x{size}; a bottleneck is a stage"
    network = _classifier("resnet50", nn.Sequential(stem, *groups, head), x, what)
    return replace(
        network,
        what=f"{what}, in finer plans a convolution, and a normalization with its ReLU",
        finer=nn.Sequential(stem, *finer, head),
    )


class Attend(nn.Module):
    """Queries, keys and values side by side to what attention makes of them."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor) -> Tensor:
        batch, length, width = qkv.shape
        shape = (batch, length, 3, self.heads, width // 3 // self.heads)
        q, k, v = qkv.view(shape).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(batch, length, width // 3)


class Attention(nn.Module):
    """x + attention(norm(x)), causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width)
        self.attend = Attend(heads)
        self.project_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project_out(self.attend(self.project_in(self.norm(x))))


class FeedForward(nn.Module):
    """x + MLP(norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _fine_block(attention: Attention, feed_forward: FeedForward) -> Parts:
    """A stage a matrix product or attention, so that each may be kept or run again by itself."""
    norm, widen, gelu, narrow = feed_forward.inner
    return Parts(
        Normed(attention.norm, attention.project_in),
        Beside(attention.attend),
        Added(attention.project_out),
        Normed(norm, widen),
        Beside(gelu),
        Added(narrow),
    )


class Embedding(nn.Module):
    """Tokens and places to vectors."""

    def __init__(self, tokens: int, length: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.place = nn.Parameter(torch.randn(length, width) / math.sqrt(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.place


def _transformer(device: torch.device, quick: bool) -> Network:
    depth, width, length, batch = (2, 32, 16, 2) if quick else (12, 192, 256, 2)
    words, heads = 512, 4
    halves = [(Attention(width, heads), FeedForward(width)) for _ in range(depth)]
    entry = Embedding(words, length, width)
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words))
    model = nn.Sequential(entry, *(nn.Sequential(*pair) for pair in halves), head).to(device)
    tokens = torch.randint(words, (batch, length + 1), device=device)
    targets = tokens[:, 1:].flatten()
    return Network(
        "transformer",
        model,
        tokens[:, :-1].contiguous(),
        lambda y: functional.cross_entropy(y.flatten(0, 1), targets),
        f"{depth} blocks of width {width}, {batch} sequences of {length}; half a block is a stage, "
        "in finer plans a matrix product, attention or GELU",
        nn.Sequential(entry, *(_fine_block(*pair) for pair in halves), head),
    )


NETWORKS: dict[str, Maker] = {
    "ode-resnet": _ode_resnet,
    "ode-squeezenext": _ode_squeezenext,
    "mlp-rk4": _mlp,
    "resnet50": _resnet50,
    "transformer": _transformer,
}
