"""Networks on sequences, graphs and sets: loops over time, scatters, matchers, queues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .training import Maker, Training, assert_trains_within_budgets


class Scan(nn.Module):
    """A selective state space layer, step by step."""

    def __init__(self, width: int = 8, states: int = 4) -> None:
        super().__init__()
        self.norm, self.given = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.near = nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.select, self.out = nn.Linear(width, 1 + 2 * states), nn.Linear(width, width)
        self.pace = nn.Linear(1, width)
        self.decay = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))

    def forward(self, u: Tensor) -> Tensor:
        x, gate = self.given(self.norm(u)).chunk(2, -1)
        x = F.silu(self.near(x.mT)[..., : u.shape[1]].mT)
        states = self.decay.shape[1]
        pace, write, read = self.select(x).split([1, states, states], -1)
        pace = F.softplus(self.pace(pace))
        kept = torch.exp(-pace[..., None] * self.decay.exp())
        new = pace[..., None] * write[:, :, None] * x[..., None]
        state, found = torch.zeros_like(new[:, 0]), []
        for t in range(u.shape[1]):
            state = kept[:, t] * state + new[:, t]
            found.append(torch.einsum("bdn,bn->bd", state, read[:, t]))
        return u + self.out(torch.stack(found, 1) * F.silu(gate))


def of_selective_scan() -> Training:
    model = nn.Sequential(Scan(), nn.Linear(8, 8), Scan())
    return Training(model, (torch.randn(4, 6, 8),), overestimated=True)


class Listener(nn.Module):
    """Packed sequences, encoded; cells in a loop that attend to them."""

    def __init__(self, words: int = 20, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.LSTM(8, width, 2, batch_first=True, bidirectional=True)
        self.words, self.cell = nn.Embedding(words, width), nn.GRUCell(3 * width, width)
        self.score, self.head = nn.Linear(3 * width, 1), nn.Linear(width, words)

    def forward(self, sound: Tensor, lengths: Tensor, text: Tensor) -> Tensor:
        packed = pack_padded_sequence(sound, lengths, batch_first=True, enforce_sorted=False)
        heard, _ = pad_packed_sequence(self.encoder(packed)[0], batch_first=True)
        state, word = heard.new_zeros(len(text), self.cell.hidden_size), text[:, 0]
        found = []
        for t in range(1, text.shape[1]):
            beside = state[:, None].expand(-1, heard.shape[1], -1)
            weight = self.score(torch.cat([heard, beside], -1)).softmax(1)
            given = torch.cat([self.words(word), (weight * heard).sum(1)], -1)
            state = self.cell(given, state)
            found.append(self.head(state))
            word = text[:, t] if t % 2 else found[-1].argmax(-1)
        return F.cross_entropy(torch.stack(found, 1).flatten(0, 1), text[:, 1:].flatten())


def of_listener() -> Training:
    sound, text = torch.randn(3, 12, 8), torch.randint(0, 20, (3, 7))
    most = sound, torch.tensor([12, 12, 12]), text
    return Training(Listener(), (sound, torch.tensor([12, 9, 7]), text), most=most, cuts="lean")


class GraphAttention(nn.Module):
    def __init__(self, before: int, after: int, heads: int = 2) -> None:
        super().__init__()
        self.sizes = heads, after
        self.lin = nn.Linear(before, heads * after, bias=False)
        self.source, self.target = (nn.Parameter(torch.randn(heads, after)) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        y = self.lin(x).view(-1, *self.sizes)
        score = (y * self.source).sum(-1)[source] + (y * self.target).sum(-1)[target]
        score, where = F.leaky_relu(score, 0.2), target[:, None].expand(-1, self.sizes[0])
        most = score.new_full((len(x), self.sizes[0]), -1e9)
        most = most.scatter_reduce(0, where, score, "amax")
        weight = (score - most[target]).exp()
        total = torch.zeros_like(most).scatter_add_(0, where, weight)
        weight = F.dropout(weight / (total[target] + 1e-9), 0.2, self.training)
        return torch.zeros_like(y).index_add_(0, target, y[source] * weight[..., None]).flatten(1)


class GraphAttentionNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GraphAttention(8, 8), GraphAttention(16, 8)])
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.elu(self.norm(layer(x, edges)))
        graphs = int(graph.max()) + 1
        mean = x.new_zeros(graphs, x.shape[1]).index_add_(0, graph, x)
        return self.head(mean / torch.bincount(graph, minlength=graphs)[:, None])


def of_graph_attention() -> Training:
    graph = torch.arange(60) // 15
    return Training(
        GraphAttentionNetwork(), (torch.randn(60, 8), torch.randint(0, 60, (2, 240)), graph)
    )


class Skipped(nn.Module):
    """A block that is left out by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(1).item() < 0.5:
            return x
        return F.relu(x + self.body(x))


def of_stochastic_depth() -> Training:
    blocks = [Skipped() for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1))
    return Training(model, (torch.randn(4, 3, 12, 12),), sizes_vary=True)


class Matcher(nn.Module):
    """Assigns queries to targets, outside of torch."""

    @torch.no_grad()
    def forward(
        self, scores: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]
    ) -> list[Tensor]:
        found = []
        for score, box, target in zip(scores, boxes, targets, strict=True):
            cost = torch.cdist(box, target["boxes"]) - score.softmax(-1)[:, target["labels"]]
            free, chosen = set(range(len(box))), []
            for column in cost.T.numpy():
                chosen.append(min(free, key=lambda k, c=column: float(c[k])))
                free.remove(chosen[-1])
            found.append(torch.tensor(chosen))
        return found


class SetPrediction(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()
        )
        self.transformer = nn.Transformer(width, 2, 1, 2, 32, batch_first=True)
        self.queries = nn.Parameter(torch.rand(6, width))
        self.scores, self.boxes = nn.Linear(width, 4), nn.Linear(width, 4)
        self.matcher = Matcher()

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        y = self.body(images).flatten(2).mT
        y = self.transformer(y, self.queries.expand(len(images), -1, -1))
        scores, boxes = self.scores(y), self.boxes(y).sigmoid()
        matched, loss = self.matcher(scores, boxes, targets), scores.new_zeros(())
        for score, box, rows, target in zip(scores, boxes, matched, targets, strict=True):
            kinds = torch.full((len(score),), 3)
            kinds[rows] = target["labels"]
            loss = loss + F.cross_entropy(score, kinds) + F.l1_loss(box[rows], target["boxes"])
        return {"loss": loss / len(targets), "boxes": boxes.detach()}


def of_set_prediction() -> Training:
    targets = [{"boxes": torch.rand(k, 4), "labels": torch.randint(0, 3, (k,))} for k in (3, 2)]
    return Training(SetPrediction(), (torch.randn(2, 3, 32, 32), targets))


def encoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16)),
    )


class Queue(nn.Module):
    """The newest keys, written over the oldest from a place on that a buffer tells."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("kept", F.normalize(torch.randn(16, length), dim=0))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def forward(self, keys: Tensor) -> Tensor:
        old = self.kept.clone()
        start = int(self.at)
        self.kept[:, start : start + len(keys)] = keys.T
        self.at[0] = (start + len(keys)) % old.shape[1]
        return old


class Contrast(nn.Module):
    """Keys of another encoder, without gradients and in another order, and a queue of old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.asks, self.answers = encoder(), encoder().requires_grad_(False)
        self.queue = Queue(32)

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        order = torch.randperm(len(images))
        return F.normalize(self.answers(images[order]), dim=1)[torch.argsort(order)]

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        keys = self.keys(other)
        old = self.queue(keys)
        asked = F.normalize(self.asks(one), dim=1)
        near = torch.einsum("nc,nc->n", asked, keys)[:, None]
        scores = torch.cat([near, asked @ old], 1) / 0.07
        return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))


def of_contrast() -> Training:
    images: tuple[Any, ...] = (torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))
    return Training(Contrast(), images, cuts="lean")


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
