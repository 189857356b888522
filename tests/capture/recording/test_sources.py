"""Where the tensors of a recording come from: what is told by identity while it lives."""

from __future__ import annotations

import torch
from torch import nn

from ckptsched.capture.recording.calls import Fixed
from ckptsched.capture.recording.one_pass.marks import Marks
from ckptsched.capture.recording.one_pass.sources import Sources


def test_a_storage_where_one_was_that_is_gone_is_another() -> None:
    marks = Marks(test_a_storage_where_one_was_that_is_gone_is_another.__code__)
    model = nn.Linear(2, 2)
    sources = Sources(model, marks)
    addresses = set()
    for _ in range(500):  # torch takes the same place again and again
        tensor = torch.empty(8)
        addresses.add(tensor.untyped_storage()._cdata)
        sources.note_born([tensor])
        del tensor
    assert len(addresses) == 500
    for _ in range(500):
        assert isinstance(sources.of(torch.empty(8)), Fixed)
    assert not marks.marked


def test_a_storage_that_an_operator_gave_and_no_call_is_noticed() -> None:
    marks = Marks(test_a_storage_that_an_operator_gave_and_no_call_is_noticed.__code__)
    model, hidden = nn.Linear(2, 2), torch.empty(8)
    sources = Sources(model, marks)
    sources.note_born([hidden])
    sources.of(hidden)
    assert "hides a tensor" in marks.marked[""]
