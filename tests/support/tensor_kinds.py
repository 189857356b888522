"""Tensors of types and layouts of all kinds; run as a program, as some could end the process.

`python -m tests.support.tensor_kinds WHERE/KIND` plans a small model in which one tensor is of a
kind, steps at several budgets beside plain autograd, and prints "equal", or "refused" and why.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.tensors.wrapper_tensors import dense_parts

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


class Bare(Tensor):
    """Wraps a tensor, and does not say so."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


class Telling(Bare):
    """Wraps a tensor, and says so."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Any:
        return Telling(inner["inner"])


class Named(Tensor):
    """Lies in a storage, as plain ones do."""

    def __deepcopy__(self, memo: Any) -> Named:  # torch's own knows no such type
        return self.detach().clone().requires_grad_(self.requires_grad)


class Tagged(Tensor):
    """Has an attribute that torch's functions lose."""


class Weight(nn.Parameter):
    """A parameter with more to it."""

    def doubled(self) -> Tensor:
        return 2 * self


def tagged(x: Tensor) -> Tensor:
    found = x.as_subclass(Tagged)
    found.tag = "kept by the caller"  # type: ignore[attr-defined]
    return found


def fake(x: Tensor) -> Tensor:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(x)


KINDS: dict[str, Any] = {
    "telling": Telling,
    "nested telling": lambda x: Telling(Telling(x)),
    "bare": Bare,
    "telling of a bare one": lambda x: Telling(Bare(x)),
    "named": lambda x: x.as_subclass(Named),
    "tagged": tagged,
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "meta": lambda x: x.to("meta"),
    "fake": fake,
    "nested": lambda x: torch.nested.nested_tensor([x, x[:3]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:3]], layout=torch.jagged),
    "expanded": lambda x: x[:1].expand_as(x),
    "empty": lambda x: x[:0],
    "conjugated": lambda x: torch.complex(x, x).conj(),
    "negated": lambda x: torch.complex(x, x).conj().imag,
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Any, *extras: Any) -> Any:
        y = torch.tanh(x.real if x.is_complex() else x) @ self.weight
        for extra in extras:
            y = y + extra
        return y


class Frozen(Layer):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.fixed = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Any, *extras: Any) -> Any:
        return super().forward(x, *extras) @ self.fixed


class Buffered(Layer):
    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", buffer)


class Making(Layer):
    """Returns a tensor of a kind."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Any, *extras: Any) -> Any:
        return self.make(super().forward(x, *extras))


class Three(cs.StagedModule):
    """A chain whose stages are all given more."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def stages(self) -> list[Any]:
        return [cs.ModuleStage(layer, f"layers.{k}") for k, layer in enumerate(self.layers)]


def program(where: str, kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model and what it is called with."""
    make = KINDS[kind]
    if where == "sample":
        return nn.Sequential(Layer(), Layer(), Layer()), (make(X.clone()),)
    if where == "sample with gradient":
        x = make(X.clone())
        return nn.Sequential(Layer(), Layer(), Layer()), (x.detach().requires_grad_(),)
    if where == "argument":
        return Three(Layer(), Layer(), Layer()), (X, make(X.clone()))
    if where == "output":
        return nn.Sequential(Layer(), Making(make), Layer(), Layer()), (X,)
    if where == "last output":
        return nn.Sequential(Layer(), Layer(), Making(make)), (X,)
    middle = Frozen(make(torch.eye(4))) if where == "parameter" else Buffered(make(torch.eye(4)))
    return nn.Sequential(Layer(), middle, Layer()), (X,)


def loss(y: Any) -> Tensor:
    """Works on all kinds."""
    return (torch.view_as_real(y.resolve_conj()) if y.is_complex() else y).square().mean()  # type: ignore[no-any-return]


def step(model: nn.Module, call: tuple[Any, ...]) -> list[Any]:
    call = tuple(x.detach().requires_grad_(x.requires_grad) for x in call)
    output = model(*call)
    loss(output).backward()  # type: ignore[no-untyped-call]
    return [output.detach(), *(p.grad for p in model.parameters()), *(x.grad for x in call)]


def measured(model: nn.Module, call: tuple[Any, ...]) -> tuple[list[Any], int]:
    """A step, and its peak in bytes."""
    found, window = default_meter("cpu").measure(lambda: step(model, call))
    return found, window.peak_bytes


def same(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    pairs = zip(dense_parts(one), dense_parts(other), strict=True)
    return type(one) is type(other) and all(torch.equal(a, b) for a, b in pairs)


def main(where: str, kind: str) -> str:
    """What comes of it."""
    torch.manual_seed(0)
    model, call = program(where, kind)
    try:
        chain = cs.profile(model, *call, loss=loss)
    except cs.ProfileError as error:
        return f"refused: {error}"
    expected = step(copy.deepcopy(model), call)
    top = cs.plan(chain, budget=2**40)
    assert top.least_budget_bytes is not None
    for budget in (top.least_budget_bytes, top.peak_bytes):
        net = cs.checkpointed(copy.deepcopy(model), cs.plan(chain, budget=budget))
        found, peak = measured(net, call)
        if not all(map(same, found, expected)):
            return f"differs at {budget} bytes"
        if peak > budget:
            return f"takes {peak} of {budget} bytes"
    return "equal"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for pair in sys.argv[1:]:
        print(pair, "->", main(*pair.split("/")), flush=True)
