"""Plans against the compiler's own memory budget, at the peak that this takes.

From the root of the repository:

    python -m benchmarks.compiled                          # all networks
    python -m benchmarks.compiled --networks mlp --compile # one, and compiled stages besides

`torch.compile` with inductor and `activation_memory_budget` 1, .5 and .2 against a plan of ours at
the peak that was measured of it, of the same network as recorded by `captured`. Ours runs torch's
own kernels, and with `--compile` also stages that inductor has compiled one by one: its fused
kernels, under a plan. Steps are forward, loss and backward, on one thread, in turn in one process
per network; seconds are of the processor, and the least of all turns. There is no dropout, as that
budget gives wrong gradients with random numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

import ckptsched as cs
from benchmarks.budgets import machine
from benchmarks.document import to_markdown
from benchmarks.executor.peers import inductor_within
from ckptsched.base.text_table import Grid
from ckptsched.memory.meters import default_meter
from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_each
from ckptsched.profiler import stage_time as timing

RESULTS = Path(__file__).resolve().parent / "results"
BUDGETS = (1.0, 0.5, 0.2)

Step = Callable[[], Tensor]
"""Runs a forward pass, and gives its loss."""


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.before(x)).split(width, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        hidden = functional.gelu(self.up(self.between(x)), approximate="tanh")
        return x + self.down(hidden)


class Gpt(nn.Module):
    """A language model that gives its own loss."""

    def __init__(self, layers: int = 4, width: int = 128, length: int = 128, tokens: int = 1000):
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Classifier(nn.Module):
    """A network and its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.network(x), targets)


def gpt() -> tuple[nn.Module, tuple[Tensor, ...]]:
    tokens = torch.randint(1000, (8, 129))
    return Gpt(), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def mlp() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers = [part for _ in range(12) for part in (nn.Linear(256, 256), nn.GELU())]
    net = nn.Sequential(*layers, nn.Linear(256, 10))
    return Classifier(net), (torch.randn(2048, 256), torch.randint(10, (2048,)))


def resnet18() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from torchvision.models import resnet18 as made

    net = Classifier(made(num_classes=10))
    return net, (torch.randn(16, 3, 64, 64), torch.randint(10, (16,)))


NETWORKS = {"mlp": mlp, "gpt": gpt, "resnet18": resnet18}


@final
@dataclass(kw_only=True)
class Method:
    """A way to run a step, and what it takes."""

    name: str
    step: Step
    peak_bytes: int = 0
    difference: float = 0.0
    """Largest difference of a gradient from plain autograd's, over the largest gradient."""
    seconds: list[float] = field(default_factory=list)


@final
class Bench:
    """Runs steps of one network."""

    def __init__(self, model: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.model, self.meter = model, default_meter(args[0].device)
        self.buffers = [(b, b.clone()) for b in model.buffers()]
        self._run(lambda: model(*args))
        self.expected = self._gradients()

    def method(self, name: str, step: Step) -> Method:
        """Measure the peak and the gradients of a method, after a step that warms it up."""
        self._run(step)
        pairs = list(zip(self._gradients(), self.expected, strict=True))
        largest = max(float(e.abs().max()) for _, e in pairs)
        worst = max(float((g - e).abs().max()) for g, e in pairs)
        self._clean()
        with self.meter.window() as window:
            step().backward()
        peak = window.measurement.peak_bytes
        return Method(name=name, step=step, peak_bytes=peak, difference=worst / largest)

    def race(self, methods: Sequence[Method], rounds: int) -> None:
        """Time all methods in turn."""
        gc.collect()
        gc.freeze()
        for turn in range(rounds):
            for method in methods if turn % 2 == 0 else reversed(methods):
                times = [self._run(method.step) for _ in range(2)]
                method.seconds.append(min(times))

    def _run(self, step: Step) -> float:
        self._clean()
        start = time.process_time()
        step().backward()
        return time.process_time() - start

    def _gradients(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def _clean(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        with torch.no_grad():  # a step moves the statistics of BatchNorm, and with them nothing
            for buffer, before in self.buffers:
                buffer.copy_(before)


def measure(name: str, rounds: int, compile_stages: bool) -> dict[str, Any]:
    """One network; call it in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, args = NETWORKS[name]()
    bench = Bench(model, args)
    plain = bench.method("plain autograd", lambda: model(*args))
    peers: list[Method] = []
    for budget in BUDGETS:
        call = inductor_within(model, budget)
        peers.append(bench.method(f"inductor, budget {budget:g}", _step(call, args)))
    notes: list[str] = []
    ours: dict[str, list[Method | None]] = {}
    for compiled in (False, True) if compile_stages else (False,):
        kind = "compiled stages" if compiled else "plan"
        ours[kind] = _planned(bench, args, [p.peak_bytes for p in peers], compiled, kind, notes)
    raced = [plain, *peers, *(m for group in ours.values() for m in group if m is not None)]
    bench.race(raced, rounds)
    rows = [
        {
            "network": name,
            "peer": _figures(peer, plain, peer),
            **{kind: _figures(group[k], plain, peer) for kind, group in ours.items()},
        }
        for k, peer in enumerate(peers)
    ]
    return {"network": name, "plain": _figures(plain, plain, plain), "rows": rows, "notes": notes}


def _planned(
    bench: Bench,
    args: tuple[Tensor, ...],
    peaks: Sequence[int],
    compiled: bool,
    kind: str,
    notes: list[str],
) -> list[Method | None]:
    net = cs.captured(bench.model, *args, compile=compiled)
    x = net.take(*args)
    with mock.patch.object(timing, "now", _processor_seconds):
        chain = cs.profile(net, x, loss=net.give)
    notes.append(f"{kind}: {len(chain)} stages")
    found: list[Method | None] = []
    for peak, plan in zip(peaks, plan_each(chain, peaks, cache=False), strict=True):
        if not isinstance(plan, Plan):
            notes.append(f"{kind} at {peak} bytes: {plan}")
            found.append(None)
            continue
        run = cs.checkpointed(net, plan)
        found.append(bench.method(kind, lambda run=run: net.give(run(x))))
    return found


def _processor_seconds(device: torch.device) -> float:
    """The clock of the race, as that of the wall misleads a profile on a busy machine."""
    return time.process_time()


def _step(call: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Step:
    return lambda: call(*args)


def _figures(method: Method | None, plain: Method, peer: Method) -> dict[str, Any] | None:
    if method is None:
        return None
    pairs = zip(method.seconds, peer.seconds, strict=True)
    return {
        "name": method.name,
        "peak_bytes": method.peak_bytes,
        "of_plain_peak": method.peak_bytes / plain.peak_bytes,
        "over_plain": min(method.seconds) / min(plain.seconds),
        "over_peer": min(method.seconds) / min(peer.seconds),
        "median_over_peer": statistics.median(a / b for a, b in pairs),
        "difference": method.difference,
        "seconds": method.seconds,
    }


def table(report: dict[str, Any]) -> Grid:
    """The rows of a network, for people."""
    kinds = [key for key in report["rows"][0] if key not in ("network", "peer")]
    head = ["peer", "peak, % of plain", "step over plain", "gradients differ by"]
    for kind in kinds:
        head += [f"{kind}: peak", "over plain", "over the peer", "median", "differ by"]
    lines = []
    for row in report["rows"]:
        peer = row["peer"]
        line = [peer["name"], f"{peer['of_plain_peak']:.1%}", f"{peer['over_plain']:.2f}"]
        line.append(f"{peer['difference']:.0e}")
        for kind in kinds:
            ours = row[kind]
            line += (
                ["no plan", "", "", "", ""]
                if ours is None
                else [
                    f"{ours['of_plain_peak']:.1%}",
                    f"{ours['over_plain']:.2f}",
                    f"{ours['over_peer']:.2f}",
                    f"{ours['median_over_peer']:.2f}",
                    f"{ours['difference']:.0e}",
                ]
            )
        lines.append(line)
    return Grid(
        title=report["network"],
        headings=tuple(head),
        rows=tuple(map(tuple, lines)),
        names_first=True,
    )


def run(names: Sequence[str], rounds: int, compile_stages: bool) -> Iterator[dict[str, Any]]:
    """Each network in a process of its own."""
    spawned = multiprocessing.get_context("spawn")
    for name in names:
        with ProcessPoolExecutor(max_workers=1, mp_context=spawned) as pool:
            yield pool.submit(measure, name, rounds, compile_stages).result()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the networks named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compiled stages, too")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = machine("cpu") | {"cores": os.cpu_count(), "load_at_start": os.getloadavg()[0]}
    path = args.out or RESULTS / f"compiled-{about['date']}.json"
    reports = []
    for report in run(args.networks, args.rounds, args.compile):
        reports.append(report)
        about["load_at_end"] = os.getloadavg()[0]
        path.parent.mkdir(exist_ok=True)
        data = {"about": about, "networks": reports}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"\n{to_markdown(table(report))}\n", *report["notes"], sep="\n", flush=True)


if __name__ == "__main__":
    main()
