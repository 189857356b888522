"""Models that carry tensors from call to call, as recurrent networks do, are fitted in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs


class _Tail(nn.Module):
    """What is worth planning, after what carries a state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def _rest(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return h


class InAttribute(_Tail):
    h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, torch.zeros_like(x) if self.h is None else self.h)
        self.h = h.detach()
        return self._rest(h)


class InTuple(_Tail):
    def __init__(self) -> None:
        super().__init__()
        self.memory: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, self.memory[0] if self.memory else torch.zeros_like(x))
        self.memory = (h.detach(), x)
        return self._rest(h)


class InDict(_Tail):
    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, self.memory.get("h"))
        self.memory = {"h": h.detach()}
        return self._rest(h)


class InBuffer(_Tail):
    h: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("h", torch.zeros(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, self.h)
        self.h = h.detach()
        return self._rest(h)


class Undetached(_Tail):
    """One that goes back through two calls."""

    h: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, torch.zeros_like(x) if self.h is None else self.h)
        self.h = h
        return self._rest(h)


def _state(model: nn.Module) -> list[Tensor]:
    h = getattr(model, "h", None)
    memory = getattr(model, "memory", ())
    held = [h] if isinstance(h, Tensor) else list(getattr(memory, "values", lambda: memory)())
    return [tensor.detach() for tensor in held]


def _same(a: nn.Module, b: nn.Module) -> bool:
    gradients = zip(a.parameters(), b.parameters(), strict=True)
    states = zip(_state(a), _state(b), strict=True)
    return all(
        torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
        for p, q in gradients
    ) and all(torch.equal(s, t) for s, t in states)


@pytest.mark.parametrize("kind", [InAttribute, InTuple, InDict, InBuffer])
@pytest.mark.parametrize("begun", [False, True])
def test_each_step_begins_with_what_the_last_has_left(
    kind: Callable[[], nn.Module], begun: bool
) -> None:
    plain = kind()
    if begun:
        plain(torch.randn(64, 8))
    model = copy.deepcopy(plain)
    before = [t.clone() for t in _state(model)]
    cs.fit(model, torch.randn(64, 8), budget="100%")
    budget = cs.plan_of(model).least_budget_bytes
    cs.fit(model, torch.randn(64, 8), budget=budget)
    assert all(map(torch.equal, _state(model), before))
    assert cs.plan_of(model).forwards > len(cs.plan_of(model).chain)
    for _ in range(3):
        x = torch.randn(64, 8)
        for m in (plain, model):
            m(x).square().sum().backward()
        assert _same(model, plain)


def test_a_state_that_is_taken_away_is_begun_anew() -> None:
    plain = InAttribute()
    model = cs.fit(copy.deepcopy(plain), torch.randn(64, 8), budget="90%")
    for step in range(5):
        if step == 3:
            model.h = plain.h = None
        x = torch.randn(64 if step < 3 else 32, 8)
        for m in (plain, model):
            m(x).square().sum().backward()
        assert _same(model, plain)


def test_gradients_go_back_through_what_is_carried() -> None:
    plain = Undetached()
    model = cs.fit(copy.deepcopy(plain), torch.randn(64, 8), budget="90%")
    x = torch.randn(64, 8)
    plain(x)
    plain(x).square().sum().backward()
    model(x)
    with pytest.warns(cs.BudgetWarning, match="is still to come"):
        found = model(x)
    found.square().sum().backward()
    # The tail of the first call is not gone back through, that of the second is.
    assert all(
        torch.allclose(p.grad, q.grad, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
        for p, q in zip(plain.parameters(), model.parameters(), strict=True)
    )
