"""A step of a recorded model sees at a glance whether anything may steer it another way."""

from __future__ import annotations

import array
import copy
import gc
import weakref
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.capture.recording.attributes import around, attributes_of
from ckptsched.executor.attribute_watch import AttributeWatch

FACTOR = 1.0
TABLE = {"rate": [1.0]}


def scaled(x: Tensor) -> Tensor:
    return x * TABLE["rate"][0]


class Slotted:
    __slots__ = ("value",)


class Other(Slotted):
    __slots__ = ()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Settings(nn.Module):
    """Keeps what may steer a forward in every way in which modules keep it."""

    power = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.array, self.scalar = np.ones(4, dtype=np.float32), np.float32(1)
        self.raw, self.numbers = bytearray(b"ab"), array.array("d", [1.0])
        self.queue, self.very_deep = deque([1, 2]), {"a": [{"b": [{"c": [1.0]}]}]}
        held = self.closed_over = [1.0]
        self.closes = lambda x: x * held[0]
        self.inner, self.head = Inner(), nn.Linear(4, 4)
        self.number, self.text, self.flag, self.nothing = 2, "relu", True, None
        self.listed: list[Any] = [1, [2, {"three": 3}]]
        self.pair = (1, [2])
        self.table: dict[Any, Any] = {"a": 1, "deep": {"b": [1.5]}}
        self.ordered = OrderedDict(a=1, b=2)
        self.user = UserDict({"a": 1})
        self.names = {"x", "y"}
        self.config = SimpleNamespace(depth=3, inner=SimpleNamespace(kinds=["a"], rate=0.1))
        self.inner.config = self.config
        self.function: Any = torch.tanh
        self.slotted: Any = Slotted()
        self.slotted.value = 1
        self.itself: list[Any] = [7]
        self.tensors: Any = [torch.ones(2), {"scale": torch.ones(2), "power": 2}]
        self.scale = torch.ones(2)
        self.long = list(range(2000))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.relu(self.inner(x)))
        if self.table["deep"]["b"][0] > 2 or "z" in self.names:
            y = torch.tanh(y)
        y = scaled(y * FACTOR) * self.power * float(self.array[0]) * self.closes(1.0)
        return torch.sin(y) * self.queue[0] * self.slotted.value


def _set(path: str, value: Any) -> Callable[[Settings], None]:
    *way, last = path.split(".")

    def change(model: Settings) -> None:
        held: Any = model
        for name in way:
            held = getattr(held, name)
        setattr(held, last, value)

    return change


CHANGES: dict[str, Callable[[Settings], Any]] = {
    "a number": _set("number", 3),
    "a number of another type": _set("number", 2.0),
    "a flag": _set("flag", False),
    "a text": _set("text", "gelu"),
    "a function": _set("function", torch.sin),
    "from nothing": _set("nothing", 0),
    "a new one": _set("more", 1),
    "one less": lambda m: delattr(m, "text"),
    "one of a part": _set("inner.more", 1),
    "an entry of a list": lambda m: m.listed.__setitem__(0, 5),
    "an entry of a dict in a list": lambda m: m.listed[1][1].update(three=4),
    "a list grows": lambda m: m.listed.append(1),
    "a list in a tuple": lambda m: m.pair[1].append(1),
    "an entry of a dict": lambda m: m.table.update(a=2),
    "a list in a dict in a dict": lambda m: m.table["deep"]["b"].__setitem__(0, 2.5),
    "a key": lambda m: m.table.update(c=m.table.pop("a")),
    "an order": lambda m: m.ordered.move_to_end("a"),
    "an entry of a mapping": lambda m: m.user.update(a=2),
    "a set": lambda m: m.names.add("z"),
    "an entry of a configuration": _set("config.depth", 4),
    "a configuration in one": _set("config.inner.rate", 0.2),
    "a list in a configuration": lambda m: m.config.inner.kinds.append("b"),
    "a class": lambda m: setattr(m.slotted, "__class__", Other),
    "what leads to itself": lambda m: m.itself.__setitem__(0, 8),
    "a number beside tensors": lambda m: m.tensors[1].update(power=3),
    "one tensor more": lambda m: m.tensors.append(torch.ones(1)),
    "a tensor becomes a number": _set("scale", 1.0),
    "a long list": lambda m: m.long.append(1),
    "an entry of a long list": lambda m: m.long.__setitem__(1500, -1),
    "an entry of an array": lambda m: m.array.__setitem__(0, 2.0),
    "an array": lambda m: setattr(m, "array", 3 * m.array),
    "an array's type": lambda m: setattr(m, "array", m.array.astype(np.float64)),
    "a number of numpy": _set("scalar", np.float32(2)),
    "a byte": lambda m: m.raw.__setitem__(0, 1),
    "an array of Python": lambda m: m.numbers.__setitem__(0, 2.0),
    "a deque": lambda m: m.queue.__setitem__(0, 2),
    "what lies very deep": lambda m: m.very_deep["a"][0]["b"][0]["c"].__setitem__(0, 2.0),
    "what a function closes over": lambda m: m.closed_over.__setitem__(0, 2.0),
    "a slot": _set("slotted.value", 2),
    "a mode": lambda m: m.eval(),
    "a part": lambda m: m.inner.add_module("second", nn.Linear(1, 1)),
    "a hook": lambda m: m.inner.register_forward_hook(lambda *_: None),
    "a backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "a forward": lambda m: setattr(m.inner, "forward", lambda x: x),
    "the class of a part": lambda m: setattr(m.inner.layer, "__class__", nn.Identity),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_attributes_tell_is_noticed(change: Callable[[Settings], Any]) -> None:
    model = Settings()
    model.itself.append(model.itself)
    watch, before = AttributeWatch(model, ()), attributes_of(model)
    assert watch.sees_nothing_new()
    change(model)
    assert attributes_of(model) != before
    assert not watch.sees_nothing_new()
    assert AttributeWatch(model, ()).sees_nothing_new()


def test_what_steps_and_trainers_do_is_nothing_new() -> None:
    model = Settings()
    watch = AttributeWatch(model, ())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    model.inner.layer.weight = nn.Parameter(torch.ones(4, 4))
    model.scale, model.tensors[0] = torch.zeros(2), torch.zeros(2)
    model.tensors[1]["scale"] = torch.zeros(2)
    assert watch.sees_nothing_new()


def test_no_tensor_is_held() -> None:
    model = Settings()
    held: list[Any] = [model.scale, model.tensors[0], model.tensors[1]["scale"]]
    model.pair = (torch.ones(3), [torch.ones(3)])
    model.config.deep = [[[SimpleNamespace(cache=torch.ones(3))]]]
    held += [model.pair[0], model.pair[1][0], model.config.deep[0][0][0].cache]
    lives = [weakref.ref(tensor) for tensor in held]
    watch = AttributeWatch(model, ())
    held.clear()
    model.scale, model.tensors, model.pair, model.config.deep = None, None, None, None
    gc.collect()
    assert [life() for life in lives] == [None] * len(lives)
    assert not watch.sees_nothing_new()


@pytest.mark.parametrize("name", ["a list in a dict in a dict", "a set", "a hook"])
def test_steps_go_the_other_way_from_then_on(name: str) -> None:
    torch.manual_seed(0)
    plain = Settings()
    x = torch.randn(5, 4)
    model = cs.fit(copy.deepcopy(plain), x, budget="100%")
    chain: Any = cs.plan_of(model).chain
    assert chain.signature.recorded
    for changed in (False, False, True, False, False):
        for net in (model, plain):
            if changed and name == "a hook":
                net.inner.register_forward_hook(lambda *found: found[-1] * 2)
            elif changed:
                CHANGES[name](net)
            net.zero_grad()
            net(x).square().sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", ["FACTOR", "TABLE", "power", "array", "closed_over", "slotted"])
def test_other_values_give_other_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain, x = Settings(), torch.randn(5, 4)
    model = cs.fit(copy.deepcopy(plain), x, budget="100%")
    # A copy shares what its functions close over.
    nets = plain, model
    for step in range(4):
        if step == 2 and name == "FACTOR":
            monkeypatch.setitem(globals(), "FACTOR", 2.0)
        elif step == 2 and name == "TABLE":
            monkeypatch.setitem(TABLE, "rate", [2.0])
        elif step == 2 and name == "power":
            monkeypatch.setattr(Settings, "power", 2.0)
        elif step == 2 and name == "closed_over":
            plain.closes.__closure__[0].cell_contents[0] = 2.0
        for net in nets if step == 2 else ():
            if name == "array":
                net.array[0] = 2.0
            elif name == "slotted":
                net.slotted.value = 2
        losses = [net(x).square().sum() for net in nets]
        gradients = [
            torch.autograd.grad(loss, net.head.weight)[0]
            for loss, net in zip(losses, nets, strict=True)
        ]
        assert torch.equal(*losses)
        assert torch.equal(*gradients)


def test_what_libraries_of_torch_look_up_is_none_of_the_model() -> None:
    assert not around(nn.LSTM(3, 3))
    assert {outside.name for outside in around(Settings())} == {"FACTOR", "TABLE", "power"}


def test_a_copy_looks_at_what_is_its_own() -> None:
    torch.manual_seed(0)
    plain = Settings()
    x = torch.randn(5, 4)
    net = cs.checkpointed(plain, cs.plan(plain, x, budget="100%"))
    net(x).sum().backward()
    twin = copy.deepcopy(net)
    twin(x).sum().backward()
    twin.model.names.add("z")
    with pytest.raises(cs.PlanMismatchError, match="names of the model is another"):
        twin(x)
    net(x).sum().backward()
