"""What users say of recomputation is kept: counted calls, bits, bytes, and errors by name."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import ckptsched as cs
from ckptsched.base.budget import exact_bytes
from ckptsched.recompute.tape_contents import SHOWS_WHAT_IS_SAVED
from tests.support.lean_tapes import lean_runs, preferring_lean_tapes

needs_lean_tapes = pytest.mark.skipif(
    not SHOWS_WHAT_IS_SAVED, reason="this torch does not show what hooks have packed"
)


class Attention(nn.Module):
    """Attention of two heads, with and without torch's function for it."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.by_hand = nn.Linear(8, 24), nn.Linear(8, 8), by_hand

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-3, -2)
        q, k, v = parts
        if self.by_hand:
            y = (q @ k.mT * 0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(-3, -2).flatten(-2))
        return out


class Layer(nn.Module):
    """A layer of a transformer; its activation is kept where it is told to."""

    def __init__(self, by_hand: bool, keeps: bool, drop: float) -> None:
        super().__init__()
        self.attention, self.keeps = Attention(by_hand), keeps
        self.norm, self.again = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.act, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm(x)))
        h = torch.tanh(self.act(self.up(self.again(x))))
        if self.keeps:
            h = cs.keep(cs.keep(h))
        out: Tensor = x + self.down(h)
        return out


class Net(nn.Module):
    """Layers, of which each is by hand or not."""

    def __init__(self, layers: int = 3, keeps: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(k % 2 == 0, keeps, drop) for k in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Counted(TorchFunctionMode):
    """Counts which functions of torch are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting_functions() -> Iterator[Counter[Any]]:
    """Count calls of torch's functions; a plan warns that it has not seen the mode."""
    with warnings.catch_warnings(), Counted() as functions:
        warnings.filterwarnings("ignore", "this forward runs among", cs.BudgetWarning)
        yield functions.counts


@contextmanager
def counting_modules(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the calls of modules by path; as a hook would, but a recorded module has none."""
    counts: Counter[str] = Counter()
    paths = {id(m): path for path, m in model.named_modules()}
    call = nn.Module.__call__

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        counts[paths.get(id(module), "")] += 1
        return call(module, *args, **kwargs)

    nn.Module.__call__ = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        nn.Module.__call__ = call  # type: ignore[method-assign]


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    model(x).square().mean().backward()
    found = [p.grad for p in model.parameters()]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


X = (2, 16, 8)
NEVER: dict[str, Callable[[], Any]] = {
    "a class": lambda: Attention,
    "a path": lambda: "layers.1.attention.*",
    "a pattern": lambda: ["layers.*.act", "layers.0"],
    "a function": lambda: [F.scaled_dot_product_attention, torch.matmul],
    "a function that modules call": lambda: [F.gelu],
    "an operator": lambda: torch.ops.aten.addmm,
    "two": lambda: (nn.LayerNorm, torch.tanh),
}
ALWAYS: dict[str, Callable[[], Any]] = {
    "none": tuple,
    "products": lambda: nn.Linear,
    "a function": lambda: [torch.Tensor.matmul],
    "a path": lambda: "layers.1.down",
}


def of_function(names: Any) -> set[Any]:
    found = {F.scaled_dot_product_attention: {F.scaled_dot_product_attention}}
    found[torch.matmul] = {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul}
    found[torch.tanh] = {torch.tanh}
    found[F.gelu] = {F.gelu}
    names = names if isinstance(names, list | tuple) else [names]
    return {f for name in names if not isinstance(name, str) for f in found.get(name, ())}


@needs_lean_tapes
@settings(max_examples=10, phases=(Phase.generate,))  # to make it smaller takes long
@given(
    never=st.sampled_from([*NEVER]),
    always=st.sampled_from([*ALWAYS]),
    share=st.floats(0, 1),
    keeps=st.booleans(),
    drop=st.sampled_from([0.0, 0.3]),
    lean=st.booleans(),
)
def test_what_is_never_made_again_is_not(
    never: str, always: str, share: float, keeps: bool, drop: float, lean: bool
) -> None:
    torch.manual_seed(1)
    model, x = Net(2, keeps, drop), torch.randn(X)
    names, others = NEVER[never](), ALWAYS[always]()
    try:
        captured = cs.captured(model, x, never_recompute=names, always_recompute=others)
    except cs.ProfileError as error:
        assert "never" in str(error) and "always" in str(error)  # noqa: PT017, PT018
        return
    inputs = captured.take(x)
    chain = cs.profile(captured, inputs)
    chain = preferring_lean_tapes(chain) if lean else chain
    whole = cs.plan(chain, budget="100%")
    least, most = whole.least_budget_bytes, whole.peak_bytes
    plan = cs.plan(chain, budget=least + int(share * (most - least)))
    result = cs.verify(captured, plan, inputs, rounds=0)
    assert result.ok, str(result)
    assert result.max_gradient_difference == 0.0
    assert plan.peak_bytes - 1024 <= result.measured_peak_bytes <= plan.peak_bytes
    # Counts: those of plain autograd for what is never made again.
    trained = cs.checkpointed(captured, plan)

    def counted(run: Callable[[], Tensor]) -> tuple[Counter[Any], Counter[str]]:
        with counting_modules(model) as modules, counting_functions() as functions:
            run().square().mean().backward()
        return functions, modules

    mine = counted(lambda: captured.give(trained(inputs)))
    plain = counted(lambda: model(x))
    for function in of_function(names) | ({torch.tanh} if keeps else set()):
        assert mine[0][function] == plain[0][function]
    once = [c for k, c in enumerate(captured.recording.calls) if k in captured.ruled.never]
    for call in once:
        if isinstance(call.target, str):
            assert mine[1][call.target] == plain[1][call.target] == 1


@needs_lean_tapes
def test_what_is_always_made_again_makes_tapes_leaner() -> None:
    model, x = Net(), torch.randn(X)

    def lean_bytes(**policy: Any) -> int:
        captured = cs.captured(model, x, cuts="smallest", **policy)
        chain = cs.profile(captured, captured.take(x))
        assert chain.signature is not None
        plan = cs.plan(preferring_lean_tapes(chain), budget="100%")
        result = cs.verify(captured, plan, captured.take(x), rounds=0)
        assert result.ok, str(result)
        assert result.max_gradient_difference == 0.0
        again = {name for s in chain.stages for tape in s.other_tapes for name in tape.again}
        assert ("layers.0.up" in again) == bool(policy)
        return sum(min(tape.tape_bytes for tape in stage.tapes) for stage in chain.stages)

    assert lean_bytes(always_recompute=["layers.*.up", "layers.*.act"]) < lean_bytes()


def test_the_budget_error_names_the_policy_and_both_least_budgets() -> None:
    model, x = Net(3), torch.randn(X)
    free = cs.plan(model, x, budget="100%")
    ruled = cs.plan(model, x, budget="100%", never_recompute=Layer)
    assert ruled.least_budget_bytes > free.least_budget_bytes
    assert ruled.forwards == len(ruled.chain)
    with pytest.raises(cs.InfeasibleBudgetError, match=r"by never_recompute=\[Layer\], ") as found:
        cs.plan(model, x, budget=ruled.least_budget_bytes - 1, never_recompute=Layer)
    error = found.value
    assert error.least_budget_bytes == ruled.least_budget_bytes
    assert f"with it the least budget is {exact_bytes(ruled.least_budget_bytes)}" in str(error)
    assert "without it the least budget is" in str(error)
    assert cs.plan(model, x, budget=error.least_budget_bytes, never_recompute=Layer)


@pytest.mark.parametrize("policy", [{"never_recompute": Attention}, {"always_recompute": F.gelu}])
def test_a_saved_plan_keeps_its_policy(policy: dict[str, Any], tmp_path: Path) -> None:
    model, x = Net(keeps=True), torch.randn(X)
    plan = cs.plan(model, x, budget="97%", **policy)
    plan.save(tmp_path / "plan.json")
    again = cs.Plan.load(tmp_path / "plan.json")
    assert again.chain == plan.chain
    assert isinstance(again.chain, cs.Chain)
    assert again.chain.signature is not None
    assert next(iter(policy)) in again.chain.signature.policy
    assert "keep() in the forward" in again.chain.signature.policy
    expected = step(model, x)
    assert same_bits(step(cs.checkpointed(model, again), x), expected)
    captured = cs.captured(model, x)
    with pytest.raises(cs.PlanMismatchError, match=r"recompute=\[.*recorded with keep"):
        cs.checkpointed(captured, again)
    changed = Net()
    changed.load_state_dict(model.state_dict())
    with pytest.raises(cs.PlanMismatchError):
        cs.checkpointed(changed, again)(x)


def test_a_plan_that_runs_a_kept_stage_again_is_no_plan(tmp_path: Path) -> None:
    from dataclasses import replace

    model, x = Net(), torch.randn(X)
    chain = cs.profile(model, x)
    least = cs.plan(chain, budget="100%", solver="chain_dp").least_budget_bytes
    free = cs.plan(chain, budget=least, solver="chain_dp")
    assert isinstance(free.chain, cs.Chain)
    stages = tuple(replace(stage, once=True) for stage in free.chain.stages)
    bad = replace(free, chain=replace(free.chain, stages=stages))
    bad.save(tmp_path / "plan.json")
    with pytest.raises(cs.PlanMismatchError, match=r"runs stage .* again, which is to run once"):
        cs.Plan.load(tmp_path / "plan.json")


def test_fit_keeps_the_policy_for_other_batches() -> None:
    torch.manual_seed(3)
    model = Net(keeps=True)
    twin = copy.deepcopy(model)
    cs.fit(
        model,
        torch.randn(3, 20, 8),
        budget="97%",
        never_recompute=[Attention],
        always_recompute=nn.GELU,
    )
    for shape in (X, (1, 16, 8), (3, 20, 8)):
        y = torch.randn(shape)
        for _ in range(2):
            assert same_bits(step(model, y), step(twin, y))
        with counting_functions() as functions:
            model(y).square().mean().backward()
        assert functions[F.scaled_dot_product_attention] == 1
        assert functions[torch.tanh] == 3


class OnlyOnce(nn.Module):
    """A function that is called for long batches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.a(x))
        y = torch.sinh(y) if x.shape[0] > 2 else y
        return torch.tanh(self.b(y))


def test_a_name_need_not_be_called_by_a_second_kind_of_batch() -> None:
    model = OnlyOnce()
    twin = copy.deepcopy(model)
    cs.fit(model, torch.randn(4, 8), budget="100%", never_recompute=torch.sinh)
    for n in (4, 2):
        x = torch.randn(n, 8)
        assert same_bits(step(model, x), step(twin, x))
    with pytest.raises(cs.ProfileError, match=r"never_recompute names sinh, and the model makes"):
        cs.fit(twin, torch.randn(2, 8), budget="100%", never_recompute=torch.sinh)


class Twice(torch.autograd.Function):
    """A custom Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Odd(nn.Module):
    """Draws, a custom Function, whole numbers, and views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Twice.apply(self.drop(self.a(x)))
        return self.b(y.view(-1, 8)) * y.argmax(-1, keepdim=True)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"never_recompute": nn.Linear, "always_recompute": [nn.Linear]}, "Linear is in never_"),
        ({"never_recompute": "a", "always_recompute": nn.Linear}, "a is never .* by 'a' in never"),
        ({"never_recompute": nn.Conv2d}, "names Conv2d, and the model makes no call .* a, drop"),
        ({"never_recompute": "c"}, "names 'c', and the model makes no call of it"),
        ({"never_recompute": "dro"}, "names 'dro', and the model makes no call of it"),
        ({"always_recompute": torch.sin}, "names sin, and .* a recording sees functions"),
        ({"always_recompute": same_bits}, "names same_bits, and the model makes no call"),
        ({"always_recompute": nn.Dropout}, "always_recompute, by Dropout, .* drop draws random"),
        ({"always_recompute": Twice}, "Twice is a custom autograd Function"),
        ({"always_recompute": Twice.apply}, "Twice is a custom autograd Function"),
        ({"always_recompute": torch.argmax}, "whose calls make nothing that could be"),
        ({"never_recompute": torch.Tensor.view}, "whose calls make nothing that could be"),
        ({"never_recompute": 3}, "never_recompute was given 3; give a class of modules"),
        ({"never_recompute": ""}, "never_recompute was given ''; give a class of modules"),
        ({"never_recompute": [nn.Linear(1, 1)]}, "was given a Linear module; give a class"),
        ({"always_recompute": int}, "always_recompute was given <class 'int'>"),
    ],
)
def test_what_cannot_be_asked_is_said_by_name(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(cs.ProfileError, match=message):
        cs.captured(Odd(), torch.randn(4, 8), **policy)


def test_where_a_policy_does_not_belong() -> None:
    model, x = Net(), torch.randn(X)
    with pytest.raises(cs.ProfileError, match=r"never_recompute=\[Attention\] .* capture=False"):
        cs.plan(model, x, budget="50%", capture=False, never_recompute=Attention)
    with pytest.raises(cs.ProfileError, match=r"never_recompute=\[Attention\] .* capture=False"):
        cs.profile(model, x, fake=True, capture=False, never_recompute=Attention)
    captured = cs.captured(model, x)
    with pytest.raises(cs.ProfileError, match="a model that is recorded already"):
        cs.profile(captured, captured.take(x), always_recompute=nn.GELU)
    chain = cs.profile(model, x)
    with pytest.raises(cs.WorkloadError, match=r"always_recompute=\[GELU\] .* give it to profile"):
        cs.plan(chain, budget="50%", always_recompute=nn.GELU)


def test_a_chain_of_modules_is_recorded_for_a_policy() -> None:
    model, x = nn.Sequential(*[Layer(False, False, 0.0) for _ in range(4)]), torch.randn(X)
    plan = cs.plan(model, x, budget="80%", never_recompute="2.attention")
    assert isinstance(plan.chain, cs.Chain)
    assert plan.chain.signature is not None
    assert plan.chain.signature.recorded
    assert any(stage.once for stage in plan.chain.stages)
    expected = step(model, x)
    assert same_bits(step(cs.checkpointed(model, plan), x), expected)


def test_shared_modules_are_known_by_any_of_their_paths() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.other = self.one

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.other(torch.relu(self.one(x))))

    model, x = Shared(), torch.randn(4, 8)
    by = [cs.captured(model, x, never_recompute=n).ruled.never for n in ("one", "other", nn.Linear)]
    assert by[0] == by[1] == by[2] == {0, 2}


# -- keep


class Kept(nn.Module):
    """Keeps an activation; draws."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = cs.keep(self.drop(torch.relu(self.a(cs.keep(x)))))
        return torch.tanh(self.b(torch.sin(cs.keep(h)))) + cs.keep(self.b.bias)


def test_keep_gives_the_tensor_itself() -> None:
    x = torch.randn(3, requires_grad=True)
    for tensor in (x, x * 2, x.detach(), x.view(3, 1)):
        assert cs.keep(tensor) is tensor
    with torch.no_grad():
        assert cs.keep(x) is x
    with pytest.raises(cs.ExecutionError, match="keep was given tuple; give a tensor"):
        cs.keep((x,))  # type: ignore[type-var]


def test_keep_does_nothing_where_nothing_is_recorded() -> None:
    torch.manual_seed(0)
    model, x = Kept().eval(), torch.randn(4, 8)
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    own = dict(model.named_parameters())
    assert torch.equal(functional_call(model, own, (x,)), expected)
    torch.testing.assert_close(torch.func.vmap(model)(x), expected)
    grads = torch.func.grad(lambda p: functional_call(model, p, (x,)).sum())(own)
    model(x).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(grads[name], p.grad)


@pytest.mark.parametrize("budget", ["100%", "least"])
def test_a_kept_value_is_computed_once(budget: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*[Layer(False, True, 0.2) for _ in range(2)]), torch.randn(X)
    captured = cs.captured(model, x, cuts="every")
    chain = cs.profile(captured, captured.take(x))
    plan = cs.plan(chain, budget="100%")
    if budget == "least":
        plan = cs.plan(chain, budget=plan.least_budget_bytes)
        assert plan.forwards > len(chain)
    trained = cs.checkpointed(model, plan)
    expected = step(model, x)
    step(trained, x)  # its first step records the model
    for _ in range(2):
        with counting_functions() as functions:
            found = step(trained, x)
        assert same_bits(found, expected)
        assert functions[torch.tanh] == 2


def test_what_is_kept_in_place_is_computed_once() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y = y.mul(2)
            y = y.relu_()
            out: Tensor = self.b(torch.sin(cs.keep(y.view(-1))).view(-1, 8))
            return out

    captured = cs.captured(InPlace(), torch.randn(4, 8))
    names = [call.name for call in captured.recording.calls]
    found = {names[k] for k in captured.ruled.never}
    assert found == {"Tensor.mul", "Tensor.relu_"}
    assert captured.ruled.words == "keep() in the forward"


def test_keep_in_a_thread_that_does_not_record() -> None:
    from threading import Thread

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            other = torch.ones(2)
            thread = Thread(target=lambda: cs.keep(other))
            thread.start()
            thread.join()
            return torch.relu(self.b(torch.relu(self.a(x))))

    captured = cs.captured(Asks(), torch.randn(4, 8))
    assert not captured.ruled.never


@needs_lean_tapes
def test_equal_layers_are_measured_once_with_names_of_their_own() -> None:
    model, x = nn.Sequential(*[Layer(False, False, 0.0) for _ in range(4)]), torch.randn(X)
    captured = cs.captured(model, x, cuts="dear", always_recompute=nn.Linear)
    chain = cs.profile(captured, captured.take(x))
    again = [tape.again for stage in chain.stages for tape in stage.other_tapes]
    assert lean_runs(cs.plan(preferring_lean_tapes(chain), budget="100%"))
    for k in range(4):
        mine = [
            name for names in again for name in names if name.split(" in ")[-1].startswith(f"{k}.")
        ]
        assert mine
