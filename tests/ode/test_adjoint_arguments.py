"""The arguments `adjoint_*` of torchdiffeq: they work, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ckptsched import odeint
from ckptsched.base.errors import (
    WorkloadError,
)
from tests.ode.problems import (
    DOUBLE,
    ENDS,
    TIMES,
    Pair,
    Told,
    decay,
    equal,
    gradients,
    loss_of,
    problem,
)


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
