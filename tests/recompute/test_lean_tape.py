"""Which values a lean tape keeps: enough, as little as can be, and to the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptsched.base.errors import ExecutionError
from ckptsched.recompute.lean_tape import Call, Chosen, LeanTape, choose


@dataclass
class Program:
    """Calls on values that lie in storages, of which some are needed in the end."""

    calls: list[Call] = field(default_factory=list)
    home_of: dict[int, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    there: set[int] = field(default_factory=set)
    needed: set[int] = field(default_factory=set)

    def chosen(self) -> Chosen:
        homes = tuple(sorted(self.home_of.items()))
        there, needed = frozenset(self.there), frozenset(self.needed)
        return choose(tuple(self.calls), homes, tuple(self.sizes), there, needed)

    def contents(self, steps: Iterable[int], known: dict[int, Any]) -> dict[int, Any]:
        """What lies in each storage after some of the calls: a text of how it was computed."""
        inside = dict(known)
        for k in steps:
            call = self.calls[k]
            read = tuple(inside[self.home_of[n]] for n in call.reads)
            for n in call.makes:
                home = self.home_of[n]
                is_view = home in {self.home_of[r] for r in call.reads} and not call.writes
                if not is_view:
                    inside[home] = (k, read)
        return inside


@st.composite
def programs(draw: st.DrawFn, in_place: bool = True) -> Program:
    made = Program()
    for n in range(draw(st.integers(1, 2))):
        made.home_of[n] = n
        made.sizes.append(draw(st.integers(1, 9)))
        made.there.add(n)
    for _ in range(draw(st.integers(1, 6))):
        values = list(made.home_of)
        reads = tuple(draw(st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True)))
        kinds = ["new", "new", "view", *["write"] * in_place]
        kind, cheap = draw(st.sampled_from(kinds)), draw(st.sampled_from([True, True, False]))
        target = reads[0]
        if kind == "write" and made.home_of[target] not in made.there:
            made.calls.append(Call(reads, (target,), (target,), cheap))
            continue
        number = len(made.home_of)
        if kind == "view":
            made.home_of[number] = made.home_of[target]
            made.calls.append(Call((target,), (number,), (), cheap))
        else:
            made.home_of[number] = len(made.sizes)
            made.sizes.append(draw(st.integers(1, 9)))
            made.calls.append(Call(reads, (number,), (), cheap))
    homes = st.sampled_from(range(len(made.sizes)))
    made.needed = draw(st.sets(homes, min_size=1))
    if draw(st.booleans()):
        made.there.add(draw(homes))  # the output
    return made


@settings(max_examples=150, deadline=None)
@given(programs())
def test_what_is_made_again_is_what_was_there(program: Program) -> None:
    found = program.chosen()
    made = {n for call in program.calls for n in call.makes}
    start = {home: ("input", n) for n, home in program.home_of.items() if n not in made}
    whole = program.contents(range(len(program.calls)), start)
    roots = {program.home_of[n]: whole[program.home_of[n]] for n in found.roots}
    assert not roots.keys() & found.remade.keys()
    again = program.contents(found.calls, roots)
    for home, number in found.remade.items():
        assert program.home_of[number] == home
        assert again[home] == whole[home]
    assert all(program.calls[k].cheap for k in found.calls)
    assert not found.remade.keys() & program.there
    assert found.remade.keys() <= program.needed
    # What is let go is not read again, and what is wanted stays.
    gone: set[int] = set()
    for k, spent in zip(found.calls, found.spent, strict=True):
        assert not gone & {*program.calls[k].reads}
        gone |= {*spent}
    assert not gone & {*found.remade.values()}


def kept_bytes(program: Program, found: Chosen) -> int:
    kept = (program.needed - found.remade.keys()) | {program.home_of[n] for n in found.roots}
    return sum(program.sizes[home] + 1 for home in kept - program.there)


def can_be_made(program: Program, kept: set[int], home: int) -> bool:
    if home in kept or home in program.there:
        return True
    for call in program.calls:
        if program.home_of[call.makes[0]] == home:  # the first that does
            homes = {program.home_of[n] for n in call.reads}
            return call.cheap and all(can_be_made(program, kept, h) for h in homes)
    return False


@settings(max_examples=80, deadline=None)
@given(programs(in_place=False))
def test_nothing_less_would_do(program: Program) -> None:
    found = program.chosen()
    views = [
        c
        for c in program.calls
        if program.home_of[c.makes[0]] in {program.home_of[n] for n in c.reads}
    ]
    if any(not c.cheap for c in views):  # a view that may not be made again ties its readers down
        return
    homes = range(len(program.sizes))
    least = min(
        sum(program.sizes[h] + 1 for h in chosen if h not in program.there)
        for r in range(len(program.sizes) + 1)
        for chosen in itertools.combinations(homes, r)
        if all(can_be_made(program, {*chosen}, h) for h in program.needed)
    )
    assert kept_bytes(program, found) == least


def run(tape: LeanTape, x: Tensor, steps: Sequence[Any], calls: Sequence[Call]) -> Tensor:
    """Run functions on a tensor and what they make, as a stage does."""
    values = {0: x}
    tape.note(values, (0,))
    with tape.saving():
        for call, step in zip(calls, steps, strict=True):
            values[call.makes[0]] = step(*(values[n] for n in call.reads))
            tape.note(values, call.makes)
            tape.forget_all_but(values)
    out = calls[-1].makes[0]
    tape.settle((0,), (out,))
    return values[out]


def activation(counts: list[int]) -> tuple[list[Any], tuple[Call, ...], Any]:
    weight = torch.randn(8, 8)

    def tanh(x: Tensor) -> Tensor:
        counts.append(1)
        return torch.tanh(x)

    steps = [torch.sin, tanh, lambda x: x @ weight]
    calls = (Call((0,), (1,), (), True), Call((1,), (2,), (), True), Call((2,), (3,), (), False))

    def remake(again: Sequence[int], spent: Sequence[Sequence[int]], values: Any) -> None:
        with torch.no_grad():
            for k in again:
                values[calls[k].makes[0]] = steps[k](*(values[n] for n in calls[k].reads))

    return steps, calls, remake


def test_a_backward_makes_values_again_once() -> None:
    torch.manual_seed(0)
    counts: list[int] = []
    steps, calls, remake = activation(counts)
    x = torch.randn(4, 8, requires_grad=True)
    y = run(LeanTape(calls, remake), x, steps, calls)
    assert len(counts) == 1
    y.sum().backward()
    assert len(counts) == 2
    found, x.grad = x.grad, None
    z = x
    for step in steps:
        z = step(z)
    z.sum().backward()
    assert found is not None
    assert x.grad is not None
    assert torch.equal(found, x.grad)


def test_a_second_backward_is_refused() -> None:
    steps, calls, remake = activation([])
    x = torch.randn(4, 8, requires_grad=True)
    y = run(LeanTape(calls, remake), x, steps, calls).sum()
    y.backward(retain_graph=True)
    with pytest.raises(ExecutionError, match="run a second time"):
        y.backward()


def test_what_is_kept_must_not_change() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    calls = (Call((0,), (1,), (), False), Call((1,), (2,), (), False))
    tape = LeanTape(calls, lambda *_: None)
    y = run(tape, x, [torch.exp, torch.cos], calls)
    with torch.no_grad():
        x.add_(1)
    y.sum().backward()  # nothing of x is kept: exp keeps its output
    z = torch.randn(8, requires_grad=True)
    kept = z * 1
    calls = (Call((0,), (1,), (), False),)
    y = run(LeanTape(calls, lambda *_: None), kept, [torch.sin], calls)
    with torch.no_grad():
        kept.add_(1)
    with pytest.raises(ExecutionError, match=r"changed in place.*shape \(8,\)"):
        y.sum().backward()
