"""Networks whose stages leave tensors by another way than their output."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import ckptsched as cs

WIDTH, BATCH = 16, 64


Step = Callable[[nn.Module], Tensor]


X = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(3))


class Layer(nn.Module):
    """A layer that leaves what `leave` makes of its input and what its parts make of that."""

    def __init__(self, leave: Callable[[Any, Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.inner, self.leave = nn.Linear(WIDTH, WIDTH), leave

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.leave is not None:
            self.leave(self, x, y)
        return torch.tanh(y)


@dataclass
class Notes:
    """A dataclass with a tensor, and a history."""

    aux: Any = None
    history: deque[Tensor] = field(default_factory=lambda: deque(maxlen=3))


def chain_of(leave: Callable[[Any, Tensor, Tensor], Any], n: int = 4) -> nn.Sequential:
    return nn.Sequential(*[Layer(leave) for _ in range(n)])


def all_aux(model: nn.Module, name: str = "aux") -> Tensor:
    found = [getattr(m, name) for m in model.modules() if getattr(m, name, None) is not None]
    return torch.stack([t.square().mean() for t in found]).sum()


def set_aux(make: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], None]:
    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.aux = make(layer, x, y)

    return leave


ATTRIBUTES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a number": lambda s, x, y: y.square().mean(),
    "a feature": lambda s, x, y: y,
    "a view": lambda s, x, y: y[1:, ::2],
    "of the input alone": lambda s, x, y: x.exp().mean(),
    "the input": lambda s, x, y: x,
    "of weights alone": lambda s, x, y: s.inner.weight.norm(),
    "of both, in double": lambda s, x, y: (y.double() @ s.inner.weight.double()).sum(),
    "changed in place": lambda s, x, y: y.sin().mul_(2),
    "saved by the tape": lambda s, x, y: y.exp(),
}


def attribute(make: Callable[[Any, Tensor, Tensor], Tensor]) -> tuple[nn.Module, Step]:
    model = chain_of(set_aux(make))
    return model, lambda run: run(X).square().mean() + all_aux(model)


def in_some_draws(
    make: Callable[[Any, Tensor, Tensor], Tensor], *, odds: float = 0.5
) -> tuple[nn.Module, Step]:
    """An auxiliary loss where a draw has it so; none, one or two of them in a list."""

    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.losses = [make(layer, x, y) * k for k in (1, 2) if torch.rand(()) < odds]

    model = chain_of(leave)

    def step(run: nn.Module) -> Tensor:
        total = run(X).square().mean()
        for layer in model.children():
            for loss in layer.losses:  # type: ignore[union-attr]
                total = total + loss.square().mean()
        return total

    return model, step


def in_a_list_of_everybodys_in_some_draws() -> tuple[nn.Module, Step]:
    losses: list[Tensor] = []

    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        if torch.rand(()) < 0.5:
            losses.append(y.square().mean())

    model = chain_of(leave)

    def step(run: nn.Module) -> Tensor:
        losses.clear()
        return run(X).square().mean() + sum(losses[:])

    return model, step


def where_data_have_it_so() -> tuple[nn.Module, Step]:
    """Batches other than the sample have other layers leave a feature."""

    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.aux = y.exp() if y.sum() > 0 else None

    model, seen = chain_of(leave), [0]

    def step(run: nn.Module) -> Tensor:
        seen[0] += 1
        total = run(X * (-1) ** seen[0] * seen[0]).square().mean()
        for layer in model.children():
            if layer.aux is not None:
                total = total + layer.aux.square().mean()  # type: ignore[operator,union-attr]
        return total

    return model, step


def in_a_list() -> tuple[nn.Module, Step]:
    losses: list[Tensor] = []
    model = chain_of(lambda s, x, y: losses.append(y.square().mean()))

    def step(run: nn.Module) -> Tensor:
        losses.clear()
        return run(X).mean() + torch.stack(losses).sum()

    return model, step


def in_a_dict() -> tuple[nn.Module, Step]:
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def take(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output

        return take

    model = chain_of(lambda s, x, y: None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook(name))

    def step(run: nn.Module) -> Tensor:
        y = run(X).square().mean()
        return y + torch.stack([t.abs().mean() for t in seen.values()]).sum()

    return model, step


def of_outputs() -> tuple[nn.Module, Step]:
    """Hooks on the stages take their outputs, the model's own included."""
    seen: list[Tensor] = []
    model = chain_of(lambda s, x, y: None)
    for module in model:
        module.register_forward_hook(lambda module, args, output: seen.append(output))

    def step(run: nn.Module) -> Tensor:
        seen.clear()
        y = run(X).square().mean()
        return y + torch.stack([t.abs().mean() for t in seen]).sum()

    return model, step


def of_inner_outputs() -> tuple[nn.Module, Step]:
    """Hooks take what the next layer saves, in blocks of layers that may share a tape."""
    seen: dict[int, Tensor] = {}
    blocks = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(4)
    ]
    for k in (0, 2):
        blocks[k][1].register_forward_hook(lambda m, args, y, k=k: seen.__setitem__(k, y))

    def step(run: nn.Module) -> Tensor:
        return run(X).square().mean() + torch.stack([y.abs().mean() for y in seen.values()]).sum()

    return nn.Sequential(*blocks), step


class Checkpointing(nn.Module):
    """Runs a part of itself by torch's checkpoint, whose backward sets the attribute again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def part(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        self.aux = y.square().mean()
        return self.b(y)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)


def in_torchs_checkpoint() -> tuple[nn.Module, Step]:
    model = nn.Sequential(*[Checkpointing() for _ in range(3)])
    return model, lambda run: run(X).square().mean() + all_aux(model)


def in_a_dataclass() -> tuple[nn.Module, Step]:
    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.notes.aux = y.square().mean()
        layer.notes.history.append(y.detach().mean())

    model = chain_of(leave)
    for layer in model:
        layer.notes = Notes()

    def step(run: nn.Module) -> Tensor:
        return run(X).mean() + sum(layer.notes.aux for layer in model)

    return model, step


def unused() -> tuple[nn.Module, Step]:
    model = chain_of(set_aux(lambda s, x, y: y.square()))
    return model, lambda run: run(X).square().mean()


def alone() -> tuple[nn.Module, Step]:
    """The loss is of one layer's feature only: later layers get no gradient."""
    model = chain_of(set_aux(lambda s, x, y: y.square().mean()))

    def step(run: nn.Module) -> Tensor:
        run(X)
        return model[2].aux * 3

    return model, step


def a_head_of_its_own() -> tuple[nn.Module, Step]:
    """Parameters that only the auxiliary loss uses, as those of a router."""
    model = chain_of(set_aux(lambda s, x, y: s.head(x).softmax(-1).square().mean()))
    for layer in model:
        layer.head = nn.Linear(WIDTH, 4)
    return model, lambda run: run(X).square().mean() + all_aux(model)


def frozen_start() -> tuple[nn.Module, Step]:
    model = chain_of(set_aux(lambda s, x, y: y.square().mean()))
    for layer in list(model)[:2]:
        layer.requires_grad_(False)
    return model, lambda run: run(X).square().mean() + all_aux(model)


def one_module_twice() -> tuple[nn.Module, Step]:
    layer = Layer(set_aux(lambda s, x, y: y.square().mean()))
    model = nn.Sequential(Layer(), layer, Layer(), layer, Layer())
    return model, lambda run: run(X).square().mean() + layer.aux


def ode(leave: Callable[[Any, Tensor, Tensor], Any]) -> nn.Sequential:
    return nn.Sequential(Layer(), cs.ODEBlock(Layer(leave), "heun", 6), Layer())


def in_an_ode() -> tuple[nn.Module, Step]:
    model = ode(set_aux(lambda s, x, y: y.square().mean()))
    return model, lambda run: run(X).square().mean() + all_aux(model)


def listed_in_an_ode() -> tuple[nn.Module, Step]:
    found: list[Tensor] = []
    model = ode(lambda s, x, y: found.append(y.square().mean()))

    def step(run: nn.Module) -> Tensor:
        found.clear()
        y = run(X)
        return y.square().mean() + torch.stack(found).mean()

    return model, step


def with_dropout() -> tuple[nn.Module, Step]:
    model = chain_of(set_aux(lambda s, x, y: nn.functional.dropout(y, 0.3).square().mean()))
    return model, lambda run: run(X).square().mean() + all_aux(model)


class Exp(torch.autograd.Function):
    """Keeps its output on ctx, which makes a cycle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = y = x.exp()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.y


class Saved(torch.autograd.Function):
    """Keeps its output as it should."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0]


class Own(nn.Module):
    """A layer with a Function of its own, whose result may be left or read."""

    def __init__(self, function: Any, *, leaves: bool = False) -> None:
        super().__init__()
        self.inner, self.function, self.leaves = nn.Linear(WIDTH, WIDTH), function, leaves

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        z = self.function.apply(-y.square())
        if self.leaves:
            self.aux = self.function.apply(y)
        return torch.as_tensor(z)


def of_own_functions() -> tuple[nn.Module, Step]:
    model = nn.Sequential(Layer(), *[Own(Saved, leaves=True) for _ in range(3)], Layer())
    return model, lambda run: run(X).square().mean() + all_aux(model)


def of_a_function_with_a_cycle() -> tuple[nn.Module, Step]:
    """The feature is held by the Function that made it, too."""
    model = chain_of(set_aux(lambda s, x, y: Exp.apply(y)))
    return model, lambda run: run(X).square().mean() + all_aux(model)


def with_hooks_on_features() -> tuple[nn.Module, Step]:
    """A hook of the feature changes its gradient."""

    def leave(layer: Any, x: Tensor, y: Tensor) -> None:
        layer.aux = y
        if y.requires_grad:
            y.register_hook(lambda g: g * 2)

    model = chain_of(leave)
    return model, lambda run: run(X).square().mean() + all_aux(model)


PROGRAMS: dict[str, Callable[[], tuple[nn.Module, Step]]] = {
    **{
        f"attribute: {name}": lambda make=make: attribute(make) for name, make in ATTRIBUTES.items()
    },
    "some draws": lambda: in_some_draws(lambda s, x, y: y.square().mean()),
    "rare draws": lambda: in_some_draws(lambda s, x, y: y.sin(), odds=0.1),
    "most draws": lambda: in_some_draws(lambda s, x, y: y, odds=0.9),
    "some draws, one list": in_a_list_of_everybodys_in_some_draws,
    "data": where_data_have_it_so,
    "list": in_a_list,
    "dict of a hook": in_a_dict,
    "outputs": of_outputs,
    "inner outputs": of_inner_outputs,
    "dataclass": in_a_dataclass,
    "torch's checkpoint": in_torchs_checkpoint,
    "unused": unused,
    "alone": alone,
    "head": a_head_of_its_own,
    "frozen": frozen_start,
    "twice": one_module_twice,
    "ode": in_an_ode,
    "ode, list": listed_in_an_ode,
    "dropout": with_dropout,
    "hooks": with_hooks_on_features,
    "own function": of_own_functions,
    "own function with a cycle": of_a_function_with_a_cycle,
}


def fresh(name: str) -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    return PROGRAMS[name]()


def plans(model: nn.Module) -> Iterator[cs.Plan]:
    chain = cs.profile(model, X)
    top = cs.plan(chain, budget=10**12)
    for share in (0.0, 0.4, 1.0):
        least = top.least_budget_bytes
        yield cs.plan(chain, budget=int(least + share * max(0, top.peak_bytes - least)))


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def run_steps(model: nn.Module, run: nn.Module, step: Step, n: int = 2) -> list[Any]:
    found: list[Any] = []
    torch.manual_seed(5)
    for _ in range(n):
        model.zero_grad()
        loss = step(run)
        loss.backward()
        found += [loss.detach(), *gradients(model), torch.get_rng_state()]
    return found


def equal(one: Any, other: Any) -> bool:
    return (one is other) if one is None or other is None else torch.equal(one, other)


def planned(model: nn.Module, share: float = 0.0) -> nn.Module:
    chain = cs.profile(copy.deepcopy(model), X)
    top = cs.plan(chain, budget=10**12)
    least = top.least_budget_bytes
    budget = int(least + share * max(0, top.peak_bytes - least))
    return cs.checkpointed(model, cs.plan(chain, budget=budget))
