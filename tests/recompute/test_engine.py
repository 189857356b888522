"""The short way into the engine gives what the public way gives, and is left where it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Variable

from ckptsched.recompute.engine import choose, directly, edge_of, go_back, publicly


def gradients(way: Any) -> list[Tensor | None]:
    """Of a graph with two roots and a leaf that is used twice."""
    torch.manual_seed(0)
    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    y = torch.tanh(x @ w) @ w
    way((edge_of(y), y.sin().sum()), (torch.ones(2, 3), torch.tensor(2.0)))
    return [w.grad, x.grad]


@pytest.mark.parametrize("way", [go_back, choose(getattr(Variable, "_execution_engine", None))])
def test_both_ways_give_the_same(way: Any) -> None:
    for found, expected in zip(gradients(way), gradients(publicly), strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)


class Renamed:
    """An engine whose method takes other arguments."""

    def run_backward(self, roots: Any, gradients: Any) -> None:
        raise AssertionError("never reached")


class Idle:
    """An engine whose method does something else."""

    def run_backward(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("engine", [None, object(), Renamed(), Idle()])
def test_an_engine_that_is_not_as_expected_is_left(engine: Any) -> None:
    assert choose(engine) is publicly


def test_the_engine_of_this_torch_is_taken() -> None:
    engine = getattr(Variable, "_execution_engine", None)
    if engine is None:
        pytest.skip("this torch has no engine under the name")
    assert choose(engine).__qualname__ == directly(engine).__qualname__


def test_edges_lead_to_leaves_and_to_functions_in_python() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * 2

    leaf = torch.zeros(3, requires_grad=True)
    edge = edge_of(Double.apply(leaf))  # the tensor is gone, its function must not be
    go_back((edge,), (torch.ones(3),))
    go_back((edge_of(leaf),), (torch.ones(3),))
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [3.0, 3.0, 3.0]
