"""torch.compile with a budget: one graph runs by a plan, and anything else is refused by name."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import ckptsched as cs
from ckptsched.fitting.compiler_backend import compiler_backend
from ckptsched.memory.meters import default_meter

ROOT = Path(__file__).resolve().parents[2]

# The compiler hides this warning of its own from users, but not where warnings are errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # And what that of torch 2.9 does with Functions.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Layers(nn.Module):
    """Six layers, one after the other."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(6)])

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Rich(Layers):
    """With all that a graph may change, draw, or put around calls."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        self.layers[5].weight = self.layers[0].weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("average", torch.zeros(width))
        self.register_buffer("calls", torch.zeros(()))
        self.scale = torch.full((width,), 1.5)

    def forward(self, x: Tensor) -> Any:
        self.calls = self.calls + 1
        for k, layer in enumerate(self.layers):
            with torch.autocast("cpu", torch.bfloat16, enabled=k % 2 == 1):
                y = functional.dropout(functional.gelu(layer(x)), 0.2, self.training)
            with torch.no_grad():
                self.average.mul_(0.9).add_(0.1 * y.float().mean(0))
            x = self.norm(x + y.float() * self.scale) + torch.randn_like(x) * self.average
        return {"y": x, "squares": x.square(), "rows": len(x)}


class Broken(Layers):
    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.layers[0](x))
        torch._dynamo.graph_break()
        return super().forward(x)


class BrokenInALoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Layers(), Layers()])

    def forward(self, x: Tensor) -> Any:
        for part in self.parts:
            x = part(x)
            torch._dynamo.graph_break()
        return x


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class WithFunction(Layers):
    def forward(self, x: Tensor) -> Any:
        return Tripled.apply(super().forward(x))


class InPlace(Layers):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.mul_(2))


def batch(rows: int = 256, width: int = 32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))


def compiled(model: Any, budget: object = "75%", **options: Any) -> Any:
    return torch.compile(
        model, backend=compiler_backend, fullgraph=False, options={"budget": budget, **options}
    )


def loss_of(output: Any) -> Tensor:
    leaves = list(output.values())[:2] if isinstance(output, dict) else [output]
    return torch.stack([leaf.square().mean() for leaf in leaves]).sum()


def step(owner: nn.Module, call: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """Gradients, buffers and random state after one step, and its loss."""
    owner.zero_grad()
    torch.manual_seed(2)
    loss = loss_of(call(x))
    loss.backward()
    gradients = [p.grad.clone() for p in owner.parameters() if p.grad is not None]
    buffers = [buffer.clone() for buffer in owner.buffers()]
    return [loss.detach(), *gradients, *buffers, torch.get_rng_state()]


def assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others) > 2
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# -- a graph that runs by a plan


@pytest.mark.parametrize("make", [Layers, pytest.param(Rich, marks=pytest.mark.slow)])
def test_a_step_is_that_of_plain_autograd(make: type[Layers]) -> None:
    model, plans = make(), list[cs.Plan]()
    twin = copy.deepcopy(model)
    call = compiled(model, cuts="smallest", on_plan=plans.append)
    for rows in (256, 96, 256):
        assert_same(step(model, call, batch(rows)), step(twin, twin, batch(rows)))
    assert all(plan.overhead > 0 for plan in plans)  # something runs again
    assert 2 <= len(plans) <= 3  # one for each size, of each graph


def test_the_batch_has_its_gradient() -> None:
    model, x = Layers(), batch().requires_grad_()
    twin, y = copy.deepcopy(model), batch().requires_grad_()
    loss_of(compiled(model)(x * 2)).backward()
    loss_of(twin(y * 2)).backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("budget", ["60%", "80%", "100%"])
def test_the_measured_peak_is_the_projected_one(budget: str) -> None:
    model, plans = Layers(), list[cs.Plan]()
    call = compiled(model, budget, on_plan=plans.append, loss=lambda y: y.square().mean())
    step(model, call, batch())
    model.zero_grad()
    x = batch()
    _, measured = default_meter(x.device).measure(lambda: call(x).square().mean().backward())
    (plan,) = plans
    assert plan.peak_bytes <= plan.budget_bytes
    assert 0.95 * plan.peak_bytes <= measured.peak_bytes <= plan.peak_bytes


def test_models_of_one_class_have_a_plan_each() -> None:
    plans = list[cs.Plan]()
    options = {"on_plan": plans.append}
    models = [Layers(), Layers()]
    calls = [compiled(model, **options) for model in models]
    losses = [loss_of(call(batch())) for call in calls]
    torch.stack(losses).sum().backward()
    twin = Layers()
    loss_of(twin(batch())).backward()
    for model in models:
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    assert len(plans) == 2


def test_one_graph_for_all_sizes_is_planned_for_each() -> None:
    model, plans = Layers(), list[cs.Plan]()
    twin = copy.deepcopy(model)
    options = {"budget": "80%", "on_plan": plans.append}
    call = torch.compile(
        model, backend=compiler_backend, fullgraph=True, dynamic=True, options=options
    )
    for rows in (64, 128, 64):
        assert_same([*step(model, call, batch(rows))], [*step(twin, twin, batch(rows))])
    assert len({plan.peak_bytes for plan in plans}) == len(plans) == 2


def test_without_gradients_nothing_is_planned() -> None:
    model, plans = Layers().eval(), list[cs.Plan]()
    call = compiled(model, on_plan=plans.append)
    with torch.no_grad():
        assert torch.equal(call(batch()), model(batch()))
    model.requires_grad_(False)
    assert torch.equal(call(batch()), model(batch()))
    assert plans == []


def test_a_function_with_its_loss_is_one_graph() -> None:
    model, plans = Layers(), list[cs.Plan]()
    call = compiled(lambda x: loss_of(model(x)), on_plan=plans.append)
    call(batch()).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss_of(model(batch())).backward()
    assert_same(found, [p.grad for p in model.parameters() if p.grad is not None])
    assert len(plans) == 1


# -- what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Broken, r"breaks at .*test_compiler_backend.py:\d+ .*graph_break"),
        (BrokenInALoop, r"gave up reading .*BrokenInALoop.forward"),
        (WithFunction, "custom autograd Function"),
        (InPlace, "changes its input in place"),
    ],
)
def test_what_is_not_one_graph_is_refused(make: type[nn.Module], message: str) -> None:
    with pytest.raises(cs.ProfileError, match=message):
        compiled(make())(batch())


def test_a_broken_model_runs_as_it_is_without_gradients() -> None:
    model = Broken()
    with torch.no_grad():
        assert torch.equal(compiled(model)(batch()), model(batch()))


def test_a_step_with_its_backward_is_refused() -> None:
    model = Layers()

    def whole(x: Tensor) -> Tensor:
        loss = loss_of(model(x))
        loss.backward()
        return loss

    with pytest.raises(cs.ProfileError, match=r"breaks at .*backward"):
        compiled(whole)(batch())


def test_hooks_of_the_model_itself_are_refused() -> None:
    model = Layers()
    model.register_forward_hook(lambda module, args, y: y * 2)
    with pytest.raises(cs.ProfileError, match="hooks"):
        compiled(model)(batch())


def test_a_piece_of_a_graph_is_refused() -> None:
    call = compiler_backend(fx.symbolic_trace(Layers()), [], options={"budget": "60%"})
    with pytest.raises(cs.ProfileError, match="optimize_ddp"):
        call(batch())


def test_with_fullgraph_the_compiler_names_the_break() -> None:
    call = torch.compile(
        Broken(), backend=compiler_backend, fullgraph=True, options={"budget": "60%"}
    )
    with pytest.raises(Exception, match="graph_break"):
        call(batch())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (None, cs.ProfileError, "needs a budget"),
        ({"solver": "auto"}, cs.ProfileError, "needs a budget"),
        ({"budget": "60%", "depth": 3}, cs.ProfileError, r"'depth'.*budget, loss, solver, cuts"),
        ({"budget": "sixty"}, cs.BudgetSyntaxError, "sixty"),
        ({"budget": "1KiB"}, cs.InfeasibleBudgetError, "least that works"),
        ({"budget": "60%", "cuts": "few"}, cs.ProfileError, "'lean', 'dear', 'smallest', 'every'"),
        ({"budget": "60%", "solver": "none"}, cs.WorkloadError, "none"),
    ],
)
def test_wrong_options_are_refused_by_name(
    options: dict[str, Any] | None, error: type[Exception], message: str
) -> None:
    call = torch.compile(Layers(), backend=compiler_backend, options=options)
    with pytest.raises(error, match=message):
        call(batch())


def test_a_mode_of_the_compiler_is_refused() -> None:
    call = torch.compile(Layers(), backend=compiler_backend, mode="reduce-overhead")
    with pytest.raises(cs.ProfileError, match="'mode'"):
        call(batch())


def test_that_the_compiler_gives_up_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # the compiler logs it, too
    call = compiled(Layers())
    with torch._dynamo.config.patch(recompile_limit=2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", cs.BudgetWarning)
            call(batch(64))
        with pytest.warns(cs.BudgetWarning, match="recompile_limit = 2"):
            call(batch(96))


# -- its name


def test_the_entry_point_is_the_backend() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["torch_dynamo_backends"]["ckptsched"].partition(":")
    assert getattr(import_module(module), name) is cs.compiler_backend


def test_the_name_is_known_once_ckptsched_is_imported() -> None:
    code = (
        "import torch._dynamo, ckptsched; from torch import nn\n"
        "m = nn.Linear(4, 4)\n"
        "call = torch.compile(m, backend='ckptsched', options={'budget': '10', 'no': 1})\n"
        "try: call(torch.ones(2, 4))\n"
        "except ckptsched.ProfileError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "'no'" in done.stdout
