"""Calls that say the same follow one plan, in whatever way their arguments are given."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.fitting.arguments import ArgumentNames, Extent
from tests.fitting.test_in_place import gradients, ids, peak, same


class Asked(nn.Module):
    """A small language model with a mask that may be left out."""

    def __init__(self, layers: int = 4, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])
        self.head = nn.Linear(width, 50)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        scale: float = 1.0,
        **more: Any,
    ) -> dict[str, Tensor]:
        h = self.words(x)
        for layer in self.layers:
            h = h + torch.tanh(layer(h)) * scale
        if mask is not None:
            h = h * mask[..., None]
        logits = self.head(h)
        assert labels is not None
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


@pytest.fixture
def nets(caplog: pytest.LogCaptureFixture) -> tuple[Asked, Asked]:
    """A model to be fitted, and its twin by plain autograd."""
    caplog.set_level(logging.INFO, "ckptsched")
    torch.manual_seed(0)
    plain = Asked()
    return copy.deepcopy(plain), plain


X, LABELS, MASK = ids(4, 16), ids(4, 16, seed=1), torch.ones(4, 16)
WAYS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by position": ((X, None, LABELS), {}),
    "by name": ((), {"x": X, "labels": LABELS}),
    "in another order": ((), {"labels": LABELS, "x": X}),
    "both": ((X,), {"labels": LABELS}),
    "defaults given": ((X, None), {"labels": LABELS, "scale": 1.0}),
}


@pytest.mark.parametrize("first", ["by position", "in another order", "defaults given"])
def test_by_position_by_name_and_with_defaults_is_one_plan(
    nets: tuple[Asked, Asked], caplog: pytest.LogCaptureFixture, first: str
) -> None:
    model, plain = nets
    args, kwargs = WAYS[first]
    cs.fit(model, *args, kwargs=kwargs, budget="80%")
    for args, kwargs in WAYS.values():
        assert same(gradients(model, *args, **kwargs), gradients(plain, *args, **kwargs))
    assert not caplog.records
    if first == "by position":
        args, kwargs = WAYS[first]
        assert cs.verify(model, cs.plan_of(model), *args, kwargs=kwargs).ok


def test_what_says_more_is_another_kind(
    nets: tuple[Asked, Asked], caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = nets
    cs.fit(model, X, kwargs={"labels": LABELS}, budget="80%")
    for more in ({"mask": MASK}, {"scale": 2.0}, {"scale": 1}, {"other": None}, {"mask": MASK}):
        given = {"labels": LABELS, **more}
        assert same(gradients(model, X, **given), gradients(plain, X, **given))
    assert len(caplog.records) == 4


@pytest.mark.parametrize("first", ["one tensor", "two"])
def test_labels_that_are_the_batch_itself_or_a_copy(
    nets: tuple[Asked, Asked], caplog: pytest.LogCaptureFixture, first: str
) -> None:
    model, plain = nets
    cs.fit(model, X, kwargs={"labels": X if first == "one tensor" else X.clone()}, budget="80%")
    budget = cs.plan_of(model).budget_bytes
    for labels in (X, X.clone(), X.view(4, 16), X, X[:, :]):
        assert same(gradients(model, X, labels=labels), gradients(plain, X, labels=labels))
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "same schedule" in caplog.text
    for x in (X[:2], X[:, :9].contiguous()):
        assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))
        assert peak(model, x) <= budget
    assert {r.levelname for r in caplog.records} == {"INFO"}


def test_batches_of_other_kinds_of_dictionaries(
    nets: tuple[Asked, Asked], caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = nets
    batch = UserDict({"x": X, "labels": LABELS})
    cs.fit(model, kwargs=batch, budget="80%")
    for given in (batch, dict(batch), UserDict({"labels": LABELS, "x": X})):
        assert same(gradients(model, **given), gradients(plain, **given))
    assert not caplog.records


def test_names_of_arguments() -> None:
    def forward(a: Any, b: Any = None, *, c: Any = 1, **more: Any) -> None: ...

    names = ArgumentNames(forward)
    one, two = names.call((5, None), {"d": 3}), names.call((), {"c": 1, "d": 3, "a": 5})
    assert one.kind() == two.kind()
    assert one.kind().names == ("a", "d")
    assert one.put_into(two.form) == ((), {"c": 1, "d": 3, "a": 5})
    assert two.put_into(one.form) == ((5, None), {"d": 3})
    assert names.call((5,), {"b": 2, "d": 3}).put_into(names.call((5,), {"d": 3}).form) is None
    assert names.call((5,), {"c": True}).kind().names == ("a", "c")  # equal, and another type
    for args, kwargs in (((1, 2, 3), {}), ((1,), {"a": 1})):
        wrong = names.call(args, kwargs)  # for the forward to refuse
        assert wrong.form is None
        assert wrong.put_into(None) == (args, kwargs)
        assert wrong.put_into(one.form) is None

    def alone(a: Any, /, b: Any = None) -> None: ...

    assert ArgumentNames(alone).call((1, 2), {}).form is None
    assert ArgumentNames(dict.pop).call((1,), {}).form is None


def test_extents() -> None:
    x, y = torch.ones(3, 4), torch.ones(3, 4)
    whole = Extent.of(((x,), {"labels": x}))
    assert whole.covers(Extent.of(((x,), {"labels": y})))
    assert Extent.of(((x,), {"labels": y})).covers(whole)
    assert whole.covers(Extent.of(((x[:2],), {"labels": y[:2, :1]})))
    asks = torch.ones(3, 4, requires_grad=True)
    for other in (
        ((x,), {}),
        ((x,), {"label": x}),
        ((torch.ones(4, 4),), {"labels": x}),
        ((x,), {"labels": torch.ones(3, 4, 1)}),
        ((x,), {"labels": x.long()}),
        ((x,), {"labels": asks}),
    ):
        assert not whole.covers(Extent.of(other))
    # Of one that asks for a gradient, which is one sum, two are another call.
    both = Extent.of(((asks,), {"labels": asks}))
    assert not both.covers(Extent.of(((asks,), {"labels": asks.detach().requires_grad_()})))


def _lenient(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As decorators of libraries do: it shows the signature of what it wraps, and takes more."""

    @functools.wraps(forward)
    def call(*args: Any, note: object = None, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return call


class Counted(nn.Module):
    """Layers behind a norm, which counts the forwards that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Lenient(Counted):
    forward = _lenient(Counted.forward)


class Told(Lenient):
    """Its forward says by itself what it takes, and says too little."""

    forward = _lenient(Counted.forward)
    forward.__signature__ = inspect.signature(Counted.forward)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Lenient, Told])
def test_a_forward_that_takes_more_than_it_says_runs_once(kind: type[Counted]) -> None:
    plain, x = kind(), torch.randn(32, 8)
    model = cs.fit(copy.deepcopy(plain), x, kwargs={"note": 1}, budget="100%")
    assert model.norm.num_batches_tracked == 0
    for kwargs in ({"note": 1}, {}, {"note": 2}):
        for m in (plain, model):
            m(x, **kwargs).square().sum().backward()
        assert model.norm.num_batches_tracked == plain.norm.num_batches_tracked
        assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((1,), {"x": 1}, "multiple values for argument 'x'"),
        ((1,), {"other": 1}, "unexpected keyword argument 'other'"),
        ((), {"other": 1}, "unexpected keyword argument 'other'|missing 1 required"),
    ],
)
def test_arguments_that_there_are_not_are_refused_as_by_python(
    fitted: bool, args: tuple[int, ...], kwargs: dict[str, int], says: str
) -> None:
    x, model = torch.randn(32, 8), Counted()
    given, named = tuple(x for _ in args), dict.fromkeys(kwargs, x)
    call: Callable[..., Any] = model
    if fitted:
        cs.fit(model, x, budget="100%")
    else:
        call = functools.partial(cs.fit, model, budget="100%", kwargs=named)
    with pytest.raises(TypeError, match=says):
        call(*given, **(named if fitted else {}))
    assert model.norm.num_batches_tracked == 0


def test_a_batch_like_a_dictionary_may_be_given_by_position() -> None:
    class Reading(Counted):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch["x"])

    plain, x = Reading(), torch.randn(32, 8)
    model = cs.fit(copy.deepcopy(plain), UserDict(x=x), budget="100%")
    assert len(cs.plan_of(model).chain) > 1
    for m in (plain, model):
        m(UserDict(x=x)).square().sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_an_argument_that_holds_itself_is_refused_by_what_it_is() -> None:
    loop: list[Any] = [torch.randn(2)]
    loop.append(loop)
    with pytest.raises(cs.CkptschedError, match="a container that holds itself"):
        cs.fit(Asked(), ids(2, 4), kwargs={"more": loop}, budget="100%")
