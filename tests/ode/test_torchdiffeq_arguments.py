"""Every argument of torchdiffeq's functions: it works, or is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckptsched import CallbackWarning, odeint, solve_adaptive
from ckptsched.base.errors import (
    CkptschedError,
    InfeasibleBudgetError,
    IntegrationError,
    WorkloadError,
)
from ckptsched.memory.meters import default_meter
from tests.ode.test_odeint import DOUBLE, Field, assert_within, equal, gradients, loss_of, problem

ENDS = torch.tensor([0.0, 1.0], dtype=DOUBLE)
TIMES = torch.tensor([0.0, 0.4, 1.0], dtype=DOUBLE)
ADAPTIVE = ["bosh3", "dopri5", "tsit5"]
FIXED = ["euler", "rk4"]


def decay(t: Tensor, y: Any) -> Any:
    return tuple(-part for part in y) if isinstance(y, tuple) else -y


# ---------------------------------------------------------------------------- leapfrog


class Pair(nn.Module):
    """dq/dt = p + drag_q * q, dp/dt = -q - drag_p * p + cos(t), all of them trained."""

    def __init__(self, drag_q: float = 0.0, drag_p: float = 0.0) -> None:
        super().__init__()
        self.drags = nn.Parameter(torch.tensor([drag_q, drag_p], dtype=DOUBLE))
        self.calls = 0

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        q, p = y
        drags = self.drags.to(q.dtype)
        return p + drags[0] * q, -q - drags[1] * p + torch.cos(t)


def pair(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    return torch.full((3,), 0.6, dtype=dtype), torch.full((3,), -0.8, dtype=dtype)


@given(
    drag_q=st.sampled_from([0.0, 1e-6, 0.01, -0.5, 3.0]),
    drag_p=st.sampled_from([0.0, 1e-6, 0.01, -0.5, 3.0]),
    dtype=st.sampled_from([torch.complex128, DOUBLE]),
    budget=st.sampled_from([None, "1MiB"]),
)
def test_leapfrog_is_refused_exactly_where_a_part_depends_on_itself(
    drag_q: float, drag_p: float, dtype: torch.dtype, budget: str | None
) -> None:
    f = Pair(drag_q, drag_p)

    def solve() -> Any:
        return odeint(f, pair(dtype), TIMES, method="leapfrog", budget=budget)

    if drag_q == drag_p == 0.0:
        solve()
        return
    found = [f"d{x}/dt changes with {x}" for x, drag in (("q", drag_q), ("p", drag_p)) if drag]
    with pytest.raises(WorkloadError, match=f"({'|'.join(found)}),.* order one .*'rk4'"):
        solve()


def test_leapfrog_takes_no_evaluation_more_where_it_does() -> None:
    f = Pair()
    steps = 8
    odeint(f, pair(), ENDS, method="leapfrog", options={"step_size": 1 / steps})
    first = Pair()
    odeint(first, pair(), ENDS, method="leapfrog", options={"step_size": 1.0})
    # The second force of a step is at another time than the first, so one step is looked at again.
    assert f.calls - first.calls == 3 * (steps - 1)


def test_leapfrog_takes_what_changes_with_time_draws_or_counts() -> None:
    torch.manual_seed(3)
    noisy = nn.Dropout(0.5)
    generator = torch.get_rng_state()

    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return noisy(y[1]), -noisy(y[0]) * torch.exp(t)

    one = odeint(f, pair(), TIMES, method="leapfrog")
    state = torch.get_rng_state()
    torch.set_rng_state(generator)

    def by_hand(f: Any, t: Tensor, h: Tensor, y: Any) -> Any:
        (q, p), half = y, h / 2
        p = p + half * f(t, (q, p))[1]
        q = q + h * f(t + half, (q, p))[0]
        return q, p + half * f(t + h, (q, p))[1]

    other = odeint(f, pair(), TIMES, method=by_hand)
    assert torch.equal(state, torch.get_rng_state())  # the look has drawn nothing
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


def test_leapfrog_that_is_looked_at_keeps_its_budget_and_gradients() -> None:
    f, q = problem(batch=20)
    p = torch.randn_like(q).requires_grad_()

    def force(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], f(t, y[0])

    def call(budget: int | None) -> Any:
        how: Any = {"method": "leapfrog", "options": {"step_size": 0.05}, "loss": loss_of}
        return odeint(force, (q, p), TIMES, budget=budget, **how)

    for share in (0.3, 0.6, 1.0):
        assert_within(call, [q, p, *f.parameters()], share)


def test_leapfrog_that_is_refused_would_be_of_order_one() -> None:
    """What the message says is so; a step by hand is not looked at."""

    def by_hand(f: Any, t: Tensor, h: Tensor, y: Any) -> Any:
        q, p = y
        p = p + h / 2 * f(t, (q, p))[1]
        q = q + h * f(t + h / 2, (q, p))[0]
        return q, p + h / 2 * f(t + h, (q, p))[1]

    def error(f: Pair, steps: int) -> float:
        how: Any = {"method": by_hand, "options": {"step_size": 1 / steps}}
        exact = odeint(f, pair(), ENDS, method="rk4", options={"step_size": 1 / 512})
        found = odeint(f, pair(), ENDS, **how)
        return max(float((a - b)[-1].abs().max()) for a, b in zip(found, exact, strict=True))

    for f, order in ((Pair(), 2), (Pair(drag_p=0.5), 1)):
        with torch.no_grad():
            assert abs(math.log2(error(f, 32) / error(f, 64)) - order) < 0.1


def test_leapfrog_looks_until_both_parts_have_moved() -> None:
    """At rest nothing shows; the step in which the pair is pushed tells."""

    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return y[1], (t > 0.5) * 1.0 - 0.1 * y[1]

    at_rest = torch.zeros(2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    how: Any = {"method": "leapfrog", "options": {"step_size": 0.1}}
    odeint(f, at_rest, torch.tensor([0.0, 0.4], dtype=DOUBLE), **how)
    with pytest.raises(WorkloadError, match=r"dp/dt changes with p, .* at time 0\.[67]"):
        odeint(f, at_rest, ENDS, **how)


# ---------------------------------------------------------------------------- tolerances


@settings(deadline=None)
@given(
    method=st.sampled_from(ADAPTIVE),
    rtol=st.floats(1e-8, 1e-2),
    atol=st.floats(1e-8, 1e-2),
    parts=st.booleans(),
)
def test_a_number_for_all_entries_is_a_tensor_full_of_it(
    method: str, rtol: float, atol: float, parts: bool
) -> None:
    f = Field().double()
    torch.manual_seed(0)
    y0 = torch.randn(2, 6, dtype=DOUBLE)
    state: Any = (y0, y0[:1]) if parts else y0

    def func(t: Tensor, y: Any) -> Any:
        return (f(t, y[0]), f(t, y[1])) if parts else f(t, y)

    def full(value: float) -> list[Any]:
        if not parts:
            return [torch.tensor(value), torch.full((6,), value, dtype=DOUBLE), [[value] * 6] * 2]
        row = torch.full((1, 6), value, dtype=DOUBLE)
        return [(value, value), [value, row], torch.full((2,), value, dtype=DOUBLE)]

    with torch.no_grad():
        expected = odeint(func, state, TIMES, method=method, rtol=rtol, atol=atol)
        rs = [torch.tensor(rtol, dtype=DOUBLE) if not parts else (rtol, rtol), *full(rtol)[1:]]
        for r, a in zip(rs, [atol, *full(atol)[1:]], strict=True):
            found = odeint(func, state, TIMES, method=method, rtol=r, atol=a)
            pairs = zip(found, expected, strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


def test_tolerances_of_parts_are_torchdiffeqs() -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint
    f, y0 = problem()
    y0 = y0.detach()
    other = torch.linspace(0, 1, 3, dtype=DOUBLE)

    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return f(t, y[0]), torch.sin(9 * t) * y[1]

    how: Any = {
        "rtol": (1e-4, torch.tensor([1e-7, 1e-6, 1e-5], dtype=DOUBLE)),
        "atol": (1e-5, 1e-8),
    }
    ours, expected = (solve(func, (y0, other), TIMES, **how) for solve in (odeint, theirs))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    one: Any = {"rtol": 1e-6, "atol": torch.logspace(-3, -8, 6, dtype=DOUBLE)}
    ours, expected = (solve(f, y0, TIMES, **one) for solve in (odeint, theirs))
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_a_part_that_nothing_is_asked_of_does_not_rule_the_steps() -> None:
    def func(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -y[0], torch.cos(60 * t) * 60 + 0 * y[1]

    y0 = torch.ones(1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    taken = {
        second: solve_adaptive(func, y0, ENDS, rtol=0.0, atol=(1e-6, second)).statistics.accepted
        for second in (1e-6, 1e6)
    }
    assert taken[1e6] < taken[1e-6] / 4


def test_tolerances_of_entries_within_a_budget() -> None:
    f, y0 = problem()
    atol = torch.logspace(-3, -6, y0.numel(), dtype=DOUBLE).reshape(y0.shape)

    inputs = [y0, *f.parameters()]

    def step(budget: int | str | None) -> list[Tensor | None]:
        y = odeint(f, y0, TIMES, rtol=1e-5, atol=atol, budget=budget, loss=loss_of)
        return gradients(y, inputs)

    plain, meter = step(None), default_meter(torch.device("cpu"))
    with pytest.raises(InfeasibleBudgetError) as caught:
        step(1)
    least = caught.value.least_budget_bytes
    assert least is not None
    for budget in (least, 2 * least):
        found, measured = meter.measure(lambda budget=budget: step(budget))
        assert measured.peak_bytes <= budget
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("tolerances", "message"),
    [
        ({"rtol": -1e-3}, r"rtol=-0\.001; give what is finite and not negative"),
        ({"atol": math.nan}, "atol=nan; give what is finite"),
        ({"rtol": math.inf}, "rtol=inf; give what is finite"),
        ({"rtol": "small"}, "rtol is 'small'; give a number, a tensor"),
        ({"atol": None}, "atol is None; give a number"),
        ({"atol": torch.tensor([1e-3, 1j])}, r"atol is a tensor of shape \(2,\); give a number"),
        ({"rtol": 0, "atol": 0.0}, r"rtol=0 and atol=0\.0 are both zero; give two"),
        ({"rtol": 0, "atol": torch.tensor([0.0, 1.0])}, "both zero somewhere"),
        ({"rtol": torch.ones(3)}, r"rtol has shape \(3,\), which does not broadcast to \(2,\)"),
        ({"atol": torch.tensor([1.0, -1.0])}, r"atol=a tensor of shape \(2,\); give .*negative"),
        ({"atol": torch.ones(2, requires_grad=True)}, "atol requires a gradient"),
        ({"y0": (torch.ones(2),) * 2, "rtol": (1e-3,) * 3}, "rtol has 3 parts, and the state 2"),
        ({"y0": (torch.ones(2),) * 2, "atol": (1e-3, -1)}, r"atol\[1\]=-1; give"),
        ({"y0": (torch.ones(2),) * 2, "atol": (1e-3, "x")}, r"atol\[1\] is 'x'"),
        ({"y0": (torch.ones(2),) * 2, "atol": (1, torch.ones(3))}, r"atol\[1\] has shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("solve", [odeint, solve_adaptive])
def test_tolerances_that_make_no_sense_are_refused(
    solve: Callable, tolerances: dict, message: str
) -> None:
    given = {"y0": torch.ones(2), **tolerances}
    with pytest.raises(WorkloadError, match=message):
        solve(decay, given.pop("y0"), ENDS, **given)


# ---------------------------------------------------------------------------- callbacks


class Told(nn.Module):
    """Notes what it is told on the way, of the forward pass and of the adjoint equation."""

    def __init__(self, *names: str, parts: int = 0, rate: float = 5.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.parts, self.rate = Field(6).double(), parts, rate
        self.told: list[tuple[str, float, float, Any]] = []
        for name in names:
            setattr(self, name, self.note(name))

    def note(self, name: str) -> Callable[[Tensor, Any, Tensor], None]:
        def callback(t: Tensor, y: Any, h: Tensor) -> None:
            first = y[0] if isinstance(y, tuple) else y
            self.told.append((name, float(t), float(h), first.detach().clone()))

        return callback

    def forward(self, t: Tensor, y: Any) -> Any:
        slope = self.f(self.rate * t, y[0] if self.parts else y)
        return (slope, *y[1:]) if self.parts else slope


CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def assert_told_alike(ours: Told, theirs: Told, *, first: bool = True) -> None:
    assert [row[0] for row in ours.told] == [row[0] for row in theirs.told]
    for one, other in zip(ours.told, theirs.told, strict=True):
        torch.testing.assert_close(one[1:3], other[1:3], rtol=1e-7, atol=1e-9)
        if first:  # theirs is the time's part, where it is the adjoint's
            torch.testing.assert_close(one[3], other[3], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("parts", [0, 2])
def test_callbacks_are_told_what_torchdiffeqs_are(method: str, backwards: bool, parts: int) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    _, y0 = problem()
    state: Any = (y0, y0[:1] / 9) if parts else y0
    t = TIMES.flip(0) if backwards else TIMES
    names = CALLBACKS if method not in FIXED else CALLBACKS[:1]
    options: Any = {"step_size": 0.25} if method in FIXED else {"first_step": 0.9}
    found = []
    for solve in (odeint, torchdiffeq.odeint):
        f = Told(*names, parts=parts)
        solve(f, state, t, method=method, rtol=1e-5, atol=1e-6, options=options)
        found.append(f)
    assert_told_alike(*found)
    count = {name: sum(row[0] == name for row in found[0].told) for name in CALLBACKS}
    assert count["callback_step"] > 1
    if method not in FIXED:
        assert count["callback_reject_step"] > 0
        assert sum(count.values()) == 2 * count["callback_step"]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_callbacks_of_the_adjoint_are_told_what_torchdiffeqs_are(method: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    _, y0 = problem()
    names = CALLBACKS[: 1 if method == "rk4" else 3]
    options: Any = {"step_size": 0.25} if method == "rk4" else {}
    how: Any = {"method": method, "rtol": 1e-5, "atol": 1e-6, "options": options}
    # Theirs integrates an adjoint of time, whose error is one more where func reads the time.
    ours, theirs = (Told(*(f"{name}_adjoint" for name in names), rate=0.0) for _ in range(2))
    loss_of(odeint(ours, y0, TIMES, gradient="backsolve", **how)).backward()
    loss_of(torchdiffeq.odeint_adjoint(theirs, y0, TIMES, **how)).backward()
    assert len(ours.told) > 3
    assert_told_alike(ours, theirs, first=False)


def test_callbacks_that_would_not_be_called_are_refused_or_warned_of() -> None:
    _, y0 = problem()
    for how in ({"method": "rk4"}, {"method": "dopri5"}):
        with pytest.raises(WorkloadError, match="callback_step, which a solve within a budget"):
            odeint(Told("callback_step"), y0, TIMES, budget="1MiB", **how)
        with pytest.raises(WorkloadError, match="callback_step_adjoint, and no adjoint equation"):
            odeint(Told("callback_step_adjoint"), y0, TIMES, **how)
    for bounds in ({"budget": "1MiB"}, {"checkpoints": 3}):
        with pytest.raises(WorkloadError, match="callback_accept_step, which a solve within"):
            solve_adaptive(Told("callback_accept_step"), y0, TIMES, **bounds)  # type: ignore[arg-type]
    with pytest.warns(CallbackWarning, match="callback_reject_step, which a fixed grid") as seen:
        odeint(Told("callback_reject_step"), y0, TIMES, method="rk4")
    assert seen[0].filename == __file__


# ---------------------------------------------------------------------------- the adjoint's


class Spy:
    """A norm of the adjoint's parts that notes their shapes."""

    def __init__(self) -> None:
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()

    def __call__(self, parts: tuple[Tensor, ...]) -> Tensor:
        self.shapes.add(tuple(tuple(x.shape) for x in parts))
        return torch.stack([x.square().mean().sqrt() for x in parts]).max()


ADJOINTS: dict[str, dict[str, Any]] = {
    "tolerances": {"adjoint_rtol": 1e-4, "adjoint_atol": 1e-5},
    "one tolerance": {"adjoint_atol": torch.tensor(1e-4)},
    "method": {
        "method": "rk4",
        "options": {"step_size": 0.2},
        "adjoint_method": "dopri5",
        "adjoint_options": {},
    },
    "grid": {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.07}},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "norm": {"adjoint_options": {"norm": Spy()}},
    "no options": {"options": {"first_step": 0.01}, "adjoint_options": {}},
    "options": {"adjoint_options": {"first_step": 0.2, "max_num_steps": 900}},
    "the state's norm": {"options": {"norm": lambda y: y.abs().max()}},
}


@pytest.mark.parametrize("case", ADJOINTS)
def test_arguments_of_the_adjoint_are_torchdiffeqs(case: str) -> None:
    theirs = pytest.importorskip("torchdiffeq").odeint_adjoint
    _, y0 = problem()
    f = Told(rate=0.0)  # as above, it does not read the time
    inputs = [y0, *f.parameters()]
    how: Any = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-7, **ADJOINTS[case]}
    found = [
        gradients(y, inputs)
        for y in (odeint(f, y0, TIMES, gradient="backsolve", **how), theirs(f, y0, TIMES, **how))
    ]
    # The errors of both are those of the same steps, far above what they differ by.
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_each_argument_of_the_adjoint_changes_its_solve() -> None:
    """None of them is read and left out: the figures of all are different."""
    f, y0 = problem()

    def figure(case: dict[str, Any]) -> float:
        how = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-4, **case}
        (found,) = gradients(odeint(f, y0, TIMES, gradient="backsolve", **how), [y0])
        assert found is not None
        return float(found.sum())

    cases = [
        {},
        {"adjoint_rtol": 1e-7, "adjoint_atol": 1e-7},
        {"adjoint_method": "bosh3"},
        {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.3}},
        {"adjoint_options": {"norm": "seminorm"}},
        {"adjoint_options": {"first_step": 0.21}},
    ]
    assert len({figure(case) for case in cases}) == len(cases)


@pytest.mark.parametrize("parts", [False, True])
def test_a_norm_of_the_adjoint_gets_time_states_adjoints_and_integrals(parts: bool) -> None:
    weight = torch.ones(7, dtype=DOUBLE, requires_grad=True)
    one = torch.ones((), dtype=DOUBLE)
    y0: Any = (one, torch.ones(2, 2, dtype=DOUBLE)) if parts else one
    spy = Spy()
    y = odeint(
        lambda t, y: tuple(weight.sum() * part for part in y) if parts else weight.sum() * y,
        y0, ENDS, gradient="backsolve", adjoint_params=(weight,), rtol=1e-3, atol=1e-3,
        adjoint_options={"norm": spy},
    )  # fmt: skip
    loss_of(y).backward()
    states = ((), (2, 2)) if parts else ((),)
    assert spy.shapes == {((), *states, *states, (7,))}


def test_adjoint_params_are_params() -> None:
    f, y0 = problem()
    weight = f.up.weight
    by_name = [
        gradients(odeint(f, y0, TIMES, method="rk4", **how), [y0, *f.parameters()])
        for how in (
            {"params": [weight], "gradient": "backsolve"},
            {"adjoint_params": iter([weight]), "gradient": "backsolve"},
        )
    ]
    assert equal(*by_name)
    assert [g is None for g in by_name[0]] == [False, False, True, True, True]


def step(f: Any, t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return y + h * f(t, y)  # type: ignore[no-any-return]


BACK: dict[str, Any] = {"gradient": "backsolve"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adjoint_rtol": 1e-3}, "adjoint_rtol given, and gradient='exact' differentiates"),
        ({"adjoint_method": "rk4", "adjoint_options": {}}, "adjoint_method, adjoint_options given"),
        (
            {**BACK, "adjoint_rtol": -1.0},
            r"adjoint_rtol is -1\.0, .* one number; give adjoint_rtol",
        ),
        ({**BACK, "adjoint_atol": "x"}, "adjoint_atol is 'x', "),
        ({**BACK, "adjoint_atol": (1e-3, 1e-3)}, r"adjoint_atol is \(0\.001, 0\.001\), "),
        ({**BACK, "rtol": torch.ones(2)}, r"rtol is a tensor of shape \(2,\), .*give adjoint_rtol"),
        ({**BACK, "adjoint_method": "rk5"}, "unknown method 'rk5'"),
        ({**BACK, "adjoint_options": {"step": 1}}, r"unknown options \['step'\] for an adaptive"),
        ({**BACK, "adjoint_options": 3}, "adjoint_options is 3; give a dict"),
        (
            {**BACK, "adjoint_options": {"norm": "max"}},
            "norm='max'; give 'seminorm', or a function",
        ),
        ({**BACK, "adjoint_method": "rk4", "adjoint_options": {"first_step": 1}}, "'first_step'"),
        (
            {**BACK, "adjoint_method": "rk4", "options": {"first_step": 1}},
            r"options \['first_step'\] are those of the forward pass.*give adjoint_options",
        ),
        (
            {**BACK, "adjoint_method": "rk4", "adjoint_rtol": 1e-3},
            "adjoint_rtol given, and the adjoint equation is solved by 'rk4' on a fixed grid",
        ),
        ({**BACK, "method": step}, "step function given as method was not meant for"),
        (
            {**BACK, "method": "leapfrog", "y0": (torch.ones(2), torch.ones(2)), "func": Pair()},
            "the adjoint equation is none for 'leapfrog'",
        ),
        ({**BACK, "adjoint_options": {"grid_constructor": 3}}, "grid_constructor is 3; give a fun"),
        ({**BACK, "adjoint_options": {"step_size": -1}}, "step_size is -1; give a positive number"),
        ({**BACK, "adjoint_method": "leapfrog"}, "the adjoint equation is none for 'leapfrog'"),
        ({"adjoint_params": 3}, "adjoint_params is 3; give a tuple of tensors"),
        ({**BACK, "adjoint_params": torch.ones(2)}, "adjoint_params is one tensor; give a tuple"),
        ({**BACK, "params": [torch.ones(2), "w"]}, r"params\[1\] is a str; give a tuple"),
        ({"params": (), "adjoint_params": ()}, "two names of one"),
        ({"params": torch.tensor(1.0)}, "params is one tensor; give a tuple"),
        ({**BACK, "adjoint_rtol": torch.tensor(1j)}, "adjoint_rtol is tensor"),
        (
            {**BACK, "adjoint_rtol": torch.tensor(1e-3, requires_grad=True)},
            "adjoint_rtol is tensor.*without a gradient",
        ),
    ],
)
def test_arguments_of_the_adjoint_are_refused_before_the_solve(
    arguments: dict, message: str
) -> None:
    """In the forward pass, where they were given; not when gradients are asked for."""
    given: dict[str, Any] = {"func": decay, "y0": torch.ones(2, requires_grad=True), **arguments}
    with pytest.raises(WorkloadError, match=message):
        odeint(given.pop("func"), given.pop("y0"), ENDS, **given)


def test_a_step_function_for_the_tuple_of_the_adjoint() -> None:
    f, y0 = problem()

    def euler(f: Any, t: Tensor, h: Tensor, y: Any) -> Any:
        return tuple(a + h * b for a, b in zip(y, f(t, y), strict=True))

    how: Any = {"options": {"step_size": 0.1}, "gradient": "backsolve"}
    own: Any = {"method": step, "adjoint_method": euler, "adjoint_options": {"step_size": 0.1}}
    inputs = [y0, *f.parameters()]
    one = gradients(odeint(f, y0, TIMES, **how, **own), inputs)
    other = gradients(odeint(f, y0, TIMES, method="euler", **how), inputs)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------- events


def test_events_are_refused_and_what_to_do_instead_has_the_gradient() -> None:
    """y' = -rate: y is 1 at time (y0 - 1) / rate, whichever way the gradient goes there."""
    rate = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    y0 = torch.tensor(3.0, dtype=DOUBLE, requires_grad=True)

    def fall(t: Tensor, y: Tensor) -> Tensor:
        return -rate + 0 * y

    with pytest.raises(WorkloadError, match=r"looks for no events.*torch\.stack\(\[t0, t_event\]"):
        odeint(fall, y0, ENDS, event_fn=lambda t, y: y - 1)
    for how in ({"method": "rk4"}, {"method": "dopri5"}):
        t = torch.stack([torch.zeros((), dtype=DOUBLE), (y0 - 1) / rate])
        end = odeint(fall, y0, t, **how)[-1]
        found = torch.autograd.grad(end, [y0, rate])
        # At the event y is 1, whatever y0 and the rate are.
        torch.testing.assert_close(found, (torch.zeros_like(y0),) * 2, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------- times


@given(
    exponent=st.integers(4, 20),
    method=st.sampled_from(["euler", "rk4"]),
    sign=st.sampled_from([1, -1]),
)
def test_times_too_coarse_for_the_steps_are_refused_with_their_resolution(
    exponent: int, method: str, sign: int
) -> None:
    """Between 2^e and 2^(e + 1) numbers of 24 bits are 2^(e - 23) apart."""
    start, spacing = 2.0**exponent, 2.0 ** (exponent - 23)
    t = torch.tensor([start, start + 64 * spacing]) * sign
    # Of steps of whole spacings each comes to another time; of quarters some come to the same.
    odeint(decay, torch.ones(1), t, method=method, options={"step_size": 4 * spacing})
    told = rf"Times of torch\.float32 near .* are {spacing:.3g} apart: .* torch\.float64"
    with pytest.raises(WorkloadError, match=told.replace("+", r"\+")):
        odeint(decay, torch.ones(1), t, method=method, options={"step_size": spacing / 4})
    found = odeint(decay, torch.ones(1), t.double(), method=method, options={"step_size": spacing})
    assert found.shape == (2, 1)


def test_times_that_one_dtype_cannot_tell_apart() -> None:
    t = torch.tensor([1000.0, 1000.00001])
    with pytest.raises(WorkloadError, match=r"near 1000 are 6\.1e-05 apart"):
        odeint(decay, torch.ones(1), t)
    with pytest.raises(IntegrationError, match=r"near 1000 are 6\.1e-05 apart"):
        solve_adaptive(decay, torch.ones(1), t)
    with pytest.raises(WorkloadError) as caught:  # which no dtype mends
        odeint(decay, torch.ones(1), torch.tensor([0.0, 1.0, 0.5]))
    assert "apart" not in str(caught.value)


# ---------------------------------------------------------------------------- unused modules


class WithUnused(nn.Module):
    """What is registered, and read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(3, 3).double(), nn.Linear(2, 5).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.used(y))


@pytest.mark.parametrize("method", ["rk4", "dopri5", "implicit_euler"])
def test_unused_modules_have_the_gradients_that_torchdiffeq_gives_them(method: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    y0 = torch.linspace(-1, 1, 6, dtype=DOUBLE).reshape(2, 3)

    def unused(solve: Callable, **how: Any) -> list[Tensor | None]:
        f = WithUnused()
        loss_of(solve(f, y0, TIMES, method=method, **how)).backward()
        assert f.used.weight.grad is not None
        return [p.grad for p in f.unused.parameters()]

    theirs = "rk4" if method == "implicit_euler" else method  # whose Newton takes its own Jacobian
    exact, adjoint = ([None, None], [torch.zeros_like(p) for p in WithUnused().unused.parameters()])
    for how in ({}, {"budget": "1MiB"}):
        assert unused(odeint, **how) == exact
    assert equal(unused(odeint, gradient="backsolve"), adjoint)
    method = theirs
    assert unused(torchdiffeq.odeint) == exact
    assert equal(unused(torchdiffeq.odeint_adjoint), adjoint)


# ---------------------------------------------------------------------------- options


@given(
    name=st.text(min_size=1).filter(str.isidentifier) | st.integers() | st.none(),
    method=st.sampled_from([*ADAPTIVE, *FIXED, "dopri8", "trapezoid"]),
    budget=st.sampled_from([None, "1MiB"]),
)
def test_any_unknown_option_is_refused_with_those_that_there_are(
    name: Any, method: str, budget: str | None
) -> None:
    adaptive = method in (*ADAPTIVE, "dopri8")
    with pytest.raises(WorkloadError) as caught:
        odeint(decay, torch.ones(2), ENDS, method=method, options={name: 1}, budget=budget)
    told = str(caught.value)
    assert f"unknown options [{str(name)!r}] for " in told
    for known in ("step_size", "grid_constructor", *(("first_step", "norm") if adaptive else ())):
        assert known in told


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dopri5", {"step_t": ENDS}, "step_t: put its times into t and set meet_times=True"),
        ("dopri5", {"jump_t": ENDS}, "jump_t: solve from jump to jump"),
        ("dopri5", {"dtype": torch.float32}, "dtype: times of adaptive steps are kept in float64"),
        ("dopri5", {"interp": "cubic"}, "interp: .*a polynomial of their own"),
        ("rk4", {"perturb": True}, r"found options \{'perturb': True\}"),
        ("rk4", {"interp": "cubic", "step_size": 0.1}, r"found options \{'interp': 'cubic'\}"),
        ("rk4", {"max_iters": 4}, "max_iters: implicit steps are solved"),
        ("rk4", {"step_size": "small"}, "step_size is 'small'; give a positive number"),
        ("rk4", {"grid_constructor": 3}, "option grid_constructor is 3; give a function"),
        ("dopri5", {"first_step": "small"}, "option first_step is 'small'; give a number"),
        ("dopri5", {"first_step": torch.ones(2)}, "option first_step is .*; give a number"),
        ("dopri5", {"max_num_steps": math.inf}, "option max_num_steps is inf; give a number"),
        ("dopri5", {"safety": 2}, "safety=2"),
        ("dopri5", {"norm": "max"}, "option norm is 'max'; give a function"),
        ("dopri5", {"norm": lambda e: e}, r"norm of errors returned shape \(2,\)"),
        ("dopri5", {"norm": lambda e: None}, "norm of errors returned NoneType"),
        ("dopri5", 3, "options is 3; give a dict"),
        ("dopri5", ["first_step"], r"options is \['first_step'\]; give a dict"),
    ],
)
def test_options_that_make_no_sense_are_refused(method: str, options: Any, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        odeint(decay, torch.ones(2), ENDS, method=method, options=options)


def test_options_are_tensors_or_numbers_and_stay_the_callers() -> None:
    f, y0 = problem()
    for method, number, tensor in (
        ("dopri5", {"first_step": 0.01}, {"first_step": torch.tensor(0.01, dtype=DOUBLE)}),
        ("rk4", {"step_size": 0.125}, {"step_size": torch.tensor(0.125)}),
        ("dopri5", {"dtype": DOUBLE, "step_size": None}, {}),
    ):
        before = dict(tensor)
        one, other = (
            odeint(f, y0, TIMES, method=method, options=given)  # type: ignore[arg-type]
            for given in (number, tensor)
        )
        assert torch.equal(one, other)
        assert tensor.keys() == before.keys()


# ---------------------------------------------------------------------------- anything

ODD: list[Any] = [
    None, -1, 0, 1e-3, math.nan, math.inf, 1j, "x", b"x", (), [], [1, 2], (1e-3,) * 3, object(),
    int, len, torch.ones(2), torch.ones(3), torch.tensor(1e-3), torch.tensor(1j),
    torch.ones(2, requires_grad=True), {"a": 1}, {1: 2}, {"norm": "seminorm"}, {"step_size": -1},
    {"step_size": torch.ones(2)}, {"first_step": 1j}, {"max_num_steps": None}, {"beta": None},
    {"norm": lambda errors: "large"}, {"dtype": "x"}, {"grid_constructor": 3},
]  # fmt: skip
ARGUMENTS = (
    *("rtol", "atol", "method", "options", "event_fn", "params", "gradient", "granularity"),
    *(f"adjoint_{name}" for name in ("rtol", "atol", "method", "options", "params")),
    *("budget", "loss", "solver"),
)


@settings(deadline=None)
@given(
    odd=st.dictionaries(st.sampled_from(ARGUMENTS), st.sampled_from(ODD), min_size=1, max_size=2),
    method=st.sampled_from(["dopri5", "rk4", "implicit_euler"]),
    bounded=st.sampled_from([{}, {}, {"budget": "1MiB"}, {"gradient": "backsolve"}]),
    parts=st.booleans(),
)
def test_whatever_is_given_works_or_is_refused_by_name(
    odd: dict[str, Any], method: str, bounded: dict[str, Any], parts: bool
) -> None:
    y0 = torch.ones(2, requires_grad=True)
    # Functions as methods, norms and losses are the user's, and so is what they raise.
    ours = {"method", "loss"}
    odd = {k: v for k, v in odd.items() if not (k in ours and callable(v))}
    arguments = {"method": method, **bounded, **odd}
    try:
        found = odeint(decay, (y0, torch.ones(3)) if parts else y0, ENDS.float(), **arguments)
        loss_of(found).backward()
    except CkptschedError:
        return
    assert y0.grad is not None
