"""Turns: locks that are lent while autograd's engine works for who holds them."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.torch_state import locks
from ckptsched.torch_state.locks import LendingLock, Lent, Locked, is_first
from ckptsched.torch_state.replay_context import Generators
from tests.support.networks import planned

PATIENCE_SECONDS = 60.0  # for what takes a second: without, a lock that is never free hangs a test


def in_thread(work: Callable[[], Any]) -> Any:
    """What a function returns that runs in a thread of its own, on which this one waits."""
    found: list[Any] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive(), "it waits for ever"
    if failures:
        raise failures[0]
    return found[0]


class _Elsewhere(torch.autograd.Function):
    """Runs a module, and goes back through it in another thread, as autograd does on a GPU."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, where: str, x: Tensor, *owned: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.x, ctx.owned, ctx.where = x.detach().requires_grad_(), owned, where
            ctx.y = module(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        def work() -> Any:
            return torch.autograd.grad(ctx.y, [ctx.x, *ctx.owned], grads[0])

        return None, None, *(in_thread(work) if ctx.where == "thread" else work())


class Elsewhere(nn.Module):
    """A stage whose backward runs in another thread."""

    def __init__(self, module: nn.Module, where: str = "thread") -> None:
        super().__init__()
        self.module, self.where = module, where

    def forward(self, x: Tensor) -> Tensor:
        return _Elsewhere.apply(self.module, self.where, x, *self.module.parameters())


class Inside(nn.Module):
    """A stage that asks for a gradient in its forward, in another thread."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            energy = self.module(z).square().sum()
        return x + in_thread(lambda: torch.autograd.grad(energy, z)[0])


def layers(*, dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(6, 6), nn.Dropout(dropout))])


def step(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Gradients of one step, and the random state after it."""
    net.zero_grad()
    torch.manual_seed(1)
    leaf = x.detach().requires_grad_()
    net(leaf).square().sum().backward()
    return [leaf.grad, *(p.grad for p in net.parameters()), torch.get_rng_state()]


def same(some: list[Tensor | None], others: list[Tensor | None]) -> bool:
    assert len(some) == len(others) > 2
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("solver", ["store_all", "every_2", "input_only"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_planned_model_whose_backward_runs_in_another_thread_than_the_model_around_it(
    solver: str, dropout: float
) -> None:
    x, inner = torch.randn(4, 6, requires_grad=True), layers(dropout=dropout)
    net = nn.Sequential(nn.Linear(6, 6), Elsewhere(inner), nn.Dropout(dropout), nn.Linear(6, 6))
    expected = step(net, x)

    def found() -> list[Tensor | None]:
        part = cs.checkpointed(inner, planned(inner, x, "every_2"))
        around = nn.Sequential(net[0], Elsewhere(part), *net[2:])
        return step(cs.checkpointed(around, planned(around, x, solver)), x)

    assert same(in_thread(found), expected)


def test_a_stage_within_stages_within_threads() -> None:
    x, inner = torch.randn(4, 6, requires_grad=True), layers()
    net: nn.Module = inner
    for _ in range(2):
        net = nn.Sequential(nn.Linear(6, 6), Elsewhere(net), nn.Dropout(0.2))
    expected = step(net, x)

    def wrapped(part: nn.Module) -> nn.Module:
        return cs.checkpointed(part, planned(part, x, "input_only"))

    def found() -> list[Tensor | None]:
        middle = net[1].module
        part = nn.Sequential(middle[0], Elsewhere(wrapped(inner)), middle[2])
        return step(wrapped(nn.Sequential(net[0], Elsewhere(wrapped(part)), net[2])), x)

    assert same(in_thread(found), expected)


@pytest.mark.parametrize("solver", ["store_all", "input_only"])
def test_a_gradient_inside_a_stage_that_another_thread_computes(solver: str) -> None:
    x, inner = torch.randn(4, 6, requires_grad=True), layers()
    net = nn.Sequential(nn.Linear(6, 6), Inside(inner), nn.Dropout(0.3))
    expected = step(net, x)

    def found() -> list[Tensor | None]:
        part = cs.checkpointed(inner, planned(inner, x, "input_only"))
        around = nn.Sequential(net[0], Inside(part), net[2])
        return step(cs.checkpointed(around, planned(around, x, solver)), x)

    assert same(in_thread(found), expected)


def test_a_backward_that_a_thread_of_the_engine_does_first_for_somebody_else() -> None:
    """One thread goes back for all, as on a GPU, and comes to the one who waits with the lock."""
    x, net = torch.randn(4, 6), layers()
    expected = step(net, x)[1:-1]
    net.zero_grad()
    trained = cs.checkpointed(net, planned(net, x, "input_only"))
    torch.manual_seed(1)
    loss = trained(x).square().sum()
    with Locked((Generators.lock,)), Lent():
        in_thread(loss.backward)
    assert same([p.grad for p in net.parameters()], expected)


def test_a_turn_that_is_lent_is_not_given_to_who_begins_a_step() -> None:
    turn, log, asks = LendingLock(), list[str](), threading.Event()

    def other() -> None:
        asks.set()
        with turn:
            log.append("other")

    with turn:
        thread = threading.Thread(target=other)
        thread.start()
        asks.wait()
        with Lent():
            time.sleep(0.2)
        log.append("first")
    thread.join()
    assert log == ["first", "other"]


class _Starting(torch.autograd.Function):
    """Has a thread run something in its backward, and waits for it."""

    work = staticmethod(in_thread)

    @staticmethod
    def forward(ctx: Any, inner: nn.Module, x: Tensor) -> Tensor:
        ctx.inner = inner
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        def step() -> bool:
            with torch.enable_grad():
                ctx.inner(torch.ones(4, 8)).sum().backward()
            return True

        assert _Starting.work(step)
        return None, grads[0] * 2


def by_executor(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(2) as pool:
        return all(pool.map(lambda _: work(), range(3)))


def by_event(work: Callable[[], Any]) -> Any:
    """What waits for a thread in a way that does not show which one it is."""
    done, failures = threading.Event(), []

    def run() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(PATIENCE_SECONDS), "it waits for ever"
    if failures:
        raise failures[0]
    return True


class Starts(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.linear, self.__dict__["within"] = nn.Linear(8, 8), inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Starting.apply(self.within, self.linear(x))
        return y


def starting() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    run = cs.checkpointed(inner, planned(inner, torch.ones(4, 8), "input_only"))
    return nn.Sequential(*[Starts(run) for _ in range(3)]), torch.randn(4, 8)


@pytest.mark.parametrize("work", [in_thread, by_executor])
def test_a_thread_that_a_backward_starts_and_waits_for_has_its_turn(
    work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Starting, "work", staticmethod(work))
    model, x = starting()

    def step(run: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        run(x).square().mean().backward()
        return [*(p.grad for p in model.parameters() if p.grad is not None), torch.get_rng_state()]

    expected = step(model)
    for solver in ("input_only", "store_all"):
        found = step(cs.checkpointed(model, planned(model, x, solver)))
        assert all(map(torch.equal, found, expected))


def test_a_thread_that_may_be_waited_for_says_so_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Starting, "work", staticmethod(by_event))
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.1)
    with pytest.raises(cs.ProfileError, match=r"has waited in a backward .*join it \(Thread\.join"):
        cs.profile(*starting())


def test_who_lends_goes_on_when_the_last_has_left() -> None:
    turn, log = LendingLock(), list[str]()
    came, leave = threading.Event(), threading.Event()

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            with turn:
                came.set()
                leave.wait()
                log.append("node")
            return grads[0]

    loss = Node.apply(torch.ones((), requires_grad=True))
    thread = threading.Thread(target=loss.backward)
    with turn:
        with Lent():
            thread.start()
            came.wait()
            leave.set()
        log.append("lender")
    thread.join()
    assert log == ["node", "lender"]


def come_and_go(turns: tuple[LendingLock, ...]) -> None:
    with Locked(turns):
        pass


def test_an_interrupt_leaves_no_turn_behind() -> None:
    """At any line inside of the code that takes and leaves turns."""
    turns, left = (LendingLock(), LendingLock()), 0
    for nth in range(160):
        lines = 0

        def trace(frame: Any, event: str, arg: Any, nth: int = nth) -> Any:
            nonlocal lines
            if frame.f_code.co_filename.endswith("locks.py"):
                lines += 1
                if lines == nth + 1:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        block = Locked(turns)
        with contextlib.suppress(KeyboardInterrupt):
            try:
                sys.settrace(trace)
                with block:
                    pass
                left += 1
            finally:
                sys.settrace(None)
        del block
        assert is_first(), nth
        in_thread(lambda: come_and_go(turns))  # they are free for another thread
    assert 0 < left < 120


def test_a_copy_is_a_turn_of_its_own() -> None:
    turn = LendingLock()
    with turn:
        for other in (copy.deepcopy(turn), pickle.loads(pickle.dumps(turn))):
            in_thread(other.__enter__)


IMPORT = """
import os, sys
import numpy, torch

def threads():
    return len(os.listdir("/proc/self/task"))

import numba, networkx, rich, click, scipy  # which may start some of their own
called = []
engine = torch.autograd.Variable._execution_engine
class Engine:
    def run_backward(self, *args, **kwargs):
        called.append(args)
        return engine.run_backward(*args, **kwargs)
torch.autograd.Variable._execution_engine = Engine()
torch.autograd.graph.Variable._execution_engine = torch.autograd.Variable._execution_engine
before = threads()
import ckptsched
assert threads() == before, (before, threads())
assert not called
from ckptsched.recompute.engine import go_back
leaf = torch.zeros(2, requires_grad=True)
go_back(((leaf * 3).sum(),), (torch.ones(()),))
assert called and leaf.grad.tolist() == [3.0, 3.0]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_importing_starts_no_thread_and_goes_back_through_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
