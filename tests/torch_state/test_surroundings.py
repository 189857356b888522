"""What a forward pass ran among is found again by what runs again, whatever is around by then."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ckptsched as cs
from ckptsched.torch_state.settings import EVERYWHERE, ON_CUDA, described, difference, read, written
from ckptsched.torch_state.surroundings import Ambient
from tests.support.networks import planned
from tests.support.surroundings import (
    CPU,
    FREE,
    PLANNED,
    SOLVERS,
    Around,
    Attention,
    Doubling,
    Squashing,
    Stage,
    all_of,
    chain_of,
    equal,
    float64,
    gradients,
    level,
    sample,
)

# Modes that keep a product for the backward take bytes that were not planned for.
more_bytes = pytest.mark.filterwarnings("ignore:stage '.' has a tape:ckptsched.BudgetWarning")
# As may those that were not around profile, which is said.
new_modes = pytest.mark.filterwarnings(
    "ignore:this [a-z]* runs among tests:ckptsched.BudgetWarning"
)


@new_modes
@more_bytes
@pytest.mark.parametrize("name", FREE)
def test_what_was_around_the_forward_alone_is_found_again(name: str) -> None:
    model, x, around = chain_of(Stage), sample(Stage), FREE[name]
    expected = gradients(model, model, x, around)
    assert not equal(expected, gradients(model, model, x, nullcontext)), "it has to matter"
    for solver in SOLVERS:
        trained = cs.checkpointed(model, planned(model, x, solver))
        found = gradients(trained, model, x, around)
        assert equal(found, expected), solver
        assert Ambient.take(CPU) == Ambient.take(CPU)


class Keeping(TorchDispatchMode):
    """Keeps a copy of what tanh gives."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.tanh.default:
            self.kept.append(found.detach().clone())
        return found


class Calls(TorchFunctionMode):
    """The same one level up, which sees no backward."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.tanh:
            self.kept.append(found.detach().clone())
        return found


def step_among(run: Any, x: Tensor, forward: Around, backward: Around) -> list[str]:
    """Take a step, and return what is said of bytes."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", cs.BudgetWarning)
        with forward():
            loss = run(x).square().mean()
        with backward():
            loss.backward()
    return [str(w.message) for w in told]


@pytest.mark.parametrize("around", [Keeping, Calls])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_modes_that_were_not_around_profile_are_named_once(around: Around, where: str) -> None:
    model, x = chain_of(Stage), sample(Stage)
    plan = planned(model, x, "every_2")
    run = cs.checkpointed(model, plan)
    both = (around, nullcontext) if where == "forward" else (nullcontext, around)
    expected = copy.deepcopy(model)
    step_among(expected, x, *both)
    told = step_among(run, x, *both)
    assert equal(grads(model), grads(expected))
    assert step_among(run, x, *both) == []
    if around is Calls and where == "backward":
        assert told == []
        return
    (text,) = told
    assert f"this {where} runs among {__name__}.{around.__name__}, and" in text  # type: ignore[attr-defined]
    assert f"projected peak of {plan.peak_bytes} bytes" in text
    assert f"with {around.__name__}(): ..." in text  # type: ignore[attr-defined]


def test_what_a_mode_keeps_for_good_is_said_with_both_figures() -> None:
    """A plan provides for what a mode computes where it was profiled, not for what piles up."""
    model, x = chain_of(Stage), sample(Stage)
    with Keeping():
        plan = planned(model, x, "every_2")
    plan = cs.Plan.from_json(plan.to_json())
    run = cs.checkpointed(model, plan)
    (text,) = step_among(run, x, Keeping, nullcontext)
    kept = 5 * x.nbytes
    assert f"kept {kept} bytes for good" in text
    assert f"{plan.peak_bytes} bytes" in text
    assert f"{plan.peak_bytes + kept} (" in text
    assert step_among(run, x, Keeping, nullcontext) == []
    (text,) = step_among(run, x, nullcontext, nullcontext)
    assert f"profile ran among {__name__}.Keeping, and this forward does not" in text


def test_a_counter_of_flops_says_so_where_it_holds_the_graph() -> None:
    """Around the forward alone it takes nothing."""
    layers = [part for _ in range(4) for part in (nn.Linear(6, 6), nn.Tanh())]
    model, x = nn.Sequential(*layers), sample(Stage)
    plan = planned(model, x, "input_only")
    run = cs.checkpointed(model, plan)
    assert step_among(run, x, partial(FlopCounterMode, display=False), nullcontext) == []
    with FlopCounterMode(display=False):
        (text,) = step_among(run, x, nullcontext, nullcontext)
        assert f"more than the projected peak of {plan.peak_bytes} bytes" in text
        assert step_among(run, x, nullcontext, nullcontext) == []


def test_a_second_mode_of_a_class_is_one_more() -> None:
    model, x = chain_of(Stage), sample(Stage)
    with Squashing():
        run = cs.checkpointed(model, planned(model, x, "every_2"))
    assert step_among(run, x, Squashing, nullcontext) == []
    (text,) = step_among(run, x, all_of(Squashing, Squashing), nullcontext)
    assert f"this forward runs among {Squashing.__module__}.Squashing, and profile did not" in text


@new_modes
def test_a_mode_that_takes_bytes_says_so_unless_it_was_planned_for() -> None:
    model, x = chain_of(Stage), sample(Stage)
    plan = planned(model, x, "every_2")
    with pytest.warns(cs.BudgetWarning, match=r"stage '\d' has a tape and an output of 208 bytes"):
        gradients(cs.checkpointed(model, plan), model, x, Doubling)
    with Doubling():
        plan = planned(model, x, "every_2")
    gradients(cs.checkpointed(model, plan), model, x, Doubling)


@new_modes
@pytest.mark.parametrize("name", FREE)
def test_what_is_around_the_backward_alone_is_not_found(name: str) -> None:
    """A stage that runs again must not see what its first run did not."""
    model, x = chain_of(Stage), sample(Stage)
    y = model(x).square().mean()
    with FREE[name]():
        y.backward()
    expected = [p.grad for p in model.parameters()]
    for solver in SOLVERS:
        trained = cs.checkpointed(model, planned(model, x, solver))
        model.zero_grad()
        y = trained(x).square().mean()
        with FREE[name]():
            y.backward()
        assert equal([p.grad for p in model.parameters()], expected), solver


@pytest.mark.parametrize("name", PLANNED)
def test_settings_of_the_forward_alone_are_found_again(name: str) -> None:
    around = PLANNED[name]
    for kind in (Stage, Attention):
        model, x = chain_of(kind), sample(kind)
        expected = gradients(model, model, x, around)
        with around():
            plans = {solver: planned(model, x, solver) for solver in ("every_2", "input_only")}
        before = read(EVERYWHERE)
        for solver, plan in plans.items():
            found = gradients(cs.checkpointed(model, plan), model, x, around)
            assert equal(found, expected), (kind, solver)
        assert read(EVERYWHERE) == before


@pytest.mark.parametrize("name", PLANNED)
def test_a_step_among_other_settings_than_planned_is_refused_by_name(name: str) -> None:
    model, x = chain_of(Attention), sample(Attention)
    with PLANNED[name]():
        pass  # the way back does not lead to where torch began: precision "none" is "ieee" then
    trained = cs.checkpointed(model, planned(model, x, "every_2"))
    with PLANNED[name](), pytest.raises(cs.PlanMismatchError, match=r"for (.*): .*, found") as it:
        trained(x)
    assert any(f"for {s.name}: " in str(it.value) for s in EVERYWHERE)
    trained(x).sum().backward()


def test_attention_matters() -> None:
    model, x = chain_of(Attention), sample(Attention)
    math = gradients(model, model, x, PLANNED["attention"])
    flash = gradients(model, model, x, nullcontext)
    assert not equal(math, flash)


@more_bytes
def test_plans_of_older_versions_know_no_settings() -> None:
    model, x = chain_of(Attention), sample(Attention)
    plan = planned(model, x, "every_2")
    data = plan.chain.to_json()
    assert "settings" in data["signature"]
    del data["signature"]["settings"], data["signature"]["hooks"]
    chain = cs.Chain.from_json(data)
    assert chain.signature is not None
    assert chain.signature.settings == ()
    trained = cs.checkpointed(model, cs.plan(chain, budget=plan.budget_bytes, solver="every_2"))
    expected = gradients(model, model, x, PLANNED["attention"])
    assert equal(gradients(trained, model, x, PLANNED["attention"]), expected)


def test_a_default_device_for_the_whole_program() -> None:
    """torch takes it off during a backward."""
    model, x = chain_of(Stage), sample(Stage)
    expected = gradients(model, model, x, FREE["default device"])
    torch.set_default_device("meta")
    try:
        trained = cs.checkpointed(model, planned(model, x, "every_stage"))
        y = trained(x)
        y.square().mean().backward()
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
        # Torch 2.9 could tell no default device from here on.
        held = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None)
        if getattr(held, "device_context", 0) is None:
            del held.device_context
    assert equal([y.detach(), *(p.grad for p in model.parameters())], expected)


def test_two_models_among_different_things() -> None:
    """Each finds again what its own forward found."""
    one, two, x = chain_of(Stage), chain_of(Stage, 3), sample(Stage)

    def step(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> list[Any]:
        one.zero_grad()
        two.zero_grad()
        with Doubling(1.5):
            y = first(x)
            with torch.device("meta"), level(0.5):
                y = second(y)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for m in (one, two) for p in m.parameters())]

    expected = step(one, two)
    pair = [cs.checkpointed(m, planned(m, x, "every_stage")) for m in (one, two)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "stage '.' has a tape", cs.BudgetWarning)
        warnings.filterwarnings("ignore", "this forward runs among tests", cs.BudgetWarning)
        assert equal(step(*_with_inputs(pair, one, two)), expected)


def _with_inputs(pair: list[cs.Checkpointed], one: nn.Module, two: nn.Module) -> Any:
    # The second model's input has a gradient, which its plan must be for.
    x = sample(Stage).requires_grad_()
    return pair[0], cs.checkpointed(two, planned(two, x, "every_stage"))


@new_modes
@more_bytes
def test_backward_in_another_thread() -> None:
    model, x = chain_of(Stage), sample(Stage)
    around = all_of(FREE["both kinds"], FREE["context variable"])
    expected = gradients(model, model, x, around)
    trained = cs.checkpointed(model, planned(model, x, "every_stage"))
    model.zero_grad()
    with around():
        y = trained(x)
    thread = threading.Thread(target=lambda: y.square().mean().backward())
    thread.start()
    thread.join()
    assert equal([y.detach(), *(p.grad for p in model.parameters())], expected)


@pytest.mark.parametrize("again", ["retain_graph", "create_graph"])
def test_further_backwards_find_the_same(again: str) -> None:
    model, x = chain_of(Stage), sample(Stage)
    around = all_of(FREE["both kinds"], FREE["context variable"], float64)
    with around():
        plan = planned(model, x, "every_stage")

    def step(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with around():
            y = run(x)
        loss, weights = y.square().mean(), list(model.parameters())
        if again == "retain_graph":
            torch.autograd.grad(loss, weights, retain_graph=True)
            return list(torch.autograd.grad(loss, weights))
        first = torch.autograd.grad(loss, weights, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), weights))

    expected = step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cs.BudgetWarning)
        found = step(cs.checkpointed(model, plan))
    for a, b in zip(found, expected, strict=True):  # one graph has other sums than many
        torch.testing.assert_close(a, b, rtol=0 if again == "retain_graph" else 1e-4, atol=0)


def test_everything_is_put_back_after_a_failure() -> None:
    class Failing(Stage):
        armed = False

        def forward(self, x: Tensor) -> Tensor:
            if self.armed:
                raise ZeroDivisionError
            return super().forward(x)

    model = nn.Sequential(Stage(), Failing(), Stage())
    x, around = sample(Stage), all_of(FREE["both kinds"], FREE["context variable"], float64)
    with around():
        plan = planned(model, x, "input_only")
        y = cs.checkpointed(model, plan)(x)
    before = Ambient.take(CPU)
    Failing.armed = True
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert Ambient.take(CPU) == before


@new_modes
def test_modes_are_not_entered_as_their_users_do() -> None:
    """What entering does besides, such as to set a counter to zero, happens once."""
    model, x, mode = chain_of(Stage), sample(Stage), Squashing()
    trained = cs.checkpointed(model, planned(model, x, "every_stage"))
    with mode:
        y = trained(x)
    y.sum().backward()
    assert mode.entered == 1


def test_flops_of_a_forward_are_those_of_plain_autograd() -> None:
    """Who only counts is not asked again when it has stopped."""
    model, x = chain_of(Stage), sample(Stage)
    trained = cs.checkpointed(model, planned(model, x, "every_stage"))
    counts = []
    for run in (model, trained):
        with FlopCounterMode(display=False) as counter:
            y = run(x)
        y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:FlopCounterMode is around:ckptsched.BudgetWarning")
def test_flops_of_a_step_are_those_that_were_done() -> None:
    x = sample(Stage)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)])
    plan = planned(model, x, "input_only")
    with FlopCounterMode(display=False) as once:
        assert planned(model, x, "input_only").forwards == plan.forwards
        counted = once.get_total_flops()
        model(x)
    one = (once.get_total_flops() - counted) // 5
    with FlopCounterMode(display=False) as plain:
        model(x).sum().backward()
    with FlopCounterMode(display=False) as found:
        cs.checkpointed(model, plan)(x).sum().backward()
    assert found.get_total_flops() == plain.get_total_flops() + (plan.forwards - 5) * one


@pytest.mark.parametrize("off", [True, False])
def test_a_backward_with_other_kernels_than_were_measured_says_so_once(off: bool) -> None:
    """A convolution's kernel is chosen in the forward, and that of its backward in the backward."""
    layers = [nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(4)]
    model, x = nn.Sequential(*layers), torch.randn(16, 4, 8)
    expected = copy.deepcopy(model)

    def around() -> Any:
        mkldnn = tuple(each for each in EVERYWHERE if each.name == "mkldnn")
        return written(mkldnn, (False,)) if off else nullcontext()

    with around():
        run = cs.checkpointed(model, planned(model, x))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", cs.BudgetWarning)
        for _ in range(2):
            for each in (run, expected):
                with around():
                    y = each(x)
                y.square().mean().backward()
    assert all(map(torch.equal, grads(model), grads(expected)))
    found = [str(w.message) for w in told if w.category is cs.BudgetWarning]
    assert len(found) == off
    assert all("mkldnn was False when the backward was measured and is True" in m for m in found)


def grads(model: nn.Module) -> list[Any]:
    return [p.grad for p in model.parameters()]


# -- the parts


def test_settings_are_written_and_put_back() -> None:
    for each in (*EVERYWHERE, *ON_CUDA):
        value = each.read()
        assert value is None or isinstance(described([each], [value])[0], str)
    names = [each.name for each in (*EVERYWHERE, *ON_CUDA)]
    assert len(set(names)) == len(names)
    flags = [s for s in EVERYWHERE if isinstance(s.read(), bool)]
    assert len(flags) >= 6
    before = read(EVERYWHERE)
    for each in flags:
        if each.name in ("opt_einsum", "fp16 reduction on the CPU"):
            continue  # off, or not to be had on every machine
        with written((each,), (not each.read(),)):
            assert read(EVERYWHERE) != before
        assert read(EVERYWHERE) == before


def test_old_and_new_names_of_precision_together() -> None:
    """torch then refuses to say what the old one is."""
    before = read(EVERYWHERE)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        mixed = read(EVERYWHERE)
        assert None in mixed
        with written(EVERYWHERE, before):
            assert read(EVERYWHERE) == before
        assert read(EVERYWHERE) == mixed
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_settings_that_only_one_side_knows_are_no_difference() -> None:
    assert difference(["a: 1", "b: x: y"], ["b: x: y", "c: 3"]) is None
    assert difference(["a: 1", "b: 2"], ["b: 3"]) == ("b", "2", "3")


def test_nothing_is_entered_where_nothing_differs() -> None:
    ambient = Ambient.take(CPU)
    assert ambient.again(ambient) is ambient.again(ambient)
    assert ambient.found_from(ambient) == ambient
    other = replace(ambient, settings=())
    assert other != ambient
    assert ambient != object()
