"""States that are tuples: parts of any shape, also without dimensions and without elements."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptsched import odeint, solve_adaptive
from ckptsched.base.errors import WorkloadError
from ckptsched.ode.adaptive.norms import batch_max_norm, rms_norm

torchdiffeq = pytest.importorskip("torchdiffeq")

DOUBLE = torch.float64
TIMES = torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)
STATES: dict[str, list[tuple[int, ...]]] = {
    "without dimensions": [(), ()],
    "one without dimensions": [(2, 3), (), (4,)],
    "one part": [(3,)],
    "one part without dimensions": [()],
    "one without elements": [(3,), (0,)],
    "first without elements": [(0, 4), (3,), ()],
}


def state(shapes: list[tuple[int, ...]], *, grad: bool = True) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=DOUBLE, requires_grad=grad) for shape in shapes)


def solved(solve: Any, y0: tuple[Tensor, ...], **given: Any) -> list[Tensor]:
    """States and gradients."""
    weight = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)

    def decay(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.sin(part) * weight + t for part in y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchdiffeq's
        found = solve(decay, y0, TIMES, **given)
    loss = torch.stack([part.square().sum() for part in found]).sum()
    gradients = torch.autograd.grad(loss, [*y0, weight], allow_unused=True)
    return [*found, *(torch.zeros(()) if g is None else g for g in gradients)]


@pytest.mark.parametrize("budget", [None, 10**6])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("kind", STATES)
def test_parts_of_any_shape_are_torchdiffeqs(kind: str, method: str, budget: int | None) -> None:
    y0 = state(STATES[kind])
    given: dict[str, Any] = {"method": method}
    if method == "dopri5":
        given |= {"rtol": 1e-8, "atol": 1e-9}
        if any(part.numel() == 0 for part in y0):  # torchdiffeq's own norm of nothing is NaN
            given |= {"options": {"norm": lambda y: torch.stack([rms_norm(p) for p in y]).max()}}
    expected = solved(torchdiffeq.odeint, y0, **given)
    given.pop("options", None)
    found = solved(odeint, y0, **given, budget=budget)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("budget", [None, 10**6])
@pytest.mark.parametrize("method", ["rk4", "implicit_euler", "dopri5"])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_is_solved_as_nothing(
    shape: tuple[int, ...], method: str, budget: int | None
) -> None:
    (part,) = state([shape])
    for y0 in (part, (part,), (part, part)):
        found = odeint(lambda t, y: y, y0, TIMES, method=method, budget=budget)
        for one in found if isinstance(y0, tuple) else (found,):
            assert one.shape == (3, *shape)
            (gradient,) = torch.autograd.grad(one.sum(), part, retain_graph=True)
            assert gradient.shape == shape


@pytest.mark.parametrize("norm", [rms_norm, batch_max_norm])
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_the_norm_of_nothing_is_zero(norm: Any, shape: tuple[int, ...]) -> None:
    assert float(norm(torch.zeros(shape, dtype=torch.complex64))) == 0.0
    assert norm(torch.zeros(shape, dtype=torch.complex64)).dtype == torch.float32
    assert solve_adaptive(lambda t, y: y, torch.zeros(shape), TIMES, norm=norm).states.numel() == 0


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize(
    ("y0", "words"),
    [
        ((torch.ones(3), torch.ones(2, dtype=torch.int64)), r"y0\[1\] is torch.int64"),
        ((torch.ones(3), torch.tensor(True)), r"y0\[1\] is torch.bool"),
        ((torch.ones(3), (torch.ones(2),)), r"y0\[1\] is a tuple"),
        ((torch.ones(3), 1.0), r"y0\[1\] is a float"),
        ((torch.ones(3), None), r"y0\[1\] is a NoneType"),
        ([torch.ones(3)], "y0 is a list"),
        ((), "tuple without tensors"),
        ((torch.ones(3), torch.ones(2).double()), r"y0\[1\] torch.float64 on cpu"),
        ((torch.ones(3), torch.ones(2) * 1j), r"y0\[1\] torch.complex64 on cpu"),
    ],
)
def test_parts_that_do_not_go_together_are_named(y0: Any, words: str, method: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        odeint(lambda t, y: y, y0, TIMES, method=method)
