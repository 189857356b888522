"""Random small networks whose stages pass on whatever stages may pass on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import ckptsched as cs

WIDTH, LENGTH = 4, 6
SHAPE = (3, WIDTH, LENGTH)


def parts(state: Any) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The tensor that is worked on, what is kept for later, and what passes through."""
    return (state, (), {}) if isinstance(state, Tensor) else state


def whole(x: Tensor, kept: tuple[Any, ...], through: dict[str, Any]) -> Any:
    """A state of these: a tensor alone where there is nothing else."""
    return (x, kept, through) if kept or through else x


class Work(nn.Module):
    """Runs a module on the tensor that is worked on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, state: Any, **given: Any) -> Any:
        x, kept, through = parts(state)
        return whole(self.module(x), kept, through)


class Keep(nn.Module):
    """Keeps something of x for a later stage."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, state: Any, **given: Any) -> Any:
        x, kept, through = parts(state)
        made = {
            "itself": lambda: x,
            "a view": lambda: x[:, : WIDTH // 2],
            "new": lambda: torch.sin(x),
            "detached": lambda: x.detach() + 1,
            "a dict": lambda: {"sum": x.sum(), "none": None, "list": [x * 2, "text"]},
        }[self.how]()
        return whole(x, (*kept, made), through)


class Use(nn.Module):
    """Adds what was kept last, if anything."""

    def __init__(self, drop: bool) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, state: Any, **given: Any) -> Any:
        x, kept, through = parts(state)
        if not kept:
            return whole(torch.tanh(x), kept, through)
        last = kept[-1]
        if isinstance(last, dict):
            x = x + last["list"][0] * last["sum"]
        else:
            x = torch.cat([x[:, : last.shape[1]] * last, x[:, last.shape[1] :]], dim=1)
        return whole(x, kept[:-1] if self.drop else kept, through)


class Note(nn.Module):
    """Adds integers and a number that pass through to the end."""

    def forward(self, state: Any, **given: Any) -> Any:
        x, kept, through = parts(state)
        return whole(x * 1.5, kept, {**through, "best": x.argmax(dim=1), "number": 3})


class Condition(nn.Module):
    """Uses what every stage is given, once or twice."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.inner, self.times = nn.Linear(LENGTH, LENGTH), times

    def forward(
        self, state: Any, *, condition: Tensor | None = None, mask: Tensor | None = None
    ) -> Any:
        x, kept, through = parts(state)
        for _ in range(self.times if condition is not None else 0):
            x = x + self.inner(condition)
        return whole(x if mask is None else x * mask, kept, through)


class Counting(nn.Module):
    """Counts its runs in a buffer, and reads it."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.count = self.count + 1
        else:
            self.count += 1
        return x * (1 + self.count / 10)


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, generator=self.generator)


class Plain(nn.Module):
    """Drops what every stage is given, for modules that do not take it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, state: Any, **given: Any) -> Any:
        return self.inner(state)


class Staged(cs.StagedModule):
    """Stages that take keyword arguments."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def stages(self) -> list[cs.StageCall]:
        return [cs.ModuleStage(part) for part in self.parts]


def twice(module: nn.Module) -> nn.Module:
    """A module that is run twice in one stage."""
    return nn.Sequential(module, nn.Tanh(), module)


WORK: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(LENGTH, LENGTH),
    "twice": lambda: twice(nn.Linear(LENGTH, LENGTH)),
    "conv": lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer norm": lambda: nn.LayerNorm(LENGTH),
    "dropout": lambda: nn.Dropout(0.3),
    "relu": nn.ReLU,
    "in place": lambda: nn.Sequential(nn.Linear(LENGTH, LENGTH), nn.SiLU(inplace=True)),
    "same": nn.Identity,
    "spectral norm": lambda: spectral_norm(nn.Linear(LENGTH, LENGTH)),
    "counting": lambda: Counting(replaces=False),
    "counting anew": lambda: Counting(replaces=True),
    "drawing": Drawing,
    "ode": lambda: cs.ODEBlock(nn.Linear(LENGTH, LENGTH), "heun", 2),
    "hidden ode": lambda: cs.ODEBlock(
        nn.Sequential(spectral_norm(nn.Linear(LENGTH, LENGTH)), Drawing()), "heun", 2
    ),
}
OTHER: dict[str, Callable[[], nn.Module]] = {
    **{f"keep {how}": lambda how=how: Keep(how) for how in ("itself", "a view", "new")},
    **{f"keep {how}": lambda how=how: Keep(how) for how in ("detached", "a dict")},
    "use": lambda: Use(drop=False),
    "use and drop": lambda: Use(drop=True),
    "note": Note,
    "condition": lambda: Condition(1),
    "condition twice": lambda: Condition(2),
}
NAMES = [*WORK, *OTHER, "shared"]


@st.composite
def modules(draw: st.DrawFn, most: int = 7) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A network, a batch, and keyword arguments for all stages."""
    torch.manual_seed(draw(st.integers(0, 99)))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=most))
    shared = nn.Linear(LENGTH, LENGTH)
    staged = draw(st.booleans())
    layers: list[nn.Module] = []
    for name in [*names, "linear"]:
        if name == "shared":
            layers.append(Work(shared))
        else:
            layers.append(Work(WORK[name]()) if name in WORK else OTHER[name]())
    model = Staged(layers) if staged else nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 5)) > 0)
    layers[-1].module.weight.requires_grad_()
    x = torch.randn(SHAPE, requires_grad=draw(st.booleans()))
    given: dict[str, Any] = {}
    if staged and draw(st.booleans()):
        given["condition"] = torch.randn(LENGTH, requires_grad=draw(st.booleans()))
        given["mask"] = torch.rand(SHAPE[1:]) > 0.2
    return model.train(draw(st.integers(0, 4)) > 0), x, given
