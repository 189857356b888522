"""Recording copies no model, and puts back what a forward pass has changed all the same."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.capture.inspection import inspect_model
from ckptsched.capture.model_state import left_as_it_was
from ckptsched.memory.meters import default_meter
from ckptsched.torch_state.replay_context import RandomState
from tests.capture.recording.test_stages import language, unet


def by_operator(t: Tensor) -> None:
    with torch.no_grad():
        t.add_(1)


def by_data(t: Tensor) -> None:
    t.data.mul_(2)


def by_view(t: Tensor) -> None:
    t.detach()[1:].zero_()


def by_out(t: Tensor) -> None:
    torch.add(torch.ones(4), 1, out=t.data)


def by_foreach(t: Tensor) -> None:
    torch._foreach_add_([t.data, torch.ones(3)], 2)


def by_numpy(t: Tensor) -> None:
    t.detach().numpy()[0] = 7


def by_batch_norm(t: Tensor) -> None:
    F.batch_norm(torch.randn(3, 4), t.data, torch.ones(4), training=True)


def by_storage(t: Tensor) -> None:
    t.untyped_storage()[0] = 77


def by_pointer(t: Tensor) -> None:
    ctypes.memset(t.data_ptr(), 3, 2)


def by_another_tensor(t: Tensor) -> None:
    t.data = torch.zeros(4)


def in_a_thread(t: Tensor) -> None:
    thread = threading.Thread(target=by_data, args=(t,))
    thread.start()
    thread.join()


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("buffer", torch.randn(4))
        self.plain = torch.randn(4)
        self.byte = torch.randint(0, 255, (13,), dtype=torch.uint8)

    def all(self) -> list[Tensor]:
        return [self.weight, self.buffer, self.plain]


SEEN = (
    *(by_operator, by_data, by_view, by_out, by_foreach, by_numpy, by_batch_norm),
    *(by_another_tensor, by_storage, by_pointer),
)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("change", SEEN)
def test_what_is_written_to_is_put_back(change: Callable[[Tensor], None], which: int) -> None:
    torch.manual_seed(0)
    model = Holds()
    before = [tensor.detach().clone() for tensor in model.all()]
    inspection = inspect_model(model, "this", cs.ProfileError)
    with left_as_it_was(inspection, RandomState.take(torch.device("cpu")), lazily=True):
        change(model.all()[which])
        assert not torch.equal(model.all()[which], before[which])
    assert all(map(torch.equal, model.all(), before))


def test_what_nothing_shows_is_said() -> None:
    model = Holds()
    inspection = inspect_model(model, "this", cs.ProfileError)
    with (
        pytest.raises(cs.ProfileError, match="parameter 'weight' was written to in a way that"),
        left_as_it_was(inspection, RandomState.take(torch.device("cpu")), lazily=True),
    ):
        in_a_thread(model.weight)


def test_odd_bytes_count() -> None:
    model = Holds()
    pointer, last = model.byte.data_ptr() + 12, int(model.byte[12])
    inspection = inspect_model(model, "this", cs.ProfileError)
    with (
        pytest.raises(cs.ProfileError, match="tensor 'byte'"),
        left_as_it_was(inspection, RandomState.take(torch.device("cpu")), lazily=True),
    ):
        ctypes.memset(pointer, (last + 1) % 256, 1)


@pytest.mark.parametrize("made", [language, unet])
def test_recording_takes_the_bytes_of_a_forward_pass(
    made: Callable[[], tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]],
) -> None:
    model, args, kwargs = made()
    model.register_parameter("large", nn.Parameter(torch.zeros(2**20)))
    meter = default_meter("cpu")

    def forward() -> None:
        with torch.no_grad():
            model(*args, **kwargs)

    def recorded() -> None:
        cs.captured(model, *args, kwargs=kwargs)

    recorded()
    peaks = [meter.measure(run)[1].peak_bytes for run in (recorded, forward)]
    states = 2 * torch.get_rng_state().nbytes  # of random numbers, as they were
    assert peaks[0] <= 1.2 * peaks[1] + states
