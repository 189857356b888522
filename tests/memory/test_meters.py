"""The meters count every byte that lives: against known sizes, a model of programs, each other."""

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ckptsched.base.errors import ProfileError
from ckptsched.memory.meters import (
    AllocatorMeter,
    CudaMeter,
    Measurement,
    Meter,
    ProfilerMeter,
    default_meter,
    storage_bytes,
)

needs_compiler = pytest.mark.skipif(
    not AllocatorMeter.available(), reason="no C++ compiler for the counting allocator"
)
METERS = [
    pytest.param(ProfilerMeter, id="profiler"),
    pytest.param(AllocatorMeter, id="allocator", marks=needs_compiler),
]
each_meter = pytest.mark.parametrize("meter_class", METERS)


def block(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


# ---- known sizes ---------------------------------------------------------------------------------


@each_meter
def test_an_empty_window_is_zero(meter_class: type[Meter]) -> None:
    result, seen = meter_class().measure(lambda: "done")
    assert result == "done"
    assert seen == Measurement(peak_bytes=0, final_bytes=0)


@each_meter
def test_peak_and_final_of_known_sizes(meter_class: type[Meter]) -> None:
    def program() -> Tensor:
        first = block(1000)
        second = block(20)
        del first
        return torch.cat([second, block(300)])

    _, seen = meter_class().measure(program)
    assert seen == Measurement(peak_bytes=1000 + 20, final_bytes=320)
    _, seen = meter_class().measure(lambda: block(300).sum())
    assert seen == Measurement(peak_bytes=300 + 300 * 8 + 8, final_bytes=8)  # summed as int64


@each_meter
def test_the_temporaries_of_an_operation_count(meter_class: type[Meter]) -> None:
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    result, seen = meter_class().measure(lambda: torch.conv2d(x, weight))
    columns = 3 * 3 * 3 * 6 * 6 * 8  # im2col's buffer, which no tensor in Python ever holds
    assert seen.final_bytes == result.nbytes
    assert seen.peak_bytes >= result.nbytes + columns


@each_meter
def test_views_and_in_place_operations_are_free(meter_class: type[Meter]) -> None:
    x = torch.zeros(10, 10)
    _, seen = meter_class().measure(lambda: x[1:].add_(x[:1]).view(-1, 2).relu_().t().detach())
    assert seen.peak_bytes == 0


@each_meter
def test_memory_from_before_the_window_does_not_count(meter_class: type[Meter]) -> None:
    old = [block(5000)]

    def program() -> Tensor:
        old.clear()
        return block(70)

    _, seen = meter_class().measure(program)
    assert seen == Measurement(peak_bytes=70, final_bytes=70)


@each_meter
def test_blocks_may_be_freed_in_a_later_window_or_between(meter_class: type[Meter]) -> None:
    meter = meter_class()
    for _ in range(5):
        kept, seen = meter.measure(lambda: [block(4096) for _ in range(8)])
        assert seen.final_bytes == 8 * 4096
        del kept[:4]  # between windows: their addresses are given out again
        reused = [block(4096) for _ in range(2)]

        def program(kept: list[Tensor] = kept, reused: list[Tensor] = reused) -> Tensor:
            kept.clear()
            reused.clear()
            return block(64)

        _, seen = meter.measure(program)
        assert seen == Measurement(peak_bytes=64, final_bytes=64)


@each_meter
def test_growing_a_storage_counts_the_new_and_forgets_the_old(meter_class: type[Meter]) -> None:
    def program() -> Tensor:
        x = block(100)
        return x.resize_(1000)  # both live while the bytes are copied

    _, seen = meter_class().measure(program)
    assert seen == Measurement(peak_bytes=1100, final_bytes=1000)


@each_meter
def test_phases_carry_over_what_lives(meter_class: type[Meter]) -> None:
    with meter_class().window() as window:
        first = block(100)
        block(30)
        window.mark()
        window.mark()
        del first
        second = block(50)
    assert window.phases == (
        Measurement(start_bytes=0, peak_bytes=130, final_bytes=100),
        Measurement(start_bytes=100, peak_bytes=100, final_bytes=100),
        Measurement(start_bytes=100, peak_bytes=100, final_bytes=50),
    )
    assert window.measurement == Measurement(peak_bytes=130, final_bytes=second.nbytes)


@each_meter
def test_a_backward_pass_frees_what_the_forward_pass_saved(meter_class: type[Meter]) -> None:
    x = torch.ones(64, requires_grad=True)
    with meter_class().window() as window:
        y = x.exp().exp().sum()  # saves two results of 256 bytes, and has a sum of 4
        window.mark()
        y.backward()
        del y
    forward, backward = window.phases
    assert forward.final_bytes == 2 * 256 + 4
    # x.grad; before: the 4 bytes of 1, one saved result, a gradient and the next one.
    assert backward.final_bytes == x.grad.nbytes
    assert backward.peak_bytes >= 256 * 3


PROGRAMS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), st.integers(0, 3000)),
        st.tuples(st.just("free"), st.integers(0, 50)),
        st.tuples(st.just("free old"), st.integers(0, 50)),
        st.tuples(st.just("mark"), st.just(0)),
    ),
    max_size=40,
)


def model(program: list[tuple[str, int]]) -> tuple[Measurement, ...]:
    """What the phases of a program must be."""
    sizes: list[int] = []
    phases = []
    start = peak = 0
    for name, number in [*program, ("mark", 0)]:
        if name == "alloc":
            sizes.append(number)
        elif name == "free" and sizes:
            del sizes[number % len(sizes)]
        elif name == "mark":
            live = sum(sizes)
            phases.append(Measurement(start_bytes=start, peak_bytes=peak, final_bytes=live))
            start = peak = live
        peak = max(peak, sum(sizes))
    return tuple(phases)


@each_meter
@settings(max_examples=60, deadline=None)
@given(program=PROGRAMS, old_sizes=st.lists(st.integers(1, 3000), max_size=10))
def test_random_programs_match_the_model(
    meter_class: type[Meter], program: list[tuple[str, int]], old_sizes: list[int]
) -> None:
    old = [block(size) for size in old_sizes]
    mine: list[Tensor] = []
    with meter_class().window() as window:
        for name, number in program:
            held = old if name == "free old" else mine
            if name == "alloc":
                mine.append(block(number))
            elif name == "mark":
                window.mark()
            elif held:
                del held[number % len(held)]
    expected = model(program)
    assert window.phases == expected
    assert window.measurement == Measurement(
        peak_bytes=max(phase.peak_bytes for phase in expected),
        final_bytes=sum(tensor.nbytes for tensor in mine),
    )


# ---- networks: both meters in one run, to the byte -----------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(2, -1, 4, 12).transpose(1, 2).split(4, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def conv_bn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 1, stride=2),
    )


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (
        nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 32)),
        torch.randn(8, 32),
    ),
    "conv_bn": lambda: (conv_bn(), torch.randn(4, 3, 16, 16)),
    "conv_bn_channels_last": lambda: (
        conv_bn().to(memory_format=torch.channels_last),
        torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last),
    ),
    "conv_bn_double": lambda: (conv_bn().double(), torch.randn(4, 3, 16, 16).double()),
    "conv_bfloat16": lambda: (
        nn.Conv2d(3, 8, 3).bfloat16(),
        torch.randn(4, 3, 16, 16).bfloat16(),
    ),
    "attention": lambda: (Attention(), torch.randn(2, 10, 16)),
    "attention_double": lambda: (Attention().double(), torch.randn(2, 10, 16).double()),
    "transformer": lambda: (
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        torch.randn(2, 10, 16),
    ),
    "lstm": lambda: (nn.LSTM(8, 8), torch.randn(5, 2, 8)),
}


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads inside operations, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_both_meters_agree_on_a_training_step(
    name: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    torch.manual_seed(0)
    network, x = NETWORKS[name]()
    for _ in range(2):  # the first step makes parameter gradients, the second adds to them
        with AllocatorMeter().window() as allocator, ProfilerMeter().window() as profiler:
            output = network(x)
            output = output[0] if isinstance(output, tuple) else output
            allocator.mark()
            profiler.mark()
            output.square().sum().backward()
            del output
        backward = allocator.phases[1]
        assert backward.peak_bytes > backward.start_bytes > 0
        if threads == 1:
            assert allocator.phases == profiler.phases
        else:  # kernels may allocate in each of their threads, and the profiler sees one of them
            for complete, partial in zip(allocator.phases, profiler.phases, strict=True):
                assert complete.final_bytes == partial.final_bytes
                assert complete.peak_bytes >= partial.peak_bytes


@needs_compiler
def test_meters_agree_window_by_window() -> None:
    network, x = NETWORKS["conv_bn"]()
    with torch.no_grad():
        network(x)
        _, by_profiler = ProfilerMeter().measure(lambda: network(x))
        _, by_allocator = AllocatorMeter().measure(lambda: network(x))
    assert by_profiler == by_allocator


# ---- errors, other windows -----------------------------------------------------------------------


def in_thread(fn: Callable[[], object]) -> None:
    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


@each_meter
def test_an_exception_is_handed_on_and_the_meter_works_again(meter_class: type[Meter]) -> None:
    meter = meter_class()

    def fail() -> None:
        block(100)
        raise KeyError("mine")

    for error in (KeyError, KeyError):
        with pytest.raises(error, match="mine"):
            meter.measure(fail)
    gc.collect()
    _, seen = meter.measure(lambda: block(7))
    assert seen == Measurement(peak_bytes=7, final_bytes=7)


@each_meter
def test_a_window_has_no_figures_before_its_end(meter_class: type[Meter]) -> None:
    with meter_class().window() as window, pytest.raises(ProfileError, match="it is open"):
        _ = window.measurement
    with pytest.raises(ProfileError, match="closed"):
        window.mark()
    assert len(window.phases) == 1


@each_meter
def test_windows_do_not_nest(meter_class: type[Meter]) -> None:
    meter = meter_class()

    def program() -> Tensor:
        with pytest.raises(ProfileError, match=r"while another is open.*mark\(\)"):
            meter_class().measure(lambda: None)
        return block(9)

    _, seen = meter.measure(program)
    assert seen.peak_bytes == 9


@each_meter
def test_windows_do_not_overlap_between_threads(meter_class: type[Meter]) -> None:
    errors: list[ProfileError] = []

    def other() -> None:
        try:
            meter_class().measure(lambda: None)
        except ProfileError as error:
            errors.append(error)

    meter_class().measure(lambda: in_thread(other))
    assert len(errors) == 1
    meter_class().measure(lambda: None)


# ---- the choice of a meter -----------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("asked", "expected"),
    [("", AllocatorMeter), ("allocator", AllocatorMeter), ("profiler", ProfilerMeter)],
)
def test_the_default_meter_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: type[Meter]
) -> None:
    monkeypatch.setenv("CKPTSCHED_METER", asked)
    assert type(default_meter(torch.device("cpu"))) is expected


def test_a_meter_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSCHED_METER", "guess")
    with pytest.raises(ProfileError, match="'guess'; it may be 'profiler', 'allocator' or unset"):
        default_meter("cpu")
    monkeypatch.setenv("CKPTSCHED_METER", "allocator")
    with pytest.raises(ProfileError, match="no allocator meter counts on device 'cuda'"):
        default_meter("cuda")
    monkeypatch.delenv("CKPTSCHED_METER")
    with pytest.raises(ProfileError, match="no meter counts on device 'meta'"):
        default_meter("meta")
    with pytest.raises(ProfileError, match="'meta'; it counts on cpu and cuda"):
        ProfilerMeter("meta")
    with pytest.raises(ProfileError, match="'cpu'; found"):
        CudaMeter("cpu")


# ---- storage_bytes -------------------------------------------------------------------------------


def test_storages_count_once_and_whole() -> None:
    x = torch.zeros(10, 10)
    y = torch.zeros(3, dtype=torch.int64)
    assert storage_bytes([]) == 0
    assert storage_bytes([x[:2], x.t(), x.detach(), x.view(-1)[7:]]) == 400
    assert storage_bytes(iter([x[0], y, torch.empty(0), nn.Parameter(x)])) == 424


def test_storages_without_memory_count_too() -> None:
    meta = torch.empty(4, device="meta")
    with FakeTensorMode():
        fake, other = torch.empty(5), torch.empty(6)
    assert storage_bytes([meta, meta[1:]]) == 16
    assert storage_bytes([fake, fake.view(1, 5), other]) == 44


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(ProfileError, match=r"layout torch\.sparse_coo.*indices and values"):
        storage_bytes([torch.eye(2).to_sparse()])


# ---- CUDA ----------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def cuda_program() -> Tensor:
    first = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    torch.empty(1000, dtype=torch.uint8, device="cuda")
    del first
    return torch.empty(2000, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
@needs_cuda
def test_cuda_peaks_above_the_baseline() -> None:
    reserved = torch.empty(12345, device="cuda")
    _, rounded = CudaMeter().measure(cuda_program)
    _, exact = CudaMeter(requested=True).measure(cuda_program)
    assert rounded == Measurement(peak_bytes=(1 << 20) + 1024, final_bytes=2048)
    assert exact == Measurement(peak_bytes=(1 << 20) + 1000, final_bytes=2000)
    del reserved


@pytest.mark.gpu
@needs_cuda
def test_the_profiler_agrees_with_cudas_statistics() -> None:
    network, x = conv_bn().cuda(), torch.randn(4, 3, 16, 16, device="cuda")
    network(x).sum().backward()  # workspaces of libraries come to stay
    network.zero_grad()
    with CudaMeter().window() as by_statistics, ProfilerMeter("cuda").window() as by_profiler:
        loss = network(x).sum()
        by_statistics.mark()
        by_profiler.mark()
        loss.backward()
        del loss
    assert by_statistics.phases == by_profiler.phases
