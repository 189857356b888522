"""What may be around a forward pass, and modules that depend on it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Around = Callable[[], AbstractContextManager[Any]]

CPU = torch.device("cpu")
SOLVERS = ("store_all", "every_2", "every_stage", "input_only", "chain_dp")
LEVEL = contextvars.ContextVar("LEVEL", default=1.0)
FLAG = [1.0]


class Stage(nn.Module):
    """Looks at much of what may be around, and depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        here = 2.0 if torch.empty(0).device.type == "meta" else 1.0
        fine = 1.5 if torch.get_default_dtype() is torch.float64 else 1.0
        return torch.tanh(self.linear(x)) * (here * fine * LEVEL.get())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.join = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y: Tensor = x + self.join(mixed.reshape(x.shape))
        return y


class Doubling(TorchFunctionMode):
    """Changes numbers: what tanh gives is multiplied."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found * self.factor if func is torch.tanh else found


class Squashing(TorchDispatchMode):
    """The same one level down; it changes addition, so that two of them do not commute."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor, self.entered = factor, 0

    def __enter__(self) -> Squashing:
        self.entered += 1
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.tanh.default:
            return found * self.factor + 0.125
        return found


@contextlib.contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextlib.contextmanager
def level(value: float) -> Iterator[None]:
    token = LEVEL.set(value)
    try:
        yield
    finally:
        LEVEL.reset(token)


@contextlib.contextmanager
def flag(value: float) -> Iterator[None]:
    before, FLAG[0] = FLAG[0], value
    try:
        yield
    finally:
        FLAG[0] = before


def all_of(*makers: Around) -> Around:
    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for make in makers:
                stack.enter_context(make())
            yield

    return entered


def float64() -> AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64)


def deterministic() -> AbstractContextManager[None]:
    return setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    )


def medium() -> AbstractContextManager[None]:
    return setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium")


def lossy() -> AbstractContextManager[Any]:
    return saved_tensors_hooks(lambda t: t.bfloat16() if t.is_floating_point() else t, _float)


def _float(packed: Tensor) -> Tensor:
    return packed.float() if packed.dtype is torch.bfloat16 else packed


def without_mkldnn() -> AbstractContextManager[None]:
    backend: Any = torch.backends.mkldnn
    return setting(lambda: backend.enabled, lambda value: setattr(backend, "enabled", value), False)


# What just works, wherever the model was profiled.
FREE: dict[str, Around] = {
    "default device": lambda: torch.device("meta"),
    "function mode": Doubling,
    "two function modes": all_of(Doubling, lambda: Doubling(0.75)),
    "device between modes": all_of(Doubling, lambda: torch.device("meta"), lambda: Doubling(0.3)),
    "dispatch mode": Squashing,
    "two dispatch modes": all_of(Squashing, lambda: Squashing(0.8)),
    "both kinds": all_of(lambda: torch.device("meta"), Squashing, Doubling),
    "context variable": lambda: level(1.25),
}
# What changes kernels: the model must be profiled among the same.
PLANNED: dict[str, Around] = {
    "default dtype": float64,
    "attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "order of attention": lambda: sdpa_kernel(
        [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True
    ),
    "deterministic": deterministic,
    "precision": medium,
    "mkldnn": without_mkldnn,
    "all at once": all_of(float64, lambda: sdpa_kernel(SDPBackend.MATH), deterministic),
}


def chain_of(kind: type[nn.Module], n: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[kind() for _ in range(n)])


def sample(kind: type[nn.Module]) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 16) if kind is Attention else torch.randn(4, 6)


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, around: Around) -> Any:
    """Of a step whose forward alone is among something."""
    model.zero_grad()
    with around():
        y = run(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
