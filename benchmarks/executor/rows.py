"""Measures one network: each peer's step, and ours in no more memory, timed in turn."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final
from unittest import mock

import torch
from torch import Tensor, nn

import ckptsched as cs
from benchmarks.executor.networks import Network, make
from benchmarks.executor.peers import (
    Forward,
    Peer,
    compiled_peers,
    eager_peers,
    segment_numbers,
    sequential,
    why_not_compiled,
)
from ckptsched.base.errors import CkptschedError
from ckptsched.memory.meters import default_meter
from ckptsched.planner.plan import Plan
from ckptsched.planner.planner import plan_each
from ckptsched.profiler import stage_time as timing
from ckptsched.torch_state.replay_context import now

TOLERANCE = 0.03
# Steps of one method after another: the first finds the heap as another method left it.
_STEPS_A_TURN = 2


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for."""

    device: str = "cpu"
    rounds: int = 5
    quick: bool = False
    compiled: bool = True
    """Whether torch.compile's memory budget is among the peers."""
    inductor: bool = True
    """Whether with inductor's kernels, too: they take minutes to compile."""


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step takes."""

    peak_bytes: int
    gradient_difference: float
    """Largest difference of a gradient from plain autograd's, over the largest gradient."""
    seconds: tuple[float, ...] = ()
    """Of the turns, each the least of its steps."""


@final
@dataclass(frozen=True, kw_only=True)
class Ours:
    """A step of ours, planned with a peer's measured peak as the budget."""

    step: Step
    finer: bool
    """Whether the stages are the finer ones."""
    ratio: float
    """Its least seconds over the peer's."""
    median_ratio: float
    """The median over the turns of its seconds over the peer's in the same turn."""
    overhead: float
    """What the plan says: seconds over those of storing everything, less 1."""
    solver: str


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """A peer, and ours beside it."""

    network: str
    peer: str
    fused: bool
    step: Step
    over_plain: float
    """Its least seconds over those of plain autograd."""
    ours: tuple[Ours, ...]
    notes: tuple[str, ...] = ()
    """Why there is no plan."""

    @property
    def best(self) -> Ours | None:
        """The fastest of ours."""
        return min(self.ours, key=lambda x: x.ratio, default=None)


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """One network."""

    network: str
    what: str
    plain_seconds: float
    stages: tuple[int, ...]
    plan_seconds: tuple[float, ...]
    """To profile and to plan for all peaks, for each way to cut it into stages."""
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    """Peers that did not run, and why."""

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """What `to_json` gave, read back."""
        rows = [
            Row(**row | {"step": _step(row["step"]), "ours": tuple(map(_read_ours, row["ours"]))})
            for row in data["rows"]
        ]
        return cls(**data | {"rows": tuple(rows)})


def _step(data: dict[str, Any]) -> Step:
    return Step(**data | {"seconds": tuple(data["seconds"])})


def _read_ours(data: dict[str, Any]) -> Ours:
    return Ours(**data | {"step": _step(data["step"])})


@final
@dataclass
class _Entry:
    """A method while it is measured."""

    forward: Forward
    peak_bytes: int
    difference: float
    plan: Plan | None = None
    """Of ours."""
    finer: bool = False
    seconds: list[float] = field(default_factory=list)

    def step(self) -> Step:
        return Step(
            peak_bytes=self.peak_bytes,
            gradient_difference=self.difference,
            seconds=tuple(round(x, 6) for x in self.seconds),
        )


def measure(name: str, options: Options) -> Report:
    """One network, all peers; call it in a process of its own."""
    torch.set_num_threads(1)
    network = make(name, torch.device(options.device), options.quick)
    bench = Bench(network)
    left_out: list[str] = []
    peers: list[tuple[Peer, _Entry]] = list(_measured(bench, options, left_out))
    peaks = [entry.peak_bytes for _, entry in peers]
    groups: list[list[_Entry]] = [[] for _ in peers]
    notes: list[list[str]] = [[] for _ in peers]
    seconds, stages = [], []
    for finer, model in enumerate((network.model, network.finer)):
        if model is None:
            continue
        start = time.perf_counter()
        with _the_same_clock(network.x.device):
            chain = cs.profile(model, network.x, loss=network.loss)
        plans = plan_each(chain, peaks, cache=False)
        seconds.append(time.perf_counter() - start)
        stages.append(len(chain))
        for plan, group, note in zip(plans, groups, notes, strict=True):
            if isinstance(plan, Plan):
                group.append(bench.planned(model, plan, finer=bool(finer)))
            else:
                note.append(f"{'finer stages: ' if finer else ''}{plan}")
    bench.race(
        [[entry, *group] for (_, entry), group in zip(peers, groups, strict=True)], options.rounds
    )
    plain = min(peers[0][1].seconds)
    return Report(
        network=name,
        what=network.what,
        plain_seconds=plain,
        stages=tuple(stages),
        plan_seconds=tuple(seconds),
        rows=tuple(
            _row(name, peer, entry, plain, group, note)
            for (peer, entry), group, note in zip(peers, groups, notes, strict=True)
        ),
        left_out=tuple(left_out),
    )


@contextlib.contextmanager
def _the_same_clock(device: torch.device) -> Iterator[None]:
    """Let the profiler count processor seconds as the race does: those of the wall mislead it.

    On a busy machine a stage that happens to be interrupted looks many times as dear as its equals.
    """
    if device.type != "cpu":
        yield
        return
    with mock.patch.object(timing, "now", _processor_seconds):
        yield


def _processor_seconds(device: torch.device) -> float:
    return time.process_time()


def _measured(bench: Bench, options: Options, left_out: list[str]) -> Iterator[tuple[Peer, _Entry]]:
    """The peers that run here, plain autograd first, with their peaks."""
    network = bench.network
    for peer in (*eager_peers(network), *_best_sequential(bench, options.quick)):
        yield peer, bench.entry(peer.forward)
    if not options.compiled:
        return
    reason = why_not_compiled(network)
    if reason:
        left_out.append(reason)
        return
    failed: set[str] = set()  # backends: where one budget fails the next does, too
    for peer in compiled_peers(network, inductor=options.inductor, quick=options.quick):
        backend = peer.name.partition(",")[0]
        if backend in failed:
            continue
        try:
            yield peer, bench.entry(peer.forward)
        except Exception as error:
            failed.add(backend)
            reason = str(error).partition(". Hint")[0]
            left_out.append(f"{peer.name}, and less: {type(error).__name__}: {reason}")


def _best_sequential(bench: Bench, quick: bool) -> Iterator[Peer]:
    """`checkpoint_sequential` where it takes least memory, where it runs least again, and between.

    Its time falls with the number of segments no further than to two; its peak has one minimum.
    """
    numbers = segment_numbers(len(bench.network.steps))
    if quick:
        numbers = numbers[:: max(1, len(numbers) // 4)]
    peaks = {k: bench.peak(sequential(bench.network, k).forward) for k in numbers}
    best = min(peaks, key=lambda k: peaks[k])
    between = min(numbers, key=lambda k: abs(k * k - numbers[0] * best))
    for k in sorted({numbers[0], between, best}):
        yield sequential(bench.network, k)


@final
class Bench:
    """Runs steps of one network, and compares their gradients with plain autograd's."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.meter = default_meter(network.x.device)
        self.parameters = list(network.model.parameters())
        self._clean()
        network.step(network.model)
        self._expected = [parameter.grad for parameter in self.parameters]
        self._clean()

    def entry(self, forward: Forward) -> _Entry:
        """Measure the peak and the gradients of a method, after a step that warms it up."""
        difference = self._difference(forward)
        return _Entry(forward, self.peak(forward), difference)

    def planned(self, model: nn.Module, plan: Plan, *, finer: bool) -> _Entry:
        """The same of a plan."""
        entry = self.entry(cs.checkpointed(model, plan))
        entry.plan, entry.finer = plan, finer
        return entry

    def peak(self, forward: Forward) -> int:
        """Peak bytes of one step, forward, loss and backward."""
        self._clean()
        with self.meter.window() as window:
            self.network.step(forward)
        self._clean()
        return window.measurement.peak_bytes

    def race(self, groups: Sequence[Sequence[_Entry]], rounds: int) -> None:
        """Time all methods in turn, those to be compared one after another."""
        gc.collect()
        gc.freeze()  # what is alive now, such as the compiler, is not searched in anybody's step
        for turn in range(rounds):
            for group in groups:
                for entry in group if turn % 2 == 0 else reversed(group):
                    times = [self._seconds(entry.forward) for _ in range(_STEPS_A_TURN)]
                    entry.seconds.append(min(times))

    def _seconds(self, forward: Forward) -> float:
        """Processor seconds, as others use this machine, too; on a GPU those of the wall."""
        device = self.network.x.device
        now(device)
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        start = clock()
        self.network.step(forward)
        now(device)
        seconds = clock() - start
        self._clean()
        return seconds

    def _difference(self, forward: Forward) -> float:
        self._clean()
        self.network.step(forward)
        pairs = [(p.grad, e) for p, e in zip(self.parameters, self._expected, strict=True)]
        largest = max(float(e.abs().max()) for _, e in pairs if e is not None)
        worst = max(_difference(found, expected) for found, expected in pairs)
        self._clean()
        return worst / largest

    def _clean(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _difference(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    return float((found - expected).abs().max())


def _row(
    network: str,
    peer: Peer,
    entry: _Entry,
    plain: float,
    group: Sequence[_Entry],
    notes: Sequence[str],
) -> Row:
    return Row(
        network=network,
        peer=peer.name,
        fused=peer.fused,
        step=entry.step(),
        over_plain=min(entry.seconds) / plain,
        ours=tuple(_ours(planned, entry) for planned in group),
        notes=tuple(notes),
    )


def _ours(planned: _Entry, peer: _Entry) -> Ours:
    plan = planned.plan
    if plan is None:
        raise CkptschedError("a planned step without a plan")
    pairs = zip(planned.seconds, peer.seconds, strict=True)
    return Ours(
        step=planned.step(),
        finer=planned.finer,
        ratio=min(planned.seconds) / min(peer.seconds),
        median_ratio=statistics.median(ours / theirs for ours, theirs in pairs),
        overhead=plan.overhead,
        solver=plan.solver,
    )
