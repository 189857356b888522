"""Modules that do in their forward what a recording must follow, call whole, or refuse."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, ROWS = 8, 4
OUTSIDE: list[Tensor] = []
FROZEN = torch.linspace(1, 2, WIDTH)
TRAINED = torch.ones(WIDTH, requires_grad=True)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Two(nn.Module):
    """Two linear layers, for others to do something between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.count = 0
        self.seen: list[Tensor] = []


class Cube(torch.autograd.Function):
    """A gradient that is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5 * ctx.saved_tensors[0]


class CustomFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Cube.apply(self.a(x)))


class NoGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.no_grad():
            mean = y.mean(0, keepdim=True)
        return self.b(y - mean)


class Autocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
        return self.b(y.float())


class InPlace(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += 1
        y[:, 0] = 0
        z = torch.zeros(ROWS, WIDTH)
        z.copy_(y.mul_(2))
        return self.b(z.relu_())


class TensorHook(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.register_hook(lambda grad: grad * 2)
        return self.b(y)


class KeepsTensor(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.last = y
        return self.b(y)


class UsesAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = KeepsTensor()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.last.square().mean()


class Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Box:
        return Box(self.a(x))


class Unboxes(Boxes):
    def forward(self, box: Any) -> Tensor:  # type: ignore[override]
        return self.a(box.tensor)


class ObjectBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.unboxes = Boxes(), Unboxes()

    def forward(self, x: Tensor) -> Tensor:
        return self.unboxes(self.boxes(x))


class BufferInPlace(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return self.b(y - self.mean)


class Draws(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.3) + 0.1 * torch.randn(ROWS, WIDTH))


class GlobalTensor(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * FROZEN)


class OwnParameters(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.more = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH))])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale @ self.more[0])


class Tied(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.b(self.a(x)), self.b.weight)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.a = nn.LSTM(WIDTH, WIDTH, batch_first=True), linear()

    def forward(self, x: Tensor) -> Tensor:
        y, (h, _) = self.lstm(x[:, None])
        return self.a(y[:, 0] + h[0])


class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        def both(z: Tensor) -> Tensor:
            return self.b(self.a(z).relu())

        return torch.utils.checkpoint.checkpoint(both, x, use_reentrant=False)  # type: ignore[no-any-return]


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(linear())
        self.b = nn.utils.parametrizations.spectral_norm(linear())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Structures(Two):
    def forward(self, x: Tensor) -> Any:
        found = {"hidden": self.a(x)}
        found["hidden"] = found["hidden"] + 1
        first, second = found["hidden"].chunk(2, 1)
        return {"out": self.b(torch.cat([second, first.tanh()], 1)), "all": (first, [second])}


class Experts(nn.Module):
    """Sizes hang on data, and nothing looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList([linear(), linear()])

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        chosen, out = share.argmax(-1), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]) * share[rows, k : k + 1])
        return out


class Constants(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + torch.tensor([1.0] * WIDTH) + x.new_tensor([2.0]))


class CallsForward(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b.forward(self.a.forward(x))


class BranchOnData(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else self.a(x)


class StepsOfData(Two):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum().clamp(2, 3))):
            x = self.a(x).tanh()
        return self.b(x)


class SizesOfData(Two):
    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0] > 0).nonzero()[:, 0]
        return self.b(self.a(x[rows])) / max(1, rows.numel())


class Indexed(Two):
    """Indices that are numbers make no sizes of data, whatever torch says of the operator."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)[x.argmax(0)]
        return self.b(y) / len(y)


class SetsItselfUp(Two):
    """Notes in its first forward what it is used for, and hands on as it did."""

    kind: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind is None:
            self.kind = "floating" if x.is_floating_point() else "whole"
            self.seen = []
        return self.b(self.a(x)) if self.kind == "floating" else x


class StateInTuple(Two):
    """Goes on from where the call before has left off."""

    def __init__(self) -> None:
        super().__init__()
        self.state = (torch.zeros(ROWS, WIDTH), 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.state[0]
        self.state = (y.detach(), 1)
        return self.b(y)


class FreshList(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.losses = []
        y = self.a(x)
        self.losses.append(y.square().mean())
        return self.b(y)


class TensorInObject(Two):
    def __init__(self) -> None:
        super().__init__()
        self.box = Box(torch.zeros(ROWS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.box.tensor
        self.box.tensor = y.detach()
        return self.b(y)


class TableOnce(Two):
    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(float(WIDTH))
        return self.b(self.a(x) + self.table)


KEEPING = (StateInTuple, FreshList, TensorInObject, TableOnce)
"""What they keep from one call to the next is followed."""

STRAIGHT = (
    *(CustomFunction, NoGrad, Autocast, InPlace, TensorHook, KeepsTensor, UsesAuxiliary),
    *(ObjectBetween, BufferInPlace, Draws, GlobalTensor, OwnParameters, Tied, Recurrent),
    *(Checkpointed, Parametrized, Structures, Experts, Constants, CallsForward),
    Indexed,
)
"""A recording follows them on any batch of the same shape."""

GUARDED = (BranchOnData, StepsOfData, SizesOfData)
"""A recording follows them on batches that go the same way, and knows which do."""


class ReadsValue(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) * y.mean().item()


class BranchOnActivation(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.no_grad():
            positive = bool(y.mean() > 0)
        return self.b(y if positive else -y)


class Counts(Two):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.b(self.a(x))


class CountsInDict(Two):
    def __init__(self) -> None:
        super().__init__()
        self.counts = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.counts["calls"] += 1
        return self.b(self.a(x))


class PythonDraws(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if random.random() < 0.5 else self.a(x)


class NumpyDraws(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + torch.as_tensor(np.random.randn(WIDTH).astype("float32")))


class Differentiates(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.a(x).square().sum()
        return self.b(torch.autograd.grad(energy, x, create_graph=True)[0])


class AppendsToList(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.seen.append(y)
        return self.b(y)


class AppendsOutside(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        OUTSIDE[:] = [y]
        return self.b(y)


class HookOverTensor(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        weight = y.detach()
        y.register_hook(lambda grad: grad * weight)
        return self.b(y)


class TrainedGlobal(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * TRAINED)


class OtherWeights(Two):
    def forward(self, x: Tensor) -> Tensor:
        others = {"weight": self.b.weight, "bias": self.b.bias}
        return torch.func.functional_call(self.a, others, (x,))  # type: ignore[no-any-return]


class Vmapped(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.func.vmap(self.a)(x))  # type: ignore[no-any-return]


class AsksForSizes(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        rows = (y[:, 0] > 0).nonzero()[:, 0]
        if rows.numel() == 0:
            return self.b(y)
        return self.b(y.index_add(0, rows, self.a(x[rows])))


class ChangesSettings(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).view(1, 1, ROWS, WIDTH)
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(y, y, y)
        return self.b(y.view(ROWS, WIDTH))


class OtherThread(Two):
    def forward(self, x: Tensor) -> Tensor:
        y, found = self.a(x), []
        thread = threading.Thread(target=lambda: found.append(y.detach() * 2))
        thread.start()
        thread.join()
        return self.b(y + found[0])


class ReentrantCheckpoint(Two):
    def forward(self, x: Tensor) -> Tensor:
        def both(z: Tensor) -> Tensor:
            return self.b(self.a(z).relu())

        return torch.utils.checkpoint.checkpoint(both, x * 1.0, use_reentrant=True)  # type: ignore[no-any-return]


class StopsWhenClose(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(20):
                following = torch.tanh(self.a(x))
                if (following - x).norm() < 1e-2:
                    break
                x = following
        return self.b(torch.tanh(self.a(x)))


class Seeds(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.random.fork_rng(devices=[]):
            y = F.dropout(y, 0.5)
        return self.b(y) + torch.rand(WIDTH)


class TakesHookOff(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 3).remove()
        return self.b(y)


class ReadsGraph(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.grad_fn is not None:
            y.grad_fn.register_hook(lambda found, given: tuple(g * 3 for g in found))
        return self.b(y.tanh())


class HooksWhatIsSaved(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 2, lambda t: t):
            return self.b(y.tanh())


class Doubles(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * 2 if func is torch.ops.aten.tanh.default else found


class EntersMode(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        with Doubles():
            y = torch.tanh(y)
        return self.b(y)


WHOLE = (
    *(
        ReadsValue,
        BranchOnActivation,
        Counts,
        CountsInDict,
        PythonDraws,
        NumpyDraws,
        Differentiates,
    ),
    *(AppendsToList, AppendsOutside, HookOverTensor, TrainedGlobal, OtherWeights, Vmapped),
    *(Seeds, TakesHookOff, ReadsGraph, HooksWhatIsSaved, EntersMode),
    *(AsksForSizes, ChangesSettings, OtherThread, ReentrantCheckpoint, StopsWhenClose),
)
"""A recording calls them whole, and refuses them where there is nothing around them."""


class Within(nn.Module):
    """A module between two layers."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.before, self.inner, self.after = linear(), kind(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))  # type: ignore[no-any-return]
