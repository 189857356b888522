"""Threads and re-entry: models in several threads, and models inside models."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.torch_state.replay_context import OneWay
from tests.support.networks import planned


def layers(*, dropout: bool = True) -> nn.Sequential:
    parts = [
        m for _ in range(4) for m in (nn.Linear(8, 8), nn.Dropout(0.3 * dropout), nn.BatchNorm1d(8))
    ]
    return nn.Sequential(*parts)


def together(*work: Callable[[], object]) -> list[BaseException]:
    """Run functions in threads at once; returns what they raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(each: Callable[[], object]) -> None:
        try:
            start.wait()
            each()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def steps(net: nn.Module, x: Tensor, count: int) -> None:
    for _ in range(count):
        net(x).square().sum().backward()


@pytest.mark.parametrize("count", [2, 4])
def test_models_in_threads_draw_the_same_numbers_again(count: int) -> None:
    nets = []
    for _ in range(count):
        model, x = layers(), torch.randn(4, 8)
        plan = planned(model, x, "input_only")
        nets.append((cs.checkpointed(model, plan, check="outputs"), x))
    assert not together(*[lambda net=net, x=x: steps(net, x, 80 // count) for net, x in nets])


def test_one_model_in_two_threads() -> None:
    model, x = layers(dropout=False).eval(), torch.randn(4, 8)
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, planned(model, x, "input_only"))
    assert not together(*[lambda: steps(trained, x, 20)] * 2)
    steps(twin, x, 40)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_the_switch_of_attention_is_as_it_was_when_all_are_out() -> None:
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with OneWay():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait()
    with OneWay():
        leave.set()
        thread.join()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_backward_in_another_thread() -> None:
    model, x = layers(), torch.randn(4, 8, requires_grad=True)
    twin = copy.deepcopy(model)
    found = []
    for net in (cs.checkpointed(model, planned(model, x, "every_2")), twin):
        torch.manual_seed(1)
        x.grad = None
        loss = net(x).square().sum()
        assert not together(loss.backward)
        found.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("solver", ["store_all", "every_2", "input_only"])
def test_a_planned_model_inside_a_stage_of_another(solver: str) -> None:
    inner, x = layers(), torch.randn(4, 8, requires_grad=True)
    planned_inner = cs.checkpointed(inner, planned(inner, x, "every_2"))
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    outer = nn.Sequential(first, planned_inner, nn.Tanh(), planned_inner, last)
    twin = copy.deepcopy(nn.Sequential(first, inner, nn.Tanh(), inner, last))
    plan = planned(outer, x, solver)
    found = []
    for net in (cs.checkpointed(outer, plan), twin):
        torch.manual_seed(2)
        x.grad = None
        net(x).square().sum().backward()
        found.append(
            [x.grad, torch.get_rng_state(), *(p.grad for p in net.parameters()), *net.buffers()]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert cs.verify(outer, plan, x).ok


def test_inner_and_outer_model_at_once_do_not_wait_for_each_other() -> None:
    inner, x = layers(), torch.randn(4, 8, requires_grad=True)
    alone = cs.checkpointed(inner, planned(inner, x, "every_2"))
    outer = nn.Sequential(nn.Linear(8, 8), alone, nn.Linear(8, 8))
    both = cs.checkpointed(outer, planned(outer, x, "every_2"))
    assert not together(lambda: steps(alone, x, 15), lambda: steps(both, x, 15))


def test_a_profile_counts_nothing_of_a_step_in_another_thread() -> None:
    model, x = layers(), torch.randn(4, 8)
    trained = layers(dropout=False)
    net = cs.checkpointed(trained, planned(trained, x, "input_only"))
    expected = [stage.ledger for stage in cs.profile(model, x).stages]
    stepped, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            steps(net, x, 1)
            stepped.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        stepped.wait()
        assert [stage.ledger for stage in cs.profile(model, x).stages] == expected
    finally:
        stop.set()
        thread.join()


class Interrupted(nn.Module):
    """A stage in whose run, or whose gradient, somebody presses Ctrl-C."""

    def __init__(self) -> None:
        super().__init__()
        self.where = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.where == ("recomputation" if cs.is_recomputing() else "forward"):
            self.press()
        y = x * 1.0
        if self.where == "gradient" and y.requires_grad:
            y.register_hook(lambda _: self.press())
        return y

    def press(self) -> None:
        self.where = ""
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C raises, also where a shell has started this in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("where", ["forward", "recomputation", "gradient"])
def test_an_interrupted_step_leaves_model_and_locks_free(where: str) -> None:
    x, key = torch.randn(4, 8), Interrupted()
    model = nn.Sequential(*layers(), key, nn.Linear(8, 8))
    twin = copy.deepcopy(model)
    own = [*model.parameters(), *model.buffers()]
    net = cs.checkpointed(model, planned(model, x, "input_only"))
    key.where = where
    with pytest.raises(KeyboardInterrupt):
        steps(net, x, 1)
    assert all(a is b for a, b in zip(own, [*net.parameters(), *net.buffers()], strict=True))
    assert torch.backends.mha.get_fastpath_enabled()
    found = []
    for each in (net, twin):
        each.load_state_dict(copy.deepcopy(twin.state_dict()))
        each.zero_grad()
        torch.manual_seed(5)
        assert not together(lambda each=each: steps(each, x, 1))
        found.append([p.grad for p in each.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
