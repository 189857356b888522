"""`odeint` under torch.func, forward-mode differentiation and batched gradients.

It gives what the transform gives of the same steps, written out, or refuses by name.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from ckptsched import odeint, solve_adaptive
from ckptsched.base.errors import BudgetWarning, CkptschedError, ExecutionError, WorkloadError

# torch's own forward-mode rules are made by it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

DOUBLE = torch.float64


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(2 * t)


torch.manual_seed(0)
F = Field()
Y0 = torch.randn(3, dtype=DOUBLE)
ROWS = torch.randn(2, 3, dtype=DOUBLE)
T = torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE)
TANGENT = torch.tensor([0.3, -1.0, 0.7], dtype=DOUBLE)


def solve(method: str, budget: Any) -> Callable[..., Tensor]:
    def run(y: Tensor, t: Tensor = T, f: Callable[..., Any] = F) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            found: Tensor = odeint(f, y, t, method=method, rtol=1e-9, atol=1e-11, budget=budget)
        return found

    return run


def of_parameters(run: Callable[..., Tensor]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda params, y: run(
        y, f=lambda t, z: functional_call(F, params, (t, z))
    )[-1].square().sum()  # fmt: skip


def dual(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, TANGENT) for x in inputs]
        return forward_ad.unpack_dual(run(*duals)).tangent


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


PARAMETERS = {name: p.detach() for name, p in F.named_parameters()}
FUNCTIONS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "grad": lambda run: grad(lambda y: run(y)[-1].square().sum())(Y0),
    "grad of an output inside": lambda run: grad(lambda y: run(y)[1].square().sum())(Y0),
    "jacrev": lambda run: jacrev(run)(Y0),
    "jacfwd": lambda run: jacfwd(run)(Y0),
    "vjp": lambda run: vjp(run, Y0)[1](torch.ones(3, 3, dtype=DOUBLE))[0],
    "jvp": lambda run: jvp(run, (Y0,), (TANGENT,))[1],
    "jvp without gradients": lambda run: torch.no_grad()(lambda: jvp(run, (Y0,), (TANGENT,))[1])(),
    "hessian": lambda run: hessian(lambda y: run(y)[-1].square().sum())(Y0),
    "grad of parameters": lambda run: flat(grad(of_parameters(run))(PARAMETERS, Y0)),
    "grad of times": lambda run: grad(lambda t: run(Y0, t).square().sum())(T),
    "jvp of times": lambda run: jvp(lambda t: run(Y0, t), (T,), (TANGENT,))[1],
    "jvp of times without gradients": lambda run: torch.no_grad()(
        lambda: jvp(lambda t: run(Y0, t), (T,), (TANGENT,))[1]
    )(),
    "jacfwd of times": lambda run: jacfwd(lambda t: run(Y0, t))(T),
    "hessian of times": lambda run: hessian(lambda t: run(Y0, t).square().sum())(T),
    "grad of a closure": lambda run: grad(
        lambda c: run(Y0, f=lambda t, z: c * F(t, z)).square().sum()
    )(torch.tensor(1.3, dtype=DOUBLE)),
    "dual": lambda run: dual(run, Y0),
    "dual of both": lambda run: dual(run, Y0, T),
    "dual without gradients": lambda run: torch.no_grad()(lambda: dual(run, Y0, T))(),
    "vmap inside": lambda run: vmap(lambda c: c * run(Y0))(torch.ones(2, dtype=DOUBLE)),
}  # fmt: skip
MAPPED: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "vmap": lambda run: vmap(run)(ROWS),
    "vmap of grad": lambda run: vmap(grad(lambda y: run(y)[-1].square().sum()))(ROWS),
    "each sample's parameters": lambda run: flat(
        vmap(grad(of_parameters(run)), (None, 0))(PARAMETERS, ROWS)
    ),
    "vmap of a closure": lambda run: vmap(lambda c: run(Y0, f=lambda t, z: c * F(t, z)))(
        torch.tensor([1.0, 2.0], dtype=DOUBLE)
    ),
}


def exact(y: Tensor, t: Tensor = T, f: Callable[..., Any] = F, substeps: int = 0) -> Tensor:
    """RK4, the 3/8 rule, from each time to the next, in so many steps; 0 for one as odeint does."""
    states = [y]
    for a, b in itertools.pairwise(t):
        n = max(1, substeps)
        for k in range(n):
            h, at = (b - a) / n, a + (b - a) * (k / n)
            k1 = f(at, y)
            k2 = f(at + h / 3, y + h * k1 / 3)
            k3 = f(at + 2 * h / 3, y + h * (k2 - k1 / 3))
            k4 = f(at + h, y + h * (k1 - k2 + k3))
            y = y + h * (k1 + 3 * (k2 + k3) + k4) / 8
        states.append(y)
    return torch.stack(states)


@pytest.mark.parametrize("budget", [None, "1MiB"])
@pytest.mark.parametrize("name", [*FUNCTIONS, *MAPPED])
def test_on_a_grid_a_transform_gives_what_it_gives_of_the_steps(name: str, budget: Any) -> None:
    function = {**FUNCTIONS, **MAPPED}[name]
    expected = function(exact)
    assert bool(expected.abs().max() > 0)
    torch.testing.assert_close(function(solve("rk4", budget)), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("budget", [None, 40_000])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_through_adaptive_steps_a_transform_gives_the_solutions_derivative(
    name: str, budget: Any
) -> None:
    expected = FUNCTIONS[name](lambda y, t=T, f=F: exact(y, t, f, substeps=40))
    found = FUNCTIONS[name](solve("dopri5", budget))
    # Second derivatives in time are those of the polynomial inside a step.
    loose = 1e-3 if name == "hessian of times" else 1e-5
    torch.testing.assert_close(found, expected, rtol=loose, atol=loose)


@pytest.mark.parametrize("budget", [None, 40_000])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_over_what_chooses_adaptive_steps_is_refused(name: str, budget: Any) -> None:
    with pytest.raises(WorkloadError, match=r"torch\.func\.vmap .* put the batch into y0"):
        MAPPED[name](solve("dopri5", budget))


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_vmap_over_times_is_refused(method: str) -> None:
    with pytest.raises(WorkloadError, match=r"torch\.func\.vmap .* times"):
        vmap(lambda t: solve(method, None)(Y0, t))(torch.stack([T, 2 * T]))


@pytest.mark.parametrize("budget", [None, "1MiB"])
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap", "dual"])
def test_implicit_steps_and_backsolve_refuse_transforms(name: str, budget: Any) -> None:
    function = {**FUNCTIONS, **MAPPED}[name]
    with pytest.raises(WorkloadError, match="implicit steps nor gradient='backsolve'"):
        function(solve("implicit_euler", budget))
    with pytest.raises(WorkloadError, match="implicit steps nor gradient='backsolve'"):
        function(lambda y: odeint(F, y, T, method="rk4", gradient="backsolve"))


@pytest.mark.parametrize("method", ["rk4", "implicit_euler"])
def test_several_gradients_at_once_are_refused_where_steps_run_again(method: str) -> None:
    y0 = Y0.clone().requires_grad_()
    last = solve(method, "1MiB")(y0)[-1]
    with pytest.raises(ExecutionError, match="several gradients are asked for at once"):
        torch.autograd.grad(last, y0, torch.eye(3, dtype=DOUBLE), is_grads_batched=True)
    with pytest.raises(CkptschedError, match="several gradients are asked for at once"):
        torch.autograd.functional.jacobian(solve(method, "1MiB"), Y0, vectorize=True)


@pytest.mark.parametrize("checkpoints", [None, 2])
def test_several_gradients_at_once_through_adaptive_steps(checkpoints: int | None) -> None:
    y0, t = Y0.clone().requires_grad_(), T.clone().requires_grad_()
    several = torch.eye(3, dtype=DOUBLE)

    def last(times: Tensor) -> Tensor:
        states = solve_adaptive(F, y0, times, rtol=1e-6, checkpoints=checkpoints).states
        found: Tensor = states[-1]
        return found

    (found,) = torch.autograd.grad(last(T), y0, several, is_grads_batched=True)
    rows = [torch.autograd.grad(last(T), y0, row)[0] for row in several]
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-12, atol=1e-13)
    if checkpoints is not None:
        with pytest.raises(ExecutionError, match="several gradients are asked for at once"):
            torch.autograd.grad(last(t), [y0, t], several, is_grads_batched=True)
