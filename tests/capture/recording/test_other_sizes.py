"""A batch of other sizes is recorded by one pass where that agrees with the recording there is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckptsched.capture.inspection import Inspection
from ckptsched.capture.recording.record import record
from ckptsched.capture.recording.recording import Recording
from ckptsched.tensors.pytree import State


class Rows(nn.Module):
    """Computes with sizes, and with a number that is said from outside."""

    def __init__(self, number: Callable[[int], Any] = lambda length: 3) -> None:
        super().__init__()
        self.inner, self.drop, self.runs = nn.Linear(4, 4), nn.Dropout(0.5), 0
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        runs[0] += 1
        batch, length, width = x.shape
        y = self.drop(self.inner(x)).reshape(batch * length, width)
        y = y * self.number(length)
        return y.view(batch, length // 2, 2 * width).roll(length - 1, 1)


runs = [0]


def _recorded(model: nn.Module, length: int, like: Recording | None = None) -> Recording:
    inputs = State.of(((torch.randn(2, length, 4),), {}), opaque=True)
    runs[0] = 0
    return record(Inspection.of(model), inputs, torch.device("cpu"), like)


@pytest.mark.parametrize("length", [2, 6, 24])
def test_sizes_alone_take_one_pass_and_give_the_recording_of_two(length: int) -> None:
    model = Rows()
    like = _recorded(model, 12)
    assert runs == [2]
    found = _recorded(model, length, like)
    assert runs == [1]
    alone = _recorded(model, length)
    assert str(found) == str(alone)
    x = torch.randn(2, length, 4)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(found.replay(model, [x]), expected)


@pytest.mark.parametrize("number", [0.5, 4, 5, 10], ids=str)
def test_another_number_is_looked_at_twice(number: float) -> None:
    now = [3.0 if isinstance(number, float) else 3]
    model = Rows(lambda length: now[0])
    like = _recorded(model, 12)
    now[0] = number
    found = _recorded(model, 8, like)
    assert runs == [2]
    assert any(number in call.given.constants() for call in found.calls)


def test_recording_starts_no_thread_unless_the_model_is_written_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = list[threading.Thread]()
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: (started.append(thread), start(thread))
    )
    _recorded(Rows(), 12)
    assert not started
    model = nn.Sequential(nn.BatchNorm1d(12), Rows())
    before = model[0].running_mean.clone()  # type: ignore[operator, union-attr]
    _recorded(model, 12)
    assert started
    assert torch.equal(model[0].running_mean, before)  # type: ignore[arg-type]
