"""Side outputs that cannot be found again are refused by name, when measured or at the step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import ckptsched as cs
from tests.recompute.side_outputs import (
    WIDTH,
    Exp,
    Layer,
    Own,
    Saved,
    X,
    all_aux,
    chain_of,
    planned,
    set_aux,
)


def test_functions_that_keep_their_output_on_ctx_are_refused_by_name() -> None:
    with pytest.raises(cs.ProfileError, match=r"stage '1'.*save_for_backward"):
        cs.profile(nn.Sequential(Layer(), Own(Exp), Layer()), X)
    with pytest.raises(cs.ProfileError, match=r"stage '0'.*save_for_backward"):
        cs.profile(nn.Sequential(Own(Exp), Layer()), X.clone().requires_grad_())
    cs.profile(nn.Sequential(Layer(), Own(Saved), Layer()), X)


def test_what_cannot_be_found_again_is_refused_by_name() -> None:
    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        with torch._C.DisableTorchFunction():  # as if C++ code had made it
            layer.aux = y * 2

    for where in ("0", "1"):
        parts = [Layer(), Layer(), Layer()]
        parts[int(where)].leave = leave
        with pytest.raises(cs.ProfileError, match=rf"stage '{where}'.*attribute 'aux'.*clone"):
            cs.profile(nn.Sequential(*parts), X)


def test_what_another_stage_reads_is_refused_by_name() -> None:
    first = Layer(set_aux(lambda s, x, y: x.exp()))

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x) + first.aux)

    with pytest.raises(cs.ProfileError, match=r"stage '2'.*another stage left"):
        cs.profile(nn.Sequential(Layer(), first, Reader()), X)

    def add_up(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.aux = layer.aux + y.mean()

    layer = Layer(add_up)
    layer.aux = torch.zeros(())
    with pytest.raises(cs.ProfileError, match=r"left in an attribute"):
        cs.profile(nn.Sequential(Layer(), layer, Layer()), X)


@pytest.mark.parametrize("in_place", [False, True])
def test_where_stages_add_up_their_losses_a_list_is_named(in_place: bool) -> None:
    box: list[Any] = [0.0]

    def add(layer: Any, x: Tensor, y: Tensor) -> None:
        aux = y.square().mean()
        if in_place and isinstance(box[0], Tensor):
            box[0] += aux
        else:
            box[0] = box[0] + aux

    with pytest.raises(cs.ProfileError, match=r"stage '0'.*append its own to a list"):
        cs.profile(chain_of(add), X)


LATER: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "of both": lambda s, x, y: y.square().mean(),
    "linear": lambda s, x, y: y.sum(),
    "of the input": lambda s, x, y: x.exp().mean(),
    "of weights": lambda s, x, y: s.inner.weight.square().sum(),
}


@pytest.mark.parametrize("what", LATER)
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("where", [0, 2])
def test_what_is_left_after_profiling_ends_the_step_in_an_error(
    what: str, share: float, where: int
) -> None:
    model = chain_of(lambda s, x, y: None)
    run = planned(model, share)
    (run(X).mean()).backward()
    model[where].leave = set_aux(LATER[what])
    if (what, where) == ("of the input", 0):
        loss = run(X).mean() + all_aux(model)  # the batch wants no gradient: nothing is missed
        loss.backward()
        return
    loss = run(X).mean() + all_aux(model)
    with pytest.raises(cs.ExecutionError, match="detach"):
        loss.backward()


def test_hooks_added_after_planning_end_the_step_in_an_error() -> None:
    model, seen = chain_of(lambda s, x, y: None), list[Tensor]()
    plan = planned(copy.deepcopy(model)).plan
    handle = model[2].inner.register_forward_hook(lambda m, args, output: seen.append(output))
    with pytest.raises(cs.ExecutionError, match=r"stage '2' left a tensor"):
        cs.checkpointed(model, plan)(X).mean().backward()
    handle.remove()
    run = cs.checkpointed(model, plan)
    model[2].inner.register_forward_hook(lambda m, args, output: seen.append(output))
    with pytest.raises(cs.PlanMismatchError, match="hook"):
        run(X)
