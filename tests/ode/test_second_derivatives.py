"""Derivatives of `odeint` beyond the first: those of plain autograd, or a typed error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import odeint
from ckptsched.base.errors import BudgetWarning, ExecutionError, InfeasibleBudgetError

DOUBLE = torch.float64
FIXED = ["euler", "midpoint", "heun", "ralston", "heun3", "rk4", "rk4_classic", "tsit5", "leapfrog"]
ADAPTIVE = ["bosh3", "dopri5", "tsit5", "dopri8"]
ENTRIES = 4


@dataclass
class Setting:
    """What is solved, and with respect to what it is differentiated."""

    method: str
    adaptive: bool
    wanted: frozenset[str]
    """Some of "y0", "parameters", "constant" and "times"."""
    outputs: tuple[int, ...]
    """The outputs that the loss reads."""
    pair: bool = False
    backwards: bool = False
    step_size: float | None = None
    granularity: str = "step"
    times: int = 5
    fine: int = 1
    net: nn.Module = field(init=False)
    constant: Tensor = field(init=False)
    y0: Tensor = field(init=False)
    t: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(3)
        self.net = nn.Linear(ENTRIES, ENTRIES, bias=False).double()
        self.net.requires_grad_("parameters" in self.wanted)
        self.constant = torch.randn(ENTRIES, dtype=DOUBLE).requires_grad_("constant" in self.wanted)
        self.y0 = torch.randn(ENTRIES, dtype=DOUBLE).requires_grad_("y0" in self.wanted)
        t = torch.linspace(0.1, 0.9, self.times, dtype=DOUBLE)
        self.t = (t.flip(0) if self.backwards else t).requires_grad_("times" in self.wanted)

    @property
    def inputs(self) -> list[Tensor]:
        every = [self.y0, self.t, self.constant, *self.net.parameters()]
        return [x for x in every if x.requires_grad]

    def loss(self, budget: int | None, **other: Any) -> Tensor:
        """Of a solve; reads some outputs only, and is no square."""
        net, constant = self.net, self.constant

        def slope(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(net(y)) * torch.cos(2 * t) + constant * torch.sin(y) * t

        def of_pair(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            a, b = y
            return slope(t, b), slope(t, a) * 0.5

        func: Callable[..., Any] = of_pair if self.pair else slope
        y0 = (self.y0, torch.ones_like(self.y0) + self.y0 * 0.1) if self.pair else self.y0
        t = self.t
        if self.fine > 1:  # steps between the times, which move with them
            shares = torch.arange(self.fine, dtype=DOUBLE) / self.fine
            between = t[:-1, None] + (t[1:] - t[:-1])[:, None] * shares
            t = torch.cat([between.flatten(), t[-1:]])
        options = None if self.step_size is None else {"step_size": self.step_size}
        given = {"rtol": 1e-3, "atol": 1e-4} if self.adaptive else {"granularity": self.granularity}
        given |= {"method": self.method, "options": options} | other
        found = odeint(func, y0, t, budget=budget, **given)
        parts = found if isinstance(found, tuple) else (found,)
        read = [part[j * self.fine] for part in parts for j in self.outputs]
        return torch.stack([torch.sin(z).sum() * (k + 1) + z.pow(3).sum() for k, z in
                            enumerate(read)]).sum()  # fmt: skip

    def budget(self, share: float) -> int:
        """A budget: the least for 0, and room for everything for 1."""
        try:
            self.loss(1)
        except InfeasibleBudgetError as error:
            least = error.least_budget_bytes
            assert least is not None
            return int(least + share * share * 200_000)
        raise AssertionError("one byte was enough")


def derivatives(loss: Tensor, inputs: Sequence[Tensor], order: int) -> list[Tensor]:
    """The first derivatives, then those of a random combination of them, and so on."""
    weights = torch.Generator().manual_seed(5)
    found: list[Tensor] = []
    for k in range(order):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            gradients = torch.autograd.grad(
                loss, inputs, create_graph=k < order - 1, allow_unused=True
            )
        gradients = [torch.zeros_like(x) if g is None else g
                     for x, g in zip(inputs, gradients, strict=True)]  # fmt: skip
        found += [g.detach() for g in gradients]
        drawn = [torch.randn(g.shape, dtype=DOUBLE, generator=weights) for g in gradients]
        loss = torch.stack([(g * w).sum() for g, w in zip(gradients, drawn, strict=True)]).sum()
    return found


def assert_near(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        scale = 1.0 + float(b.abs().max())
        assert float((a - b).abs().max()) <= tolerance * scale


def settings_of(methods: list[str], *, adaptive: bool) -> st.SearchStrategy[Setting]:
    names = ["y0", "parameters", "constant", "times"]
    times = 5
    return st.builds(
        Setting,
        method=st.sampled_from(methods),
        adaptive=st.just(adaptive),
        wanted=st.frozensets(st.sampled_from(names), min_size=1),
        outputs=st.frozensets(st.integers(0, times - 1), min_size=1).map(
            lambda chosen: tuple(sorted(chosen))
        ),
        pair=st.booleans(),
        backwards=st.booleans(),
        step_size=st.none() if adaptive else st.sampled_from([None, 0.11, 0.31]),
        granularity=st.just("step") if adaptive else st.sampled_from(["step", "slope"]),
        times=st.just(times),
    )


def runnable(setting: Setting) -> Setting:
    """Leapfrog takes pairs, and its steps whole."""
    if setting.method == "leapfrog":
        setting.pair, setting.granularity = True, "step"
    if setting.outputs == (0,) and "y0" not in setting.wanted:
        setting.outputs = (0, 1)  # else nothing depends on anything
    if setting.method == "tsit5" and not setting.adaptive and setting.step_size is None:
        setting.step_size = 0.11
    return setting


@settings(deadline=None, max_examples=25)
@given(
    setting=settings_of(FIXED, adaptive=False).map(runnable),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    order=st.integers(1, 3),
)
def test_derivatives_within_a_budget_are_plain_autograds(
    setting: Setting, share: float, order: int
) -> None:
    plain = derivatives(setting.loss(None), setting.inputs, order)
    within = derivatives(setting.loss(setting.budget(share)), setting.inputs, order)
    assert_near(within, plain, 1e-11)


@settings(deadline=None, max_examples=25)
@given(
    setting=settings_of(ADAPTIVE, adaptive=True).map(runnable),
    share=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    order=st.integers(1, 3),
)
def test_derivatives_of_adaptive_solves_within_a_budget_are_plain_autograds(
    setting: Setting, share: float, order: int
) -> None:
    plain = derivatives(setting.loss(None), setting.inputs, order)
    within = derivatives(setting.loss(setting.budget(share)), setting.inputs, order)
    assert_near(within, plain, 1e-11)


@settings(deadline=None, max_examples=10)
@given(setting=settings_of(ADAPTIVE, adaptive=True).map(runnable))
def test_derivatives_of_adaptive_solves_are_those_of_the_solution(setting: Setting) -> None:
    """To the tolerance: those of many small steps, which plain autograd goes back through."""
    tight = {"rtol": 1e-8, "atol": 1e-9, "options": {"max_step": 0.05}}
    found = derivatives(setting.loss(None, **tight), setting.inputs, 2)
    setting.fine = 20
    exact = derivatives(setting.loss(None, method="rk4_classic", options=None), setting.inputs, 2)
    assert_near(found, exact, 1e-4)


@settings(deadline=None, max_examples=10)
@given(setting=settings_of(FIXED, adaptive=False).map(runnable))
def test_second_derivatives_on_a_grid_are_differences_of_the_first(setting: Setting) -> None:
    inputs = setting.inputs
    weights = torch.Generator().manual_seed(5)
    drawn = [torch.randn(x.shape, dtype=DOUBLE, generator=weights) for x in inputs]

    def first() -> list[Tensor]:
        return derivatives(setting.loss(None), inputs, 1)

    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for x, v in zip(inputs, drawn, strict=True):
                x.add_(v, alpha=sign * 1e-5)
        values.append(first())
        with torch.no_grad():
            for x, v in zip(inputs, drawn, strict=True):
                x.sub_(v, alpha=sign * 1e-5)
    differences = [(a - b) / 2e-5 for a, b in zip(*values, strict=True)]
    found = derivatives(setting.loss(None), inputs, 2)[len(inputs) :]
    assert_near(found, differences, 1e-6)


@pytest.mark.parametrize("budget", [None, 10**6])
@pytest.mark.parametrize("method", ["implicit_euler", "trapezoid"])
def test_implicit_steps_refuse_to_be_differentiated_again(method: str, budget: int | None) -> None:
    setting = Setting(method, False, frozenset({"parameters"}), (1,))
    with pytest.raises(ExecutionError, match="differentiated again"):
        derivatives(setting.loss(budget), setting.inputs, 2)


def test_a_gradient_that_is_differentiated_again_leaves_none_behind() -> None:
    """The first backward's gradient of the outputs is no part of a later one's."""
    setting = Setting("rk4", False, frozenset({"parameters"}), (1, 2))
    first, again = (derivatives(setting.loss(10**6), setting.inputs, 2) for _ in range(2))
    assert_near(first, again, 0.0)
    loss = setting.loss(10**6)
    plain = torch.autograd.grad(loss, setting.inputs, retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BudgetWarning)
        torch.autograd.grad(loss, setting.inputs, create_graph=True)
    for one, other in zip(plain, torch.autograd.grad(loss, setting.inputs), strict=True):
        assert torch.equal(one, other)
