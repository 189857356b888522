"""Operations that are run as one: which they are, and that it changes no number and no byte."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.base.errors import ExecutionError
from ckptsched.capture.stage_discovery import StageCall, StagedModule
from ckptsched.executor.script import between, find_stretches
from ckptsched.ode import ODEBlock
from ckptsched.recompute import tape
from ckptsched.schedule.language import Schedule
from ckptsched.simulator.liveness import analyse, blocks_of, cut
from tests.executor.test_random_networks import loss, plan_by, step
from tests.support.random_schedules import schedules


def cut_up(schedule: Schedule, stages: int, *, peak: int = -1, shared: bool = False) -> list[str]:
    """The stretches, as words; each stage has a parameter of its own, or all have one."""
    segments = cut(schedule, blocks_of((), stages))
    liveness = analyse(schedule, stages)
    starts = find_stretches(
        schedule, liveness, segments, peak, lambda i: frozenset([0 if shared else i])
    )
    words = schedule.to_text().split()
    return [" ".join(words[a:b]) for a, b in between(starts, 0, len(words))]


ALL = "T1 T2 T3 turn B3 B2 B1 -x0"


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (ALL, {}, "T1 T2 T3|turn|B3 B2 B1|-x0"),
        (ALL, {"shared": True}, "T1 T2|T3|turn|B3|B2 B1|-x0"),
        (ALL, {"peak": 4}, "T1 T2|T3|turn|B3|B2 B1|-x0"),
        (ALL, {"peak": 5}, "T1|T2|T3|turn|B3|B2|B1|-x0"),
        (ALL, {"peak": 1}, "T1 T2 T3|turn|B3 B2 B1|-x0"),
        (
            "F1 F2 -x1 T3 turn B3 -x2 T1 T2 B2 B1 -x0",
            {},
            "F1 F2 -x1|T3|turn|B3|-x2|T1 T2|B2 B1|-x0",
        ),
        ("F1 T2 T3 turn B3 B2 -x1 T1 B1 -x0", {}, "F1|T2 T3|turn|B3 B2|-x1|T1|B1|-x0"),
    ],
)
def test_what_is_run_as_one(text: str, options: dict[str, Any], expected: str) -> None:
    assert "|".join(cut_up(Schedule.from_text(text), 3, **options)) == expected


def test_a_state_that_is_read_again_ends_a_tape() -> None:
    # F2 reads what the tape of stage 1 keeps of its output, after T2 has.
    schedule = Schedule.from_text("F1 F2 -x1 T3 turn B3 -x2 T1 T2 F2 -x2 B2 B1 -x0")
    assert cut_up(schedule, 3)[5:] == ["T1", "T2", "F2 -x2", "B2", "B1", "-x0"]
    model, x = Row([nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)]), torch.randn(4, 6)
    net = cs.checkpointed(model, plan_by(cs.profile(model, x, loss=loss), schedule))
    expected = step(model, x, {})[0]
    for _ in range(2):
        for a, b in zip(step(net, x, {})[0], expected, strict=True):
            assert a is b is None or torch.equal(a, b)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 9), st.booleans())
def test_stretches_cover_a_schedule_and_match(
    data: st.DataObject, stages: int, shared: bool
) -> None:
    schedule = data.draw(schedules(stages))
    peak = data.draw(st.integers(0, len(schedule) - 1))
    groups = [text.split() for text in cut_up(schedule, stages, peak=peak, shared=shared)]
    assert " ".join(word for group in groups for word in group) == schedule.to_text()
    made: dict[int, int] = {}  # the last stage of a tape, and its first
    words = 0
    for group in groups:
        words += len(group)
        if group[0][0] == "T":
            first, last = int(group[0][1:]), int(group[-1][1:])
            assert [f"T{i}" for i in range(first, last + 1)] == group
            made[last] = first
        elif group[0][0] == "B":
            last, first = int(group[0][1:]), int(group[-1][1:])
            assert [f"B{i}" for i in range(last, first - 1, -1)] == group
            assert len(group) == 1 or not words - len(group) <= peak < words
            while last >= first:
                last = made.pop(last) - 1
            assert last == first - 1  # no tape is used up in part
        else:
            assert len(group) == 1 or {word[0] for word in group} <= {"F", "-"}


class Scaled(nn.Module):
    """Parameters of the state's own shape, whose gradients may be the gradients of states."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Shifted(nn.Module):
    """A parameter whose gradient is the state's, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


FUNCTIONS: dict[str, Any] = {
    "narrow": lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6)),
    "wide": lambda: nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 6)),
    "twice": lambda: nn.Sequential(*[nn.Linear(6, 6), nn.ReLU()] * 2),
    "norm": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Sigmoid()),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 6), nn.LayerNorm(6)),
    "scaled": Scaled,
    "shifted": Shifted,
    "fixed": nn.Tanh,
}


class Link(StageCall):
    """One of several modules in a row, which are one block."""

    __slots__ = ("index", "module")

    def __init__(self, owner: Row, index: int) -> None:
        self.prefix, self.index = "", index
        self.module = owner.parts[index]

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found

    @property
    def label(self) -> str:
        return f"link[{self.index}]"

    @property
    def key(self) -> tuple[str, int]:
        return ("link", id(self.module))


class Row(StagedModule):
    """Modules in a row, some of them several times, as the stages of one block."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def stages(self) -> list[StageCall]:
        return [Link(self, i) for i in range(len(self.parts))]


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    names = st.sampled_from(sorted(FUNCTIONS))
    if draw(st.booleans()):
        method, count = draw(st.sampled_from(["euler", "rk4"])), draw(st.integers(3, 7))
        block: nn.Module = ODEBlock(FUNCTIONS[draw(names)](), method=method, steps=count)
    else:
        made = [FUNCTIONS[name]() for name in draw(st.lists(names, min_size=1, max_size=3))]
        places = draw(st.lists(st.integers(0, len(made) - 1), min_size=3, max_size=7))
        block = Row([made[k] for k in places])
    return nn.Sequential(nn.Linear(6, 6), block, nn.Linear(6, 6))


@settings(
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    networks(),
    st.sampled_from(["store_all", "every_2", "every_3", "input_only", "drawn"]),
    st.data(),
)
def test_shared_tapes_keep_every_bit_and_byte(
    model: nn.Module, solver: str, data: st.DataObject
) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    chain = cs.profile(model, x, loss=loss)
    if solver == "drawn":
        plan = plan_by(chain, data.draw(schedules(len(chain))))
    else:
        plan = plan_by(chain, cs.plan(chain, budget=2**50, solver=solver).schedule)
    net = cs.checkpointed(copy.deepcopy(model), plan)
    norms = sum(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    for _ in range(2):  # in the second step all stages are known
        expected, _ = step(model, x, {})
        found, peak = step(net, x, {})
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)
        assert plan.peak_bytes - 8 * norms <= peak <= plan.peak_bytes


def test_a_step_calls_the_engine_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ODEBlock(nn.Linear(6, 6), steps=20)
    x = torch.randn(4, 6)
    chain = cs.profile(model, x)
    net = cs.checkpointed(model, cs.plan(chain, budget=2**50, solver="store_all"))
    calls = []
    go_back = tape.go_back
    monkeypatch.setattr(tape, "go_back", lambda *args: (calls.append(1), go_back(*args)))
    counts = []
    for _ in range(2):
        calls.clear()
        net(x).sum().backward()
        counts.append(len(calls))
    # By itself goes each stage that is seen for the first time, the first of the chain, and the
    # one at the peak; the rest are one tape or, around the peak, two.
    assert counts[1] <= counts[0] <= 6


@pytest.mark.parametrize("how", ["in place", "other tensors"])
def test_a_stage_that_changes_in_a_shared_tape_is_caught(how: str) -> None:
    class Turning(nn.Linear):
        turned = 0

        def forward(self, z: Tensor) -> Tensor:
            out = super().forward(z)
            if self.turned:
                type(self).turned -= 1
                if self.turned == 0 and how == "in place":
                    z.mul_(1.0)
                elif self.turned == 0:
                    raise RuntimeError("a failure of its own")
            return out

    model = ODEBlock(Turning(6, 6), steps=12)
    x = torch.randn(4, 6)
    net = cs.checkpointed(model, cs.plan(cs.profile(model, x), budget=2**50, solver="store_all"))
    net(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    Turning.turned = 7
    error = ExecutionError if how == "in place" else RuntimeError
    message = r"step\[6\].*in place" if how == "in place" else "of its own"
    with pytest.raises(error, match=message):
        net(x)
    Turning.turned = 0
    model.zero_grad()
    net(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
