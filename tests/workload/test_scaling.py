"""Chains of another batch, of another number of steps, and along a line of two."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ckptsched as cs
from ckptsched.base.errors import WorkloadError
from ckptsched.fitting.planning import plan
from ckptsched.workload.chain import Chain
from ckptsched.workload.scaling import Line, batch_of, with_batch, with_steps
from ckptsched.workload.stage import Block, TapeOption
from tests.support.small_chains import mixed_chain, uniform_chain
from tests.support.strategies import chains, ledger_chains

SIZES = ("w_a", "w_t", "w_g", "o_f", "o_b")


@given(chain=chains(), batch=st.integers(1, 50))
def test_a_batch_scales_all_but_parameter_gradients(chain: Chain, batch: int) -> None:
    before, after = chain.to_json(), with_batch(chain, batch).to_json()
    for key in SIZES:
        assert after[key] == [batch * x for x in before[key]]
    for key in ("u_f", "u_b"):
        assert after[key] == pytest.approx([batch * x for x in before[key]])
    assert after["w_p"] == before["w_p"]
    assert after["w_held"] == batch * before["w_held"]


@given(chain=ledger_chains(noise=True))
def test_an_estimate_has_no_exact_bytes(chain: Chain) -> None:
    grown = with_batch(chain, 2)
    assert not grown.has_ledger
    assert grown.signature is None
    assert grown.blocks == chain.blocks


def test_the_batch_is_that_of_the_profile() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    chain = cs.profile(model, torch.randn(6, 8))
    assert batch_of(chain) == 6
    assert batch_of(mixed_chain()) == 1
    tripled = with_batch(chain, 18)
    real = cs.profile(model, torch.randn(18, 8))
    assert tripled.arrays.state_bytes.tolist() == real.arrays.state_bytes.tolist()
    assert tripled.arrays.parameter_gradient_bytes.tolist() == (
        real.arrays.parameter_gradient_bytes.tolist()
    )
    # What an operation takes is scaled too, so that the estimate is no less than the truth.
    estimated, exact = plan(tripled, budget="100%"), plan(real, budget="100%")
    assert estimated.peak_bytes >= exact.peak_bytes
    smaller = with_batch(chain, 1)
    assert all(stage.tape_bytes >= stage.state_bytes for stage in smaller.stages)


def test_steps_are_copied_between_the_first_and_the_last() -> None:
    grown = with_steps(mixed_chain(), 7)
    assert [(b.first, b.last) for b in grown.blocks] == [(1, 7), (8, 14), (15, 21)]
    assert len(set(map(id, grown.stages))) == 3
    assert with_steps(grown, 4) == mixed_chain()
    assert len(with_steps(mixed_chain(), 1)) == 3


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_steps_are_those_of_a_profile(steps: int) -> None:
    def chain(steps: int) -> Chain:
        block = cs.ODEBlock(nn.Linear(4, 4), method="rk4", steps=steps)
        model = nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 2))
        return cs.profile(model, torch.randn(3, 4))

    grown, real = with_steps(chain(5), steps).to_json(), chain(steps).to_json()
    for key in (*SIZES, "w_p", "w_held", "blocks"):
        assert grown[key] == real[key]
    if steps == 1:  # its ledger has bytes of a second backward, which there is not
        return
    assert [grown["kinds"][k]["ledger"] for k in grown["kind"]] == [
        real["kinds"][k]["ledger"] for k in real["kind"]
    ]


def test_in_a_chain_without_blocks_equal_stages_are_steps() -> None:
    chain = replace(uniform_chain(5), blocks=())
    assert with_steps(chain, 8) == replace(uniform_chain(8), blocks=())
    rows = replace(mixed_chain(), blocks=())
    assert with_steps(rows, 7) == replace(with_steps(mixed_chain(), 7), blocks=())


def test_without_equal_steps_nothing_is_changed() -> None:
    chain = mixed_chain()
    blocks = tuple(Block(name=str(i), first=i, last=i) for i in range(1, 13))
    with pytest.raises(WorkloadError, match="none of the 12 blocks has 3 or more equal steps"):
        with_steps(replace(chain, blocks=blocks), 4)
    grows = [replace(x, state_bytes=i, tape_bytes=2**40) for i, x in enumerate(chain.stages)]
    with pytest.raises(WorkloadError, match="none of the 12 blocks"):
        with_steps(replace(chain, stages=tuple(grows), blocks=()), 4)


@given(chain=chains(), size=st.integers(1, 40))
def test_a_line_goes_through_what_grows_evenly(chain: Chain, size: int) -> None:
    line = Line(2, with_batch(chain, 2), 5, with_batch(chain, 5))
    grown, expected = line(size).to_json(), with_batch(chain, size).to_json()
    for key in (*SIZES, "w_p", "w_held", "o_loss"):
        assert grown[key] == expected[key]
    assert grown["u_f"] == pytest.approx(expected["u_f"], abs=1e-9)


def test_a_line_through_two_profiles_is_exact() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)])
    small, large, real = (cs.profile(model, torch.randn(n, 16)) for n in (32, 64, 320))
    guess = Line(32, small, 64, large)(320)
    assert guess.signature is None
    for budget in ("100%", "90%"):
        assert plan(guess, budget=budget).peak_bytes == plan(real, budget=budget).peak_bytes


def test_other_tapes_grow_too() -> None:
    stage = uniform_chain(1).stages[0]
    small = TapeOption(tape_bytes=stage.tape_bytes // 2, forward_seconds=1.0, backward_seconds=2.0)
    chain = Chain(stages=(replace(stage, other_tapes=(small,)),) * 3)
    doubled = with_batch(chain, 2)
    assert doubled.stages[0].other_tapes == (
        replace(small, tape_bytes=2 * small.tape_bytes, forward_seconds=2.0, backward_seconds=4.0),
    )
    assert Line(1, chain, 2, doubled)(5).stages == with_batch(chain, 5).stages


def test_a_line_needs_two_alike() -> None:
    with pytest.raises(WorkloadError, match="chains of 3 and 4 stages lie on no line"):
        Line(1, uniform_chain(3), 2, uniform_chain(4))(3)


def test_a_line_is_never_below_zero() -> None:
    small, large = uniform_chain(2), with_batch(uniform_chain(2), 3)
    falling = Line(2, large, 3, small)
    assert falling(40).stages[0].state_bytes == 0
    assert falling(40).stages[0].forward_seconds == 0


class Residual(nn.Module):
    """No chain, so that it is recorded; skips, so that stages read several values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * first
        return x


@pytest.mark.filterwarnings("ignore::ckptsched.TimingWarning")
def test_chains_of_recorded_models_lie_on_a_line_and_grow_with_the_batch() -> None:
    torch.manual_seed(0)
    model = Residual()
    # Batches beside which a weight's gradient, which does not grow, is never what binds.
    small, middle, large = (cs.profile(model, torch.randn(n, 16)) for n in (64, 96, 160))
    assert small.values
    line = Line(64, small, 96, middle)(160)
    assert line.has_ledger
    for found in (line, with_batch(small, 160)):
        for one, other in zip(found.stages, large.stages, strict=True):
            assert one.state_bytes == other.state_bytes
            assert one.tape_bytes == other.tape_bytes
    chains_of = (line, replace(large, values=()))
    peaks = [plan(chain, budget="100%").peak_bytes for chain in chains_of]
    assert peaks[0] == peaks[1]
    found = cs.largest_batch(small, budget=2 * plan(small, budget="100%").store_all_bytes)
    assert found.size >= 128
