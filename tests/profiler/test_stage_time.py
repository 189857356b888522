"""Seconds: what is measured under load is near what is true, and what may not depend on them."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.profiler import stage_time as timing
from ckptsched.workload.scaling import with_steps
from tests.support.networks import NETWORKS, conv_block

# ------------------------------------------------------------------ the clock of a busy machine


class Machine:
    """A clock that costs move on, and, at times, what else the machine does."""

    def __init__(self, disturbed: float, seed: int = 0) -> None:
        self.disturbed, self.source, self.seconds = disturbed, random.Random(seed), 0.0

    def spend(self, seconds: float) -> None:
        waits = self.source.random() < self.disturbed
        self.seconds += seconds * (self.source.uniform(2, 30) if waits else 1)

    def now(self, device: object) -> float:
        return self.seconds


class Costs(nn.Module):
    """Takes the seconds that it is told, forward, and twice as many backward."""

    def __init__(self, machine: list[Machine], seconds: float = 1e-3, layers: int = 1) -> None:
        super().__init__()
        self.inner = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
        self.machine, self.seconds = machine, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.machine[0].spend(self.seconds)
        y: Tensor = self.inner(x)
        if y.requires_grad:
            y.register_hook(lambda g: self.machine[0].spend(2 * self.seconds))
        return y


def timed(monkeypatch: pytest.MonkeyPatch, model: nn.Module, clock: Callable[..., float]) -> Any:
    monkeypatch.setattr(timing, "now", clock)
    return cs.profile(model, torch.randn(2, 4, requires_grad=True))


@pytest.mark.parametrize("disturbed", [0.0, 0.1, 0.3])
def test_seconds_are_near_the_truth_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, disturbed: float
) -> None:
    """Ten equal layers and an ODE: three times in ten a run takes up to 30 times as long."""
    machine = [Machine(disturbed)]
    costs = [Costs(machine) for _ in range(10)]
    block = cs.ODEBlock(Costs(machine, 5e-3), "euler", 6)
    other = Costs(machine, 2e-4, layers=2)
    chain = timed(monkeypatch, nn.Sequential(*costs, block, other), machine[0].now)
    found = {(round(s.forward_seconds, 9), round(s.backward_seconds, 9)) for s in chain.stages[:10]}
    assert len(found) == 1
    truth = [1e-3] * 10 + [5e-3] * 6 + [2e-4]
    assert [s.forward_seconds for s in chain.stages] == pytest.approx(truth, rel=1e-6)
    assert [s.backward_seconds for s in chain.stages] == pytest.approx(
        [2 * seconds for seconds in truth], rel=1e-6
    )


def test_stages_that_may_differ_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bytes and equal print: a number or a function that a module keeps tells them apart."""
    machine = [Machine(0.0)]
    costs = [Costs(machine, seconds) for seconds in (1.0, 3.0, 1.0)]
    chain = timed(monkeypatch, nn.Sequential(*costs), machine[0].now)
    assert [s.forward_seconds for s in chain.stages] == pytest.approx([1.0, 3.0, 1.0])

    class Applies(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x)

    def slow(x: Tensor) -> Tensor:
        machine[0].spend(7.0)
        return torch.tanh(x)

    def fast(x: Tensor) -> Tensor:
        machine[0].spend(2.0)
        return torch.tanh(x)

    applied = nn.Sequential(*[Applies(function) for function in (slow, fast, slow)])
    chain = timed(monkeypatch, applied, machine[0].now)
    assert [s.forward_seconds for s in chain.stages] == pytest.approx([7.0, 2.0, 7.0])


def test_attributes_that_hold_themselves_are_compared() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        layer.seen = [1]
        layer.seen.append(layer.seen)
    assert len(cs.profile(model, torch.ones(3, 2)).stages) == 2


def test_a_clock_that_stands_still_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of coarse ticks may: all stages then cost nothing, and bytes alone decide."""
    model = nn.Sequential(*[nn.Tanh() for _ in range(9)])
    chain = timed(monkeypatch, model, lambda _: 7.0)
    assert chain.store_all_seconds == 0
    least = cs.plan(chain, budget="100%").least_budget_bytes
    made = cs.plan(chain, budget=least)
    assert made.peak_bytes <= least < made.store_all_bytes
    assert made.seconds == made.lower_bound_seconds == 0


def test_rounds_go_on_until_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round costs 4 ms, so that eight seconds are never over."""
    machine: list[Machine] = [Machine(0.6, seed=3)]
    chain = timed(monkeypatch, nn.Sequential(Costs(machine), Costs(machine)), machine[0].now)
    assert chain.stages[0].forward_seconds == pytest.approx(1e-3, rel=1e-6)
    assert chain.stages[0].backward_seconds == pytest.approx(2e-3, rel=1e-6)


def profiled_in(monkeypatch: pytest.MonkeyPatch, factors: Sequence[float]) -> cs.Chain:
    """One stage on a machine that is slower in some rounds; profiling runs it three times each."""
    clock = {"at": 0.0, "round": 0}

    def now(device: object) -> float:
        return clock["at"]

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            clock["at"] += factors[clock["round"] % len(factors)]
            y: Tensor = self.inner(x)
            return y

    def loss(y: Tensor) -> Tensor:
        clock["round"] += 1  # the loss ends each round
        return y.square().sum()

    monkeypatch.setattr(timing, "now", now)
    monkeypatch.setattr(timing, "MOST_SPREAD", 0.10)
    return cs.profile(Stage(), torch.randn(2, 4), loss=loss)


def test_people_are_warned_where_rounds_never_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(cs.TimingWarning, match=r"differ by \d+% between halves of \d+ rounds"):
        chain = profiled_in(monkeypatch, (1.0, 1.5))
    assert 0.3 < chain.seconds_spread < 0.6
    assert "measured to about" in str(cs.plan(chain, budget="100%", cache=False))
    assert cs.Chain.from_json(chain.to_json()) == chain


def test_nobody_is_warned_where_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = profiled_in(monkeypatch, (1.0,))
    assert chain.seconds_spread == 0.0
    assert "measured to about" not in str(cs.plan(chain, budget="100%", cache=False))
    assert "seconds_spread" not in chain.to_json()  # files of before have the same fingerprint


def test_runs_without_a_processor_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsched.profiler.stage_time import _Run, _typical

    calm = [_Run(1.0 + k / 100, disturbed=False) for k in range(3)]
    slow = [_Run(0.5, disturbed=True), *[_Run(9.0, disturbed=True)] * 20]
    assert _typical([*slow, *calm]) == 1.0
    assert _typical([*slow, *calm[:2]]) == 9.0  # a stage that waits by itself
    assert _typical(calm) == 1.0


@pytest.mark.parametrize(
    ("worked", "waits", "found"),
    [
        (0.4, (3, 3), 0.4),  # others had the processor
        (0.4, (3, 4), 1.0),  # the stage waits by itself, or for its threads
        (0.4, (None, None), 1.0),  # nobody tells why
        (0.0, (3, 3), 1.0),  # the thread's clock stands still
        (1.0, (3, 4), 1.0),
    ],
)
def test_a_run_is_not_charged_for_what_others_had_the_processor_for(
    monkeypatch: pytest.MonkeyPatch,
    worked: float,
    waits: tuple[int | None, int | None],
    found: float,
) -> None:
    clocks = {"now": iter([5.0, 6.0]), "thread": iter([2.0, 2.0 + worked]), "waits": iter(waits)}
    monkeypatch.setattr(timing, "now", lambda device: next(clocks["now"]))
    monkeypatch.setattr(timing, "thread_seconds", lambda: next(clocks["thread"]))
    monkeypatch.setattr(timing, "waits", lambda: next(clocks["waits"]))
    watch = timing._StopWatch(torch.device("cpu"))
    watch.start()
    run = watch.lap()
    assert run.seconds == pytest.approx(found)
    assert run.disturbed == (worked < 1.0)


def test_a_run_that_sleeps_is_charged_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clocks of this machine: sleeping is waiting, and nobody else's doing."""
    monkeypatch.setattr(timing, "now", lambda device: time.perf_counter())
    monkeypatch.setattr(timing, "thread_seconds", time.thread_time)
    watch = timing._StopWatch(torch.device("cpu"))
    watch.start()
    time.sleep(0.02)
    assert watch.lap().seconds >= 0.02


# ------------------------------------------------------------------ what depends on bytes alone


def ode() -> tuple[nn.Module, Tensor]:
    f = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6))
    return cs.ODEBlock(f, "rk4", 12), torch.randn(5, 6, requires_grad=True)


def convolutions() -> tuple[nn.Module, Tensor]:
    parts = [m for k in (8, 8, 8) for m in (conv_block(k), nn.MaxPool2d(2))]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(32, 4)), torch.randn(4, 8, 16, 16)


MODELS = {
    "mlp": NETWORKS["dropout_mlp"],
    "convolutions": convolutions,
    "ode": ode,
    "ode_net": NETWORKS["ode_net"],
    "transformer": NETWORKS["transformer"],
}


@functools.cache
def measured(name: str) -> cs.Chain:
    torch.manual_seed(0)
    return cs.profile(*MODELS[name]())


def with_seconds(chain: cs.Chain, times: Sequence[tuple[float, float]]) -> cs.Chain:
    """The chain as measured once more: distinct stages take these seconds, in turn."""
    drawn = itertools.cycle(times)
    again: dict[int, Any] = {}
    for stage in chain.stages:
        if id(stage) not in again:
            forward, backward = next(drawn)
            again[id(stage)] = replace(stage, forward_seconds=forward, backward_seconds=backward)
    return replace(chain, stages=tuple(again[id(stage)] for stage in chain.stages))


SECONDS = st.lists(st.tuples(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2)), min_size=1, max_size=12)


def long_ode() -> cs.Chain:
    """Enough steps for the solver of runs of equal stages."""
    return with_steps(measured("ode"), 400)


def uniform() -> cs.Chain:
    """For the solver of equal stages."""
    chain = measured("ode")
    return replace(chain, stages=(chain.stages[5],) * len(chain))


@pytest.mark.parametrize(
    ("chain", "solver"),
    [
        *[(functools.partial(measured, name), "auto") for name in MODELS],
        (functools.partial(measured, "ode_net"), "chain_dp"),
        (long_ode, "run_dp"),
        (long_ode, "auto"),
        (uniform, "revolve"),
    ],
    ids=[*MODELS, "chain_dp", "run_dp", "long ode", "revolve"],
)
@settings(max_examples=4)
@example(first=[(1e-3, 1e-3)], second=[(1e-6, 1e-3), (1e-2, 1e-3), (1e-2, 1e-3)])
@given(first=SECONDS, second=SECONDS)
def test_the_least_budget_that_is_named_does_after_the_next_profile(
    chain: Callable[[], cs.Chain],
    solver: str,
    first: list[tuple[float, float]],
    second: list[tuple[float, float]],
) -> None:
    before, after = (with_seconds(chain(), times) for times in (first, second))
    least = cs.plan(before, budget=2**50, solver=solver).least_budget_bytes
    made = cs.plan(after, budget=least, solver=solver)
    assert made.peak_bytes <= least
    assert made.least_budget_bytes == least
    with pytest.raises(cs.InfeasibleBudgetError) as caught:
        cs.plan(after, budget=least - 1, solver=solver)
    assert caught.value.least_budget_bytes == least
