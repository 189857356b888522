"""Fitted models in `torch.export`, and within `torch.utils.checkpoint` on a call of a new kind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckptsched as cs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = self.drop(torch.tanh(layer(x))) * scale + x
        return x


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))  # type: ignore[no-any-return]


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    y.square().sum().backward()  # type: ignore[no-untyped-call]
    return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]


def fitted() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 8)
    return cs.fit(model, x, budget="85%"), x


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_an_export_in_eval_mode_gives_what_the_model_gives(strict: bool, nested: bool) -> None:
    if strict and not nested and torch.__version__ < "2.10":
        pytest.skip("asks in which file a forward is written, and takes functions alone")
    inner, x = fitted()
    model = (Around(inner) if nested else inner).eval()
    program = torch.export.export(model, (x,), strict=strict)
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))
    inner.train()
    assert cs.plan_of(inner).overhead > 0
    inner(x).sum().backward()


def test_an_export_in_training_mode_says_that_no_plan_is_followed() -> None:
    model, x = fitted()
    with pytest.warns(cs.BudgetWarning, match="exported in training mode"):
        program = torch.export.export(model, (x,), strict=False)
    found = []
    for trained in (cs.unfit(copy.deepcopy(model)), program.module()):
        torch.manual_seed(1)
        found.append(gradients(trained(x.requires_grad_()), [x]))
    torch.testing.assert_close(*found)


# With reentrant checkpoints the model is called inside the backward, where more may be taken.
@pytest.mark.filterwarnings("ignore:a model that follows a plan is called inside a backward")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_call_of_a_new_kind_within_a_checkpoint_of_torch(use_reentrant: bool) -> None:
    model, _ = fitted()
    plain = cs.unfit(copy.deepcopy(model))
    x, found = torch.randn(96, 8, requires_grad=True), []
    for trained in (plain, model):
        torch.manual_seed(1)
        y = checkpoint(trained, x, use_reentrant=use_reentrant)
        found.append(gradients(y, [x, *trained.parameters()]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
