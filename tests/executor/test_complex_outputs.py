"""Models whose output is complex, or complex and real, without a loss that the user names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs


class Filters(nn.Module):
    """Layers in the frequencies, whose last gives the spectrum itself."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        weights = [torch.randn(4, 4, 17, dtype=torch.cfloat) * 0.2 for _ in range(4)]
        self.weights, self.both = nn.ParameterList(map(nn.Parameter, weights)), both

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        for weight in self.weights:
            spectrum = torch.einsum("bif,iof->bof", torch.fft.rfft(x), weight)
            x = torch.tanh(torch.fft.irfft(spectrum, n=32)) + x
        return (spectrum.conj(), x) if self.both else spectrum.conj()


@pytest.mark.parametrize("both", [False, True])
def test_complex_outputs_have_a_default_loss(both: bool) -> None:
    torch.manual_seed(0)
    plain, x = Filters(both), torch.randn(8, 4, 32)
    model = copy.deepcopy(plain)
    least = cs.plan(plain, x, budget="100%").least_budget_bytes
    cs.fit(model, x, budget=least)
    for net in (model, plain):
        found = net(x)
        for tensor in found if both else [found]:
            tensor.abs().square().sum().backward(retain_graph=both)
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    for planned, real in pairs:
        assert planned.grad is not None
        assert real.grad is not None
        assert torch.equal(planned.grad, real.grad)
    net = cs.captured(plain, x)
    plan = cs.plan(net, net.take(x), budget=least)
    found = cs.verify(net, plan, net.take(x))
    assert found.ok, str(found)
    assert found.max_gradient > 0
