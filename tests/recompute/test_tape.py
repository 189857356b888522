"""A stage that is differentiated on its own gives what one graph over all gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ckptsched.base.errors import ExecutionError
from ckptsched.recompute.parameter_swap import Slots, make_alias
from ckptsched.recompute.tape import record, run_stage
from ckptsched.tensors.pytree import State


class Twice(nn.Module):
    """Uses one weight twice and another once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def go_back_by_stages(stage: nn.Module, x: Tensor, times: int, feed: bool) -> dict[str, Tensor]:
    """Gradients of `times` runs of a stage, each with a tape of its own."""
    slots = Slots([stage])
    aliases = {id(p): make_alias(p) for p in slots.parameters()}
    tapes = []
    with slots.parameters_replaced(slots.bind(aliases)):
        for _ in range(times):
            tape, state = record(stage, State.of(x), wanted=[True])
            x = state.value()
            repeated = tape.repeated_leaves()
            if feed:
                tape.feed_back([a for a in aliases.values() if id(a) in repeated])
            tapes.append(tape)
    gradient: Tensor | None = torch.ones_like(x)
    for tape in reversed(tapes):
        (gradient,) = tape.backward([gradient])
    assert gradient is not None
    found = {name: aliases[id(p)].grad for name, p in stage.named_parameters()}
    assert all(p.grad is None for p in stage.parameters())
    return {**found, "input": gradient}  # type: ignore[dict-item]


def test_sums_fed_back_give_the_bits_of_one_graph() -> None:
    torch.manual_seed(0)
    stage, x = Twice(), torch.randn(5, 8)
    leaf = x.clone().requires_grad_()
    state = leaf
    for _ in range(7):
        state = stage(state)
    state.backward(torch.ones_like(state))
    expected = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.zero_grad(set_to_none=True)
    found = go_back_by_stages(stage, x, 7, feed=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(found["input"], leaf.grad)
    # Without feeding back, the order of additions differs, and so does the last bit.
    other = go_back_by_stages(stage, x, 7, feed=False)
    assert not all(torch.equal(other[name], expected[name]) for name in expected)
    assert all(torch.allclose(other[name], expected[name]) for name in expected)


def test_repeated_leaves_are_those_used_more_than_once() -> None:
    stage = Twice()
    tape, _ = record(stage, State.of(torch.randn(2, 8)), wanted=[False])
    assert tape.repeated_leaves() == {id(p) for p in stage.twice.parameters()}


def test_a_stage_without_gradients_has_an_empty_tape() -> None:
    tape, output = record(nn.Tanh(), State.of(torch.ones(3)), wanted=[False])
    assert tape.backward([torch.ones(3)]) == (None,)
    assert tape.carries == (False,)
    assert not output.value().requires_grad


def test_output_must_have_tensors() -> None:
    def returned(value: object) -> None:
        record(lambda x: value, State.of(torch.ones(2)), wanted=[True])

    with pytest.raises(ExecutionError, match=r"returned nothing \(None\) where a state"):
        returned(None)
    with pytest.raises(ExecutionError, match="returned a tuple without tensors where a state"):
        returned((1, "two"))
    with pytest.raises(ExecutionError, match="returned a object where a state was expected"):
        returned({"x": torch.ones(1), "y": object()})


def test_slots_put_everything_back_after_a_failure() -> None:
    model = nn.Sequential(nn.LSTM(3, 3), nn.BatchNorm1d(3))
    slots = Slots([model])
    before = slots.parameters(), slots.buffers()
    flat = list(model[0]._flat_weights)
    aliases = {id(p): make_alias(p) for p in before[0]}
    clones = {id(b): b.clone() for b in before[1]}

    def fail_inside() -> None:
        with slots.parameters_replaced(slots.bind(aliases)), slots.buffers_replaced(clones):
            assert all(
                p is aliases[id(q)] for p, q in zip(model.parameters(), before[0], strict=True)
            )
            assert model[0]._flat_weights[0] is model[0].weight_ih_l0
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert all(a is b for a, b in zip(slots.parameters(), before[0], strict=True))
    assert all(a is b for a, b in zip(slots.buffers(), before[1], strict=True))
    assert all(a is b for a, b in zip(model[0]._flat_weights, flat, strict=True))


def _values() -> list[object]:
    a, b, c = torch.ones(2), torch.ones(3), torch.ones(4)
    pair = torch.max(torch.ones(2, 2), 0)
    return [a, (a,), (a, b), (a, b, c), (a, a), (a, b, a), [a, b], (a, (b, c)), (a, 1), pair]


@pytest.mark.parametrize("k", range(len(_values())))
def test_what_a_stage_returns_is_taken_apart_and_put_together_as_a_state(k: int) -> None:
    """Whatever short cut is taken: tuples of tensors, which are nearly all, have one."""
    value = _values()[k]
    known = State.of(value)
    made = run_stage(lambda _: value, State((torch.ones(1),)))
    assert made.tree == known.tree
    assert len(made.leaves) == len(known.leaves)
    assert all(x is y for x, y in zip(made.leaves, known.leaves, strict=True))
    seen: list[object] = []

    def stage(found: object) -> Tensor:
        seen.append(found)
        return torch.ones(1)

    for state in (made, made.detached(), known):
        run_stage(stage, state)
    for found in seen:
        assert type(found) is type(value)
        assert State.of(found).tree == known.tree


def test_states_of_one_stage_are_not_mixed_up_with_those_of_another() -> None:
    """Tuples of one length share what is around them; the tensors are each one's own."""
    first = run_stage(lambda _: (torch.ones(1), torch.ones(2)), State((torch.ones(1),)))
    other = run_stage(lambda _: (torch.ones(3), torch.ones(4)), State((torch.ones(1),)))
    sizes: list[list[int]] = []

    def stage(found: tuple[Tensor, ...]) -> Tensor:
        sizes.append([len(y) for y in found])
        return torch.ones(1)

    run_stage(stage, first)
    run_stage(stage, other)
    assert sizes == [[1, 2], [3, 4]]
