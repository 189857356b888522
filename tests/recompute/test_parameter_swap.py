"""What other threads, and processes that are forked, find in a model while a step runs."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.recompute.parameter_swap import Slots, make_alias
from tests.support.networks import planned

PATIENCE_SECONDS = 60.0


class Gate(nn.Module):
    """A stage at which a step waits while another thread has a look."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: list[Look] = []
        self.recomputing = False

    def let(self, work: Callable[[], None]) -> None:
        """Have the next step wait for some work of another thread, which is there already."""
        self.looks.append(Look(work))

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and cs.is_recomputing() == self.recomputing:
            self.looks.pop().take_place()
        return x * 1.0


class Look:
    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.failures = work, list[BaseException]()
        self.come = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        self.come.wait()
        try:
            self.work()
        except BaseException as failure:
            self.failures.append(failure)

    def take_place(self) -> None:
        self.come.set()
        self.thread.join(PATIENCE_SECONDS)
        assert not self.thread.is_alive()
        if self.failures:
            raise self.failures[0]


class Counting(nn.Module):
    """Reads a buffer and changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1.0)
        return x * self.seen


def network() -> tuple[nn.Sequential, Gate]:
    torch.manual_seed(0)
    gate = Gate()
    parts = [m for _ in range(2) for m in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))]
    net = nn.Sequential(nn.Sequential(*parts, Counting(), gate, nn.Linear(6, 6)), nn.Linear(6, 6))
    return net, gate


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    net(x).square().sum().backward()
    gradients = [p.grad for p in net.parameters()]
    assert all(g is not None for g in gradients)
    return [*(g.clone() for g in gradients if g is not None), *(b.clone() for b in net.buffers())]


@pytest.fixture(params=["first run", "recomputation"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Gate, Any]:
    """A planned model, its gate, and a check that a step gives what plain autograd gives."""
    net, gate = network()
    twin, _ = network()
    x = torch.randn(5, 6)
    trained = cs.checkpointed(net, planned(net, x, "input_only"))
    gate.recomputing = request.param == "recomputation"

    def check() -> None:
        found, expected = step(trained, x), step(twin, x)
        assert not gate.looks  # somebody has looked
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    return net, gate, check


def test_others_find_parameters_and_buffers_themselves(case: Any) -> None:
    net, gate, check = case
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    values = {name: t.detach().clone() for name, t in own.items()}

    def look() -> None:
        found = dict(net.named_parameters()) | dict(net.named_buffers())
        assert all(found[name] is own[name] for name in own)
        assert all(net.get_parameter(n) is p for n, p in net.named_parameters())
        assert all(net.get_buffer(n) is b for n, b in net.named_buffers())
        assert net[0][0].weight is own["0.0.weight"]
        assert net[0][0]._parameters.get("bias") is own["0.0.bias"]
        saved = net.state_dict()
        assert all(saved[name].data_ptr() == t.data_ptr() for name, t in own.items())
        assert all(torch.equal(p, values[n]) for n, p in net.named_parameters())

    gate.let(look)
    check()
    assert all(vars(m)["_parameters"].__class__ is dict for m in net.modules())
    assert all(vars(m)["_buffers"].__class__ is dict for m in net.modules())


def test_others_clear_gradients_and_the_step_keeps_its_own(case: Any) -> None:
    net, gate, check = case
    first = net[0][0].weight

    def look() -> None:
        net.zero_grad()
        for module in net.modules():
            for name, _ in module.named_parameters(recurse=False):
                getattr(module, name).grad = None
        net[0][0].weight.grad = torch.full((6, 6), 7.0)
        assert first.grad is not None
        net[0].zero_grad(set_to_none=False)
        assert not first.grad.any()
        # What has arrived already is the caller's to clear, as in plain autograd.
        for p in net[1].parameters():
            p.grad = last.get(id(p))

    last: dict[int, Tensor] = {}
    for p in net[1].parameters():
        p.register_post_accumulate_grad_hook(lambda p: last.update({id(p): p.grad}))
    gate.let(look)
    check()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_others_copy_a_model(case: Any, way: Callable[[nn.Module], nn.Module]) -> None:
    net, gate, check = case
    copies: list[nn.Module] = []

    def look() -> None:
        copies.append(way(net[0][:7]))
        copies.append(copy.copy(net[0][0]))

    gate.let(look)
    check()
    x = torch.randn(5, 6)
    twin, shallow = copies
    assert shallow.weight is net[0][0].weight
    assert all(vars(m)["_parameters"].__class__ is dict for m in twin.modules())
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_the_thread_of_the_step_finds_stand_ins(case: Any) -> None:
    """As documented: they have the values, and gradients of their own."""
    net, *_ = case
    own, found = net[0][0].weight, list[Tensor]()

    def hook(module: nn.Module, *_: Any) -> None:
        found.append(module.weight)
        assert next(module.parameters()) is module.weight
        assert dict(module.named_parameters())["weight"] is module.weight
        assert torch.equal(module.weight, own)

    net[0][0].register_forward_hook(hook)
    step(net, torch.randn(5, 6))
    found.clear()
    x = torch.randn(5, 6)
    trained = cs.checkpointed(net, planned(net, x, "input_only"))
    found.clear()
    step(trained, x)
    assert found
    assert all(p is not own and p.grad is None for p in found)


def test_a_thread_that_the_step_itself_starts() -> None:
    net, _ = network()
    own, found = [*net.parameters()], list[Tensor]()

    def hook(*_: Any) -> None:
        thread = threading.Thread(target=lambda: found.extend(net.parameters()))
        thread.start()
        thread.join()

    net[0][0].register_forward_hook(hook)
    step(cs.checkpointed(net, planned(net, torch.randn(5, 6), "input_only")), torch.randn(5, 6))
    assert found
    assert {id(p) for p in found} == {id(p) for p in own}


def test_threads_have_stand_ins_in_one_module_and_go_in_any_order() -> None:
    module, mine = nn.Linear(2, 2), nn.Linear(2, 2)
    slots = Slots([module])
    own = slots.in_place()
    came, leave = threading.Event(), threading.Event()
    others: list[bool] = []

    def other() -> None:
        bound = slots.bind({id(p): make_alias(p) for p in slots.parameters()})
        with slots.parameters_replaced(bound):
            came.set()
            leave.wait()
            others.append(module.weight is bound[0])
        others.append(module.weight is own[0])

    thread, start = threading.Thread(target=lambda: start.wait() and other()), threading.Event()
    thread.start()
    with slots.parameters_replaced([mine.weight, mine.bias]):
        start.set()
        came.wait()
        assert module.weight is mine.weight
    assert module.weight is own[0]
    leave.set()
    thread.join()
    assert others == [True, True]
    assert vars(module)["_parameters"].__class__ is dict


def test_what_an_interrupted_step_leaves_is_gone_with_the_next() -> None:
    net, _ = network()
    twin, _ = network()
    x = torch.randn(5, 6)
    trained = cs.checkpointed(net, planned(net, x, "input_only"))
    left = Slots([net])
    block = left.parameters_replaced([make_alias(p) for p in left.in_place() if p is not None])
    block.__enter__()
    found, expected = step(trained, x), step(twin, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


FORKED = """
import copy, os, signal, sys, threading, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
import ckptsched as cs

torch.set_num_threads(1)
where, own_thread = sys.argv[1], sys.argv[2] == "own"
came, leave = threading.Event(), threading.Event()

class Gate(nn.Module):
    armed = False
    def forward(self, x):
        x = x * 1.0
        if self.armed and cs.is_recomputing() == (where in ("backward", "profile")):
            self.armed = False
            if own_thread:
                child()
            else:
                came.set()
                leave.wait()
        return x

class Steps(torch.utils.data.Dataset):
    # Takes a step of its own for each item, in a worker of the loader.
    def __len__(self):
        return 4
    def __getitem__(self, i):
        gate.armed = False
        return torch.cat([g.flatten() for g in step(trained_other, i)])

gate = Gate()
parts = [m for _ in range(2) for m in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))]
net = nn.Sequential(nn.Sequential(*parts, gate), nn.Linear(6, 6))
other = nn.Sequential(*parts[:3], nn.Linear(6, 6))
twins, x = copy.deepcopy((net, other)), torch.randn(5, 6)

def wrapped(model):
    chain = cs.profile(model, x)
    loose = cs.plan(chain, budget=2**50, solver="input_only")
    return cs.checkpointed(model, cs.plan(chain, budget=loose.peak_bytes, solver="input_only"))

trained, trained_other = wrapped(net), wrapped(other)
own = [*net.parameters(), *net.buffers()]

def step(model, seed=1):
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.enable_grad():  # a fork inside a stage may be where they are off
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]

def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))

def child():
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"the child ended with {status}"
        return
    try:
        signal.alarm(100)  # ends the child where it hangs
        gate.armed = False
        if not own_thread:
            found = [*net.parameters(), *net.buffers()]
            assert all(a is b for a, b in zip(own, found, strict=True)), "stand-ins are left"
            assert torch.backends.mha.get_fastpath_enabled()
            assert same(step(trained), step(twins[0]))
            cs.profile(net, x)
        assert same(step(trained_other), step(twins[1]))
        os._exit(0)
    except BaseException as error:
        print(type(error), error, file=sys.stderr, flush=True)
        os._exit(1)

step(trained), step(trained_other)
gate.armed = True
if where == "profile":
    work = lambda: cs.profile(net, x)
else:
    work = lambda: step(trained)
if own_thread:
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    came.wait()
    if where == "loader":
        for persistent in (False, True):
            loader = torch.utils.data.DataLoader(
                Steps(), num_workers=2, timeout=100, multiprocessing_context="fork",
                persistent_workers=persistent,
            )
            for _ in range(2):
                for i, row in enumerate(loader):
                    expected = torch.cat([g.flatten() for g in step(twins[1], i)])
                    assert torch.equal(row[0], expected), i
    else:
        child()
    leave.set()
    thread.join()
assert same(step(trained), step(twins[0]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize(
    ("where", "thread"),
    [
        *itertools.product(["forward", "backward", "profile"], ["other", "own"]),
        ("loader", "other"),
    ],
)
def test_a_process_forked_in_the_middle_of_a_step_takes_steps(where: str, thread: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, where, thread],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
