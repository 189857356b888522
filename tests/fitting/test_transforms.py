"""Fitted models under transforms of torch, which no plan can follow: plain autograd, and said."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import ckptsched as cs

# torch.func imports torch.jit, which is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _loss(parameters: dict[str, Tensor], model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = functional_call(model, parameters, (x,))
    return found.square().mean()


def _per_sample(model: nn.Module, x: Tensor) -> list[Tensor]:
    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return _loss(parameters, model, row[None])

    found = vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)
    return [*found.values()]


def _of_functions(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [*grad(_loss)(dict(model.named_parameters()), model, x).values()]


def _ensemble(model: nn.Module, x: Tensor) -> list[Tensor]:
    parameters, buffers = stack_module_state([model, copy.deepcopy(model)])
    base = copy.deepcopy(model).to("meta")
    call = vmap(lambda p, b: functional_call(base, (p, b), (x,)))
    return [call(parameters, buffers)]


def _dual(model: nn.Module, x: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        given = forward_ad.make_dual(x[:3], torch.ones_like(x[:3]))
        return [*forward_ad.unpack_dual(model(given))]


WAYS: dict[str, Callable[[nn.Module, Tensor], list[Tensor]]] = {
    "grad": _of_functions,
    "vmap of grad": _per_sample,
    "vmap": lambda model, x: [vmap(model)(x[:, None])],
    "jacrev": lambda model, x: [jacrev(model)(x[:2])],
    "jvp": lambda model, x: [*jvp(model, (x[:2],), (x[:2],))],
    "ensemble": _ensemble,
    "forward mode": _dual,
}


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_transform_is_plain_and_said(way: str, seen: bool) -> None:
    """Whether or not a plan is for calls of that kind."""
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(16, 8)
    wanted = WAYS[way](copy.deepcopy(model), x)
    cs.fit(model, x if seen else x[:1], budget="100%")
    with pytest.warns(cs.BudgetWarning, match="which a plan cannot follow") as said:
        found = WAYS[way](model, x)
    assert all(w.filename == __file__ or "torch" in w.filename for w in said)
    assert all(map(torch.equal, found, wanted))
    assert len(found) == len(wanted)
