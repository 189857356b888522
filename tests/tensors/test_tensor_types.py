"""Tensors of other types and layouts are followed as by plain autograd, or refused by name."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.tensors.comparison import tolerance_of
from ckptsched.tensors.wrapper_tensors import cannot_be_followed, dense_parts, rebuilt
from tests.support import tensor_kinds
from tests.support.tensor_kinds import KINDS, Bare, Layer, Named, Telling, Weight, X

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

_WHERE = ("sample", "argument", "output", "last output", "parameter", "buffer")
_FOLLOWED = ("telling", "nested telling", "named")
_REFUSED = {
    "bare": "a Bare, which wraps other tensors",
    "telling of a bare one": "a Telling whose inner is a Bare",
    "sparse": "layout torch.sparse_coo",
    "csr": "layout torch.sparse_csr",
    "mkldnn": "layout torch._mkldnn",
    "meta": "meta",
    "fake": "a FakeTensor, which wraps other tensors",
}


def outcomes(pairs: list[str]) -> dict[str, str]:
    """What comes of each, by processes of their own, as one could end."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.tensor_kinds", *pairs],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    lines = (line.split(" -> ", 1) for line in done.stdout.splitlines() if " -> " in line)
    return dict(lines)  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_can_be_counted_trains_as_by_plain_autograd() -> None:
    pairs = [f"{where}/{kind}" for where in _WHERE for kind in _FOLLOWED]
    whats = ("sample", "sample with gradient")
    pairs += [f"{where}/{kind}" for where in whats for kind in ("expanded", "empty")]
    pairs += [f"{where}/{kind}" for where in whats for kind in ("conjugated", "negated")]
    pairs += [f"sample with gradient/{kind}" for kind in _FOLLOWED]
    assert outcomes(pairs) == dict.fromkeys(pairs, "equal")


@pytest.mark.slow
def test_what_cannot_be_counted_is_refused_by_name_and_ends_no_process() -> None:
    pairs = {f"{w}/{k}": k for w, k in itertools.product(_WHERE, _REFUSED)}
    # Such parameters and outputs torch itself cannot make.
    for pair in ("parameter/csr", "parameter/mkldnn", "parameter/fake", "output/fake"):
        pairs.pop(pair)
    pairs.pop("last output/fake")
    found = outcomes(list(pairs))
    assert found.keys() == pairs.keys()
    for pair, kind in pairs.items():
        assert found[pair].startswith("refused: "), (pair, found[pair])
        assert _REFUSED[kind] in found[pair], (pair, found[pair])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_what_cannot_be_followed_is_said_of_each_kind() -> None:
    followed = {*_FOLLOWED, "expanded", "empty", "conjugated", "negated"}
    for name, make in KINDS.items():
        tensor = make(X.clone())
        reason = cannot_be_followed(tensor)
        if name in followed:
            assert not reason, (name, reason)
        elif name == "tagged":
            assert "attributes that detach() loses (tag)" in reason
        elif name in ("nested", "jagged"):
            assert "is a nested tensor" in reason
        else:
            assert _REFUSED[name] in reason, (name, reason)
    assert not cannot_be_followed(X.to("meta"), without_data=True)


def test_wrappers_are_taken_apart_and_put_together() -> None:
    tensor = Telling(Telling(X.clone()))
    (part,) = dense_parts(tensor)
    made = rebuilt(tensor, iter([part + 1]))
    assert type(made) is Telling
    assert type(made.inner) is Telling
    assert torch.equal(made.inner.inner, X + 1)
    assert dense_parts(X) == (X,)
    found = X.as_subclass(Named)
    assert type(rebuilt(found, iter([X + 1]))) is Named


class Weighted(nn.Module):
    """Uses what its parameter's own type has to offer, and what is noted on it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Weight(torch.randn(4, 4))
        self.weight.scale = 0.5  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.doubled() * self.weight.scale)


def test_parameters_of_other_types_keep_type_and_attributes_in_stages() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Weighted(), Layer(), Weighted())
    twin = copy.deepcopy(model)
    for part, other in ((1, 1), (3, 3)):  # which deepcopy leaves out
        twin[part].weight.scale = model[other].weight.scale
    twin(X).square().mean().backward()
    plan = cs.plan(model, X, budget="90%")
    cs.checkpointed(model, plan)(X).square().mean().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_a_plan_is_for_one_type_of_batch() -> None:
    model = nn.Sequential(Layer(), Layer())
    net = cs.checkpointed(model, cs.plan(model, X, budget="100%"))
    with pytest.raises(cs.PlanMismatchError, match="found Named of float32"):
        net(X.as_subclass(Named))
    with pytest.raises(cs.PlanMismatchError, match="called with is a Bare, which wraps"):
        net(Bare(X))
    with pytest.raises(cs.PlanMismatchError, match=r"layout torch\.sparse_coo"):
        net(X.to_sparse())
    with pytest.raises(cs.PlanMismatchError, match="negated"):
        net(torch.complex(X, X).conj().imag)
    net = cs.checkpointed(model, cs.plan(model, X.as_subclass(Named), budget="100%"))
    with pytest.raises(cs.PlanMismatchError, match="found one tensor"):
        net(X)
    assert type(net(X.as_subclass(Named))) is type(model(X.as_subclass(Named)))


def test_odeint_follows_or_refuses_the_same() -> None:
    f, times = nn.Linear(4, 4), torch.linspace(0.0, 1.0, 4)
    for method in ("rk4", "bosh3"):
        with pytest.raises(cs.CkptschedError, match="a Bare, which wraps"):
            cs.odeint(_Timed(f), Bare(X), times, method=method, budget=2**20)
        with pytest.raises(cs.CkptschedError, match=r"layout torch\.sparse_coo"):
            cs.odeint(_Timed(f), X.to_sparse(), times, method=method, budget=2**20)


class _Timed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.inner(y))


def test_a_loss_that_the_output_does_not_fit_is_said() -> None:
    model = nn.Sequential(Layer(), Narrowed())
    with pytest.raises(cs.ProfileError, match=r"the default loss failed.*give profile a loss"):
        cs.profile(model, X.clone())


class Narrowed(nn.Module):
    """Gives a dtype that no softmax takes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn)


def test_nested_tensors_are_refused_as_states_and_left_alone_inside() -> None:
    model = nn.Sequential(Layer(), Layer())
    loss = lambda y: y.values().square().mean()  # noqa: E731
    with pytest.raises(cs.ProfileError, match=r"the sample is a nested tensor.*values\(\)"):
        cs.profile(model, tensor_kinds.KINDS["jagged"](X.clone()), loss=loss)

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor) -> Tensor:
            nested = torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 2, len(x)]))
            return self.layer(nested).values()

    inner = nn.Sequential(Inside(), Inside())
    expected = torch.autograd.grad(inner(X).square().mean(), list(inner.parameters()))
    planned = cs.fit(inner, X, budget="100%")
    found = torch.autograd.grad(planned(X).square().mean(), list(inner.parameters()))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.float64, 0), (torch.float32, 0), (torch.float16, 4), (torch.bfloat16, 4)],
)
def test_results_may_differ_by_a_few_of_the_last_bits(dtype: torch.dtype, bits: int) -> None:
    """Where kernels add up in another order; a bit of bfloat16 is more than 1e-3."""
    tolerance = tolerance_of(dtype)
    assert tolerance >= bits * torch.finfo(dtype).eps
    assert tolerance <= max(1e-3, 4 * torch.finfo(dtype).eps)
    one = torch.ones(4, dtype=dtype)
    other = one * (1 + torch.finfo(dtype).eps)
    assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)
    assert tolerance_of(torch.int64) == 0.0


def test_tags_are_refused_where_states_would_lose_them() -> None:
    model = nn.Sequential(Layer(), Layer())
    with pytest.raises(cs.ProfileError, match=r"a Tagged with attributes that detach\(\) loses"):
        cs.profile(model, KINDS["tagged"](X.clone()))
