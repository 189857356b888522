"""Recordings: any module as a straight line of calls that gives what the module gives."""

from __future__ import annotations

import copy
import gc
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.capture.inspection import Inspection
from ckptsched.capture.recording.record import record
from ckptsched.capture.recording.recording import Recording
from ckptsched.memory.meters import default_meter
from ckptsched.tensors.pytree import State
from tests.support.odd_modules import (
    GUARDED,
    KEEPING,
    OUTSIDE,
    ROWS,
    STRAIGHT,
    WHOLE,
    WIDTH,
    AppendsOutside,
    Box,
    KeepsTensor,
    ReadsValue,
    SetsItselfUp,
    StepsOfData,
    Two,
    Within,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_frozen() -> None:
    """Another test may have frozen what the collector searches, which makes recordings careful."""
    gc.unfreeze()


def batch(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> Recording:
    return record(Inspection.of(model), State.of((args, kwargs), opaque=True), CPU)


def seeded() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def step(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """Everything that a training step leaves: results, gradients, buffers, random state."""
    model.zero_grad()
    seeded()
    outputs = [y for y in State.of(run(), opaque=True).leaves if y.requires_grad]
    sum((y * torch.linspace(0.5, 1.5, y.numel()).view(y.shape)).sum() for y in outputs).backward()  # type: ignore[union-attr]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    buffers = [buffer.clone() for buffer in model.buffers()]
    return [*(y.detach() for y in outputs), *gradients, *buffers, torch.get_rng_state()]


def assert_same_steps(model: nn.Module, recording: Recording, x: Tensor) -> None:
    """A step of the model and one of its recording, from the same start."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = step(model, lambda: model(x))
    model.load_state_dict(before)
    again = step(model, lambda: recording.replay(model, (x,)))
    model.load_state_dict(before)
    assert len(plain) == len(again)
    assert all(map(torch.equal, plain, again))


def name_of(kind: type) -> str:
    return kind.__name__


@pytest.mark.parametrize("kind", STRAIGHT, ids=name_of)
def test_a_recording_gives_what_the_module_gives_on_other_batches(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    recording = recorded(model, batch())
    assert not recording.whole
    assert not recording.guards
    for seed in range(3):
        assert_same_steps(model, recording, batch(seed))


@pytest.mark.parametrize("kind", GUARDED, ids=name_of)
def test_a_guard_tells_which_batches_go_the_same_way(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), batch().abs()
    recording = recorded(model, x)
    assert recording.guards
    recording.check(model, State.of(((2 * x,), {})))
    assert_same_steps(model, recording, 2 * x)
    other = x / 1e3 if kind is StepsOfData else -x
    with pytest.raises(cs.PlanMismatchError, match="may go another way"):
        recording.check(model, State.of(((other,), {})))


@pytest.mark.parametrize("kind", WHOLE, ids=name_of)
def test_what_a_recording_cannot_follow_is_one_call(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Within(kind)
    recording = recorded(model, batch())
    assert [call.name for call in recording.calls] == ["before", "inner", "after"]
    assert list(recording.whole) == ["inner"]
    for seed in range(3):
        assert_same_steps(model, recording, batch(seed))
    OUTSIDE.clear()


def test_what_is_left_in_a_frozen_list_is_found() -> None:
    """Programs that fork take what they have out of the collector's sight."""
    gc.collect()
    gc.freeze()
    try:
        assert list(recorded(Within(AppendsOutside), batch()).whole) == ["inner"]
    finally:
        gc.unfreeze()
        OUTSIDE.clear()


@pytest.mark.parametrize("kind", WHOLE, ids=name_of)
def test_where_nothing_is_around_it_the_model_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(cs.ProfileError, match=r"cannot be taken apart: .*; move the lines"):
        recorded(kind(), batch().requires_grad_())
    OUTSIDE.clear()


@pytest.mark.parametrize("kind", [*STRAIGHT, *GUARDED, *WHOLE], ids=name_of)
def test_a_model_is_left_as_it_was(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Within(kind) if kind in WHOLE else kind()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = torch.get_rng_state()
    call, apply = nn.Module.__call__, vars(torch.autograd.Function)["apply"]
    recorded(model, batch())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items())
    assert nn.Module.__call__ is call
    assert vars(torch.autograd.Function)["apply"] is apply
    OUTSIDE.clear()


def test_what_a_module_keeps_is_kept_again() -> None:
    model, x = KeepsTensor(), batch(1)
    recording = recorded(model, batch())
    recording.replay(model, (x,))
    assert torch.equal(model.last, model.a(x))
    assert model.last.requires_grad


class Stack(nn.Module):
    """Layers that keep much for a backward, and a skip connection."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(layers)])

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        y = x
        for layer in self.layers:
            y = y + torch.tanh(layer(y)) * scale
        return y - x


def test_a_recording_takes_the_memory_of_a_forward_without_gradients() -> None:
    model, x = Stack(), torch.randn(8192, 64)  # a copy of the parameters is small beside it
    meter = default_meter(CPU)

    def without() -> None:
        with torch.no_grad():
            model(x)

    peaks = []
    for run in (without, lambda: recorded(model, x), lambda: model(x).sum().backward()):
        run()  # what is made once, such as the bookkeeping of modes, does not count
        peaks.append(meter.measure(run)[1].peak_bytes)
    assert peaks[1] <= 1.2 * peaks[0]
    assert peaks[2] > 4 * peaks[0]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda m: m(torch.randn(3, 64), scale=1.0), r"float32\[5, 64\].*float32\[3, 64\]"),
        (lambda m: m(torch.randn(5, 64).double(), scale=1.0), "float64"),
        (lambda m: m(torch.randn(5, 64), scale=2.0), "recorded for"),
    ],
)
def test_a_call_of_another_kind_is_refused(other: Callable[[Any], Any], said: str) -> None:
    model = Stack(2)
    recording = recorded(model, torch.randn(5, 64), scale=1.0)

    def check(*args: Any, **kwargs: Any) -> None:
        recording.check(model, State.of((args, kwargs), opaque=True))

    check(torch.randn(5, 64), scale=1.0)
    with pytest.raises(cs.PlanMismatchError, match=said):
        other(check)


def test_an_attribute_that_has_changed_is_named() -> None:
    model = Within(KeepsTensor)
    recording = recorded(model, batch())
    model.inner.eval()
    with pytest.raises(
        cs.PlanMismatchError,
        match=r"inner\.a\.training .*True then, False now",
    ):
        recording.check(model, State.of(((batch(),), {})))


class Steered(nn.Module):
    """Takes as many steps as a dict says."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.settings, self.named = Within(KeepsTensor), {"steps": [2]}, Box(batch())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.settings["steps"][0]):
            x = self.part(x)
        return x


CHANGES: dict[str, Callable[[Any], object]] = {
    "settings": lambda model: model.settings["steps"].append(model.settings["steps"].pop() + 1),
    "named": lambda model: setattr(model.named, "word", "new"),
    "part.(hooks)": lambda model: model.part.register_forward_hook(lambda m, a, y: y * 2),
    "(hooks)": lambda model: model.register_forward_hook(lambda m, a, y: y * 2),
    "forward": lambda model: setattr(model, "forward", lambda x: x),
    "part.(class and parts)": lambda model: model.part.add_module("more", nn.Identity()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_steer_the_model_otherwise_is_named(name: str) -> None:
    model = Steered()
    net = cs.captured(model, batch())
    assert torch.equal(net.give(net(net.take(batch(1)))), model(batch(1)))
    CHANGES[name](model)
    with pytest.raises(cs.PlanMismatchError, match=rf"^{re.escape(name)} of the model is another"):
        net.take(batch(1))


def test_hooks_of_the_model_itself_are_refused() -> None:
    model = Within(KeepsTensor)
    model.register_forward_hook(lambda m, a, y: y * 2)
    with pytest.raises(cs.ProfileError, match="the model itself has hooks"):
        cs.captured(model, batch())


def test_a_model_that_sets_itself_up_is_left_set_up() -> None:
    model, x = SetsItselfUp(), batch()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    seeded()
    state = torch.get_rng_state()
    recording = recorded(model, x)
    assert model.kind == "floating"
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert not recording.whole
    recording.check(model, State.of(((x,), {})))
    assert_same_steps(model, recording, batch(1))


class Configuration:
    use_cache = True


class Caches(nn.Module):
    """Keeps what no training step needs, unless it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.part = Configuration(), Within(KeepsTensor)

    def can_generate(self) -> bool:
        return True

    def forward(self, x: Tensor, use_cache: bool | None = None) -> dict[str, Any]:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        y = self.part(x)
        return {"out": y, "cache": Box(y.detach()) if use_cache else None}


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": True}])
def test_caches_are_taken_as_off_and_it_is_said(kwargs: dict[str, Any]) -> None:
    model, x = Caches(), batch()
    with pytest.warns(UserWarning, match="use_cache=False"):
        net = cs.captured(model, x, kwargs=kwargs)
    found = net.give(net(net.take(x, **kwargs)))
    assert torch.equal(found["out"], model(x)["out"])
    assert found["cache"] is None
    assert model.config.use_cache is True


def test_what_is_in_the_way_is_told_with_its_line() -> None:
    with pytest.raises(cs.ProfileError, match=r"reads values .*odd_modules\.py, line \d+"):
        recorded(ReadsValue(), batch())


@pytest.mark.parametrize("kind", KEEPING, ids=name_of)
def test_steps_in_a_row_keep_what_the_module_keeps(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    recording = recorded(model, batch())
    assert not recording.whole
    other = copy.deepcopy(model)
    for seed in range(3):
        x = batch(seed)
        recording.check(model, State.of(((x,), {})))
        plain = step(other, lambda x=x: other(x))
        again = step(model, lambda x=x: recording.replay(model, (x,)))
        assert all(map(torch.equal, plain, again))


class Tables(Two):
    def __init__(self) -> None:
        super().__init__()
        self.tables = [{"scale": torch.ones(WIDTH)}]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.tables[0]["scale"])


def test_a_tensor_in_a_list_is_looked_up_each_time() -> None:
    model, x = Tables(), batch()
    recording = recorded(model, x)
    model.tables[0]["scale"] = torch.full((WIDTH,), 3.0)
    recording.check(model, State.of(((x,), {})))
    assert_same_steps(model, recording, x)


class Remembers(Two):
    """Its second forward is another than its first."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if self.last is None else self.a(x) + self.last
        self.last = y.detach()
        return self.b(y)


def test_a_model_that_begins_without_a_state_takes_another_way_once_it_has_one() -> None:
    model, inputs = Remembers(), State.of(((batch(),), {}))
    first = recorded(model, batch())
    assert model.last is None
    first.check(model, inputs)
    plain = copy.deepcopy(model)
    assert torch.equal(first.replay(model, (batch(),)), plain(batch()))
    with pytest.raises(cs.PlanMismatchError, match="last of the model holds tensors"):
        first.check(model, inputs)
    later = recorded(model, batch())
    for _ in range(2):
        later.check(model, inputs)
        assert torch.equal(later.replay(model, (batch(),)), plain(batch()))
    model.last = None
    with pytest.raises(cs.PlanMismatchError, match="last of the model, which its forward reads"):
        later.check(model, inputs)


class HooksParameter(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.register_hook(lambda grad: grad / 2)
        return self.b(self.a(x))


class TakesBox(Two):
    def forward(self, box: Any, x: Tensor) -> Tensor:
        return self.b(self.a(x) + box.tensor)


class Fails(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.missing(x)


@pytest.mark.parametrize(
    ("model", "args", "error", "said"),
    [
        (HooksParameter, (), cs.ProfileError, r"a hook on a\.weight.* line \d+"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), (), cs.ProfileError, r"0\.weight .*no shape yet"),
        (TakesBox, (Box(torch.ones(WIDTH)),), cs.ProfileError, "a Box, in which tensors are not"),
        (Fails, (), AttributeError, "missing"),
    ],
)
def test_what_no_recording_can_hold_is_refused(
    model: Any, args: tuple[Any, ...], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        recorded(model(), *args, batch())


def test_hooks_of_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: None)
    try:
        with pytest.raises(cs.ProfileError, match="hooks are registered for all modules"):
            recorded(Within(KeepsTensor), batch())
    finally:
        handle.remove()


class EmptiesHookedList(nn.Module):
    """Collects features by hooks, in a list that its forward empties."""

    def __init__(self, *, detached: bool, first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.detached, self.first, self.seen = detached, first, list[Tensor]()
        for layer in self.layers:
            layer.register_forward_hook(self.collect)

    def collect(self, layer: nn.Module, given: Any, made: Tensor) -> None:
        self.seen.append(made.detach() if self.detached else made)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            self.seen.clear()
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if not self.first:
            self.seen.clear()
        return x


@pytest.mark.parametrize(("detached", "first"), [(True, True), (True, False), (False, False)])
def test_a_list_that_hooks_fill_and_the_forward_empties_does_not_grow(
    detached: bool, first: bool
) -> None:
    model = EmptiesHookedList(detached=detached, first=first)
    with pytest.raises(cs.ProfileError, match=r"calls change its 'seen'.* lines between them"):
        recorded(model, batch())
    outer = Within(partial(EmptiesHookedList, detached=detached, first=first))
    recording = recorded(outer, batch())
    assert list(recording.whole) == ["inner"]
    for _ in range(3):
        recording.replay(outer, (batch(),))
        assert len(outer.inner.seen) == (2 if first else 0)


class SamplesNormal(nn.Module):
    """Builds distributions, which look at the values of their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normal = torch.distributions.Normal(self.mean(x), self.spread(x).exp())
        z = normal.rsample()
        square = self.mean.weight @ self.mean.weight.T + torch.eye(WIDTH)
        prior = torch.distributions.MultivariateNormal(torch.zeros(WIDTH), square)
        return normal.log_prob(z.detach()) - prior.log_prob(z)[:, None]


def test_checks_of_distributions_are_no_reads_that_steer(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's compiler turns the checks off for good.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    torch.manual_seed(0)
    model = SamplesNormal()
    recording = recorded(model, batch())
    assert not recording.whole
    for seed in range(3):
        assert_same_steps(model, recording, batch(seed))
    for bad in (float("nan"), float("inf")):
        wrong = torch.full_like(batch(), bad)
        with pytest.raises(ValueError, match="Expected parameter"):
            model(wrong)
        with pytest.raises(cs.ExecutionError, match="not a number"):
            recording.replay(model, (wrong,))


class ReadsInConstraint(nn.Module):
    """Decides by what a constraint says, which is no check that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y if torch.distributions.constraints.positive.check(y).all() else -y


def test_what_decides_by_a_constraint_is_called_whole() -> None:
    assert list(recorded(Within(ReadsInConstraint), batch()).whole) == ["inner"]


class LooksForPadding(Two):
    """Looks whether a number is in the batch, as models of transformers look for padding."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if 0.0 in x[:, [-1, 0]] else self.b(torch.relu(self.a(x)))


def test_whether_a_number_is_in_the_batch_is_a_guard() -> None:
    model, padded = LooksForPadding(), batch()
    padded[-1, 0] = 0
    recording = recorded(model, batch())
    assert not recording.whole
    assert [guard.found for guard in recording.guards] == [False]
    assert_same_steps(model, recording, batch(1))
    with pytest.raises(cs.PlanMismatchError, match=r"__contains__ .* gave False"):
        recording.check(model, State.of(((padded,), {})))
    again = recorded(model, padded)
    assert [guard.found for guard in again.guards] == [True]
    assert_same_steps(model, again, padded)


class Queue(nn.Module):
    """Keeps old values in a buffer, from a place on that another buffer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(4 * ROWS, WIDTH))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        start = int(self.at)  # type: ignore[arg-type]
        self.kept[start : start + len(x)] = x.detach()  # type: ignore[operator]
        self.at[0] = (start + len(x)) % len(self.kept)  # type: ignore
        return x - self.kept.mean()  # type: ignore[operator]


class Warms(nn.Module):
    """Decides by a count of steps, which seldom changes the decision."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return x / 2 if self.steps < 100 else x  # type: ignore[operator]


def test_a_value_that_each_forward_changes_is_no_guard() -> None:
    assert list(recorded(Within(Queue), batch()).whole) == ["inner"]
    with pytest.raises(cs.ProfileError, match="a value that each forward changes"):
        recorded(Queue(), batch())
    warms = recorded(Within(Warms), batch())
    assert not warms.whole
    assert [guard.found for guard in warms.guards] == [True]


class OfNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.ones(4, dtype=np.float32))


def test_what_runs_unseen_is_named_as_what_it_is() -> None:
    with pytest.raises(cs.ProfileError, match=r"lift_fresh.* runs where torch does not say who"):
        cs.captured(OfNumpy(), torch.randn(3, 4))
