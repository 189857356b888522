"""Networks as people write them themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .training import Maker, Training, assert_trains_within_budgets


class LSTMLanguage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.layers = nn.LSTM(16, 16, 2, batch_first=True, dropout=0.2)
        self.drop = nn.Dropout(0.2)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y, _ = self.layers(self.drop(self.words(ids)))
        logits = self.head(self.drop(y))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def of_lstm_language() -> Training:
    ids = torch.randint(0, 50, (16, 25))
    return Training(LSTMLanguage(), kwargs={"ids": ids[:, :-1], "labels": ids[:, 1:]})


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Module:
            return nn.Sequential(
                *(
                    nn.Conv2d(before, after, 3, padding=1),
                    nn.BatchNorm2d(after),
                    nn.ReLU(inplace=True),
                ),
                *(
                    nn.Conv2d(after, after, 3, padding=1),
                    nn.BatchNorm2d(after),
                    nn.ReLU(inplace=True),
                ),
            )

        self.down = nn.ModuleList([block(3, width), block(width, 2 * width)])
        self.middle = block(2 * width, 4 * width)
        self.ups = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * width, 2 * width, 2, 2),
                nn.ConvTranspose2d(2 * width, width, 2, 2),
            ]
        )
        self.blocks = nn.ModuleList([block(4 * width, 2 * width), block(2 * width, width)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = block(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)


def of_unet() -> Training:
    return Training(UNet(), (torch.randn(2, 3, 16, 16),))


class Mixture(nn.Module):
    """Sends each token to the two best of four experts, with a loss that balances them."""

    def __init__(self, width: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
            for _ in range(experts)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm(x).flatten(0, 1)
        chances = self.router(tokens).softmax(-1)
        best, chosen = chances.topk(2, -1)
        best = best / best.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == k)
            out.index_add_(0, rows, expert(tokens[rows]) * best[rows, place, None])
        share = F.one_hot(chosen, chances.shape[-1]).float().mean((0, 1))
        return x + out.view_as(x), (share * chances.mean(0)).sum()


class MixtureNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixture() for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        balance = x.new_zeros(())
        for layer in self.layers:
            x, more = layer(x)
            balance = balance + more
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.01 * balance
        return {"loss": loss, "logits": logits}


def of_mixture_of_experts() -> Training:
    kwargs = {"labels": torch.randint(0, 5, (4, 10))}
    return Training(MixtureNetwork(), (torch.randn(4, 10, 16),), kwargs, sizes_vary=True)


class Translation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 16, padding_idx=0), nn.Embedding(20, 16)
        self.body = nn.Transformer(16, 2, 2, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 40)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        def embedded(ids: Tensor) -> Tensor:
            return self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))

        ahead = self.body.generate_square_subsequent_mask(target.shape[1], dtype=torch.bool)
        y = self.body(
            embedded(source),
            embedded(target),
            tgt_mask=ahead,
            src_key_padding_mask=source == 0,
            memory_key_padding_mask=source == 0,
        )
        return self.head(y)


def of_transformer() -> Training:
    source, target = torch.randint(1, 40, (3, 9)), torch.randint(1, 40, (3, 7))
    source[1, 6:] = 0
    return Training(Translation(), (source,), {"target": target})


class GraphConvolution(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(before, after) / before**0.5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        degree = torch.bincount(target, minlength=len(x)).clamp(min=1)
        messages = (x @ self.weight)[source]
        return (
            torch.zeros(len(x), self.weight.shape[1]).index_add(0, target, messages)
            / degree[:, None]
        )


class GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [GraphConvolution(8, 16), GraphConvolution(16, 16), GraphConvolution(16, 3)]
        )

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        x = graph["nodes"]
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(layer(x, graph["edges"])), 0.2, self.training)
        return F.nll_loss(F.log_softmax(self.layers[-1](x, graph["edges"]), -1), graph["classes"])


def of_graph_network() -> Training:
    graph = {
        "nodes": torch.randn(60, 8),
        "edges": torch.randint(0, 60, (2, 300)),
        "classes": torch.randint(0, 3, (60,)),
    }
    return Training(GraphNetwork(), (graph,))


class WaveLayer(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.both = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 16, 2, dilation=dilation))
        self.out, self.skip = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        content, gate = self.both(F.pad(x, (self.dilation, 0))).chunk(2, 1)
        y = torch.tanh(content) * torch.sigmoid(gate)
        return x + self.out(y), self.skip(y)


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 8, 1), nn.Conv1d(8, 32, 1)
        self.layers = nn.ModuleList(WaveLayer(2**k) for k in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y, skips = self.first(x), []
        for layer in self.layers:
            y, skip = layer(y)
            skips.append(skip)
        return self.last(torch.relu(sum(skips)))


def of_wavenet() -> Training:
    return Training(WaveNet(), (torch.randn(2, 1, 64),))


@dataclass
class Detections:
    losses: dict[str, Tensor]
    boxes: Tensor
    anchors: Tensor | None = None


class Criterion(nn.Module):
    """Compares with targets, of which each picture has another number."""

    def forward(
        self, boxes: Tensor, scores: Tensor, targets: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        box, kind = boxes.new_zeros(()), boxes.new_zeros(())
        for found, score, target in zip(boxes, scores, targets, strict=True):
            near = torch.cdist(target["boxes"], found.detach()).argmin(1)
            box = box + F.smooth_l1_loss(found[near], target["boxes"])
            wanted = torch.zeros(len(score), dtype=torch.long)
            wanted[near] = target["labels"]
            kind = kind + F.cross_entropy(score, wanted)
        return {"box": box / len(targets), "kind": kind / len(targets)}


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        )
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)
        self.criterion = Criterion()

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]]) -> Detections:
        y = self.body(torch.stack(images))
        boxes = self.boxes(y).flatten(2).transpose(1, 2)
        scores = self.scores(y).flatten(2).transpose(1, 2)
        return Detections(self.criterion(boxes, scores, targets), boxes)


def of_detector() -> Training:
    targets = [
        {"boxes": torch.rand(k, 4), "labels": torch.randint(1, 4, (k,)), "name": f"picture {k}"}
        for k in (3, 1)
    ]
    return Training(Detector(), ([*torch.randn(2, 3, 32, 32)],), {"targets": targets})


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name](), cuts="lean")
