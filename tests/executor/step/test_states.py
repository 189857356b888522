"""States and arguments of any shape, as a user writes them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.base.errors import PlanMismatchError
from ckptsched.capture.signature import read_carries, write_carries
from tests.support.networks import tight

SOLVERS = ("store_all", "every_2", "every_stage", "input_only", "chain_dp")


class Layer(nn.Module):
    """Attention under a mask, shifted by a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.shift, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, condition: Tensor, *, mask: Tensor | None = None) -> Tensor:
        shifted = self.norm(x + self.shift(condition)[:, None])
        return x + self.attention(shifted, shifted, shifted, attn_mask=mask)[0]


class Decoder(cs.StagedModule):
    """Layers that all see the condition and the mask."""

    def __init__(self, width: int = 16, layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def stages(self) -> list[cs.StageCall]:
        return [cs.ModuleStage(layer) for layer in self.layers]


def decoder() -> tuple[Decoder, tuple[Tensor, Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 16, requires_grad=True)
    condition = torch.randn(2, 16, requires_grad=True)
    return Decoder(), (x, condition), {"mask": torch.ones(7, 7).triu(1) > 0}


class Down(nn.Module):
    """Halves the resolution and leaves a skip connection behind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *skips = state
        return torch.relu(self.conv(x)), *skips, x


class Up(nn.Module):
    """Doubles the resolution and takes the last skip connection up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *skips, skip = state
        x = nn.functional.interpolate(x, scale_factor=2.0)
        return torch.relu(self.norm(self.conv(torch.cat([x, skip], dim=1)))), *skips


class First(nn.Module):
    """A tuple of one becomes what is in it."""

    def forward(self, state: tuple[Tensor, ...]) -> Tensor:
        return state[0]


class Alone(nn.Module):
    """A tensor becomes a tuple of one."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


def u_net() -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    torch.manual_seed(1)
    downs, ups = [Down(8) for _ in range(3)], [Up(8) for _ in range(3)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Alone(), *downs, *ups, First(), nn.Conv2d(8, 2, 1)
    )
    return model, (torch.randn(2, 3, 16, 16),), {}


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


@dataclass
class Batch:
    tokens: Tensor
    weights: Tensor
    name: str = "batch"


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)

    def forward(self, batch: Batch) -> dict[str, Any]:
        x = self.table(batch.tokens) * batch.weights[..., None]
        return {"pair": Pair(x, None), "tokens": batch.tokens, "name": batch.name}


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        assert state["name"] == "batch"
        left, right = state["pair"]
        y = torch.tanh(self.inner(left)) + (0 if right is None else right)
        return {**state, "pair": Pair(y, left)}


def containers() -> tuple[nn.Module, tuple[Batch], dict[str, Any]]:
    torch.manual_seed(2)
    batch = Batch(torch.randint(0, 20, (3, 5)), torch.rand(3, 5, requires_grad=True))
    return nn.Sequential(Embed(), Mix(), Mix(), Mix()), (batch,), {}


class Right(nn.Module):
    """The right-hand side of an ODE that is driven from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, t: Tensor, z: Tensor, drive: Tensor | None = None) -> Tensor:
        return torch.tanh(self.inner(z) + (0 if drive is None else drive * torch.cos(t)))


def driven_ode() -> tuple[nn.Module, tuple[Tensor], dict[str, Any]]:
    torch.manual_seed(3)
    drive = torch.randn(4, 6, requires_grad=True)
    block = cs.ODEBlock(Right(), "rk4", 12, time_dependent=True)
    return block, (torch.randn(4, 6),), {"drive": drive}


MODELS = {make.__name__: make for make in (decoder, u_net, containers, driven_ode)}


def of_dict(output: Any) -> Tensor:
    """A loss of what `containers` returns."""
    left, right = output["pair"]
    return left.square().mean() + right.sum() * 0.1


def loss_of(name: str) -> Any:
    return of_dict if name == "containers" else lambda y: y.square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_states_of_any_shape_equal_plain_autograd_to_the_bit_and_the_byte(name: str) -> None:
    model, sample, kwargs = MODELS[name]()
    loss = loss_of(name)
    chain = cs.profile(model, *sample, kwargs=kwargs, loss=loss)
    assert cs.Chain.from_json(chain.to_json()) == chain
    for solver in SOLVERS:
        plan = tight(chain, solver)
        result = cs.verify(model, plan, *sample, kwargs=kwargs, loss=loss)
        assert result.ok, (solver, str(result))
        assert result.max_gradient_difference == 0.0, solver
        assert plan.peak_bytes - 128 <= result.measured_peak_bytes <= plan.peak_bytes, solver


def test_skip_connections_count_once() -> None:
    model, sample, _ = u_net()
    chain = cs.profile(model, *sample)
    parts = [stage.ledger.parts for stage in chain.stages if stage.ledger is not None]
    downs = [part for part in parts if part is not None and len(part.output_bytes) > 1]
    assert len(downs) >= 4
    # Each stage down makes one storage and hands the others on.
    assert [part.output_sources.count(-1) for part in downs[:3]] == [1, 1, 1]
    assert [len(part.output_bytes) for part in downs[:3]] == [2, 3, 4]


def grads(tensors: Any) -> list[Tensor | None]:
    return [t.grad for t in tensors]


@pytest.mark.parametrize("name", MODELS)
def test_more_backwards_and_second_derivatives(name: str) -> None:
    model, sample, kwargs = MODELS[name]()
    model.double()
    sample = copy.deepcopy(sample)
    if name == "containers":
        sample[0].weights = sample[0].weights.detach().double().requires_grad_()
        leaves = [sample[0].weights]
    else:
        sample = tuple(t.detach().double().requires_grad_() for t in sample)
        kwargs = {
            k: t.detach().double().requires_grad_() if t.is_floating_point() else t
            for k, t in kwargs.items()
        }
        leaves = [*sample, *(t for t in kwargs.values() if t.requires_grad)]
    model.eval()
    twin = copy.deepcopy(model)
    loss = loss_of(name)
    chain = cs.profile(model, *sample, kwargs=kwargs, loss=loss)
    trained = cs.checkpointed(model, tight(chain, "every_2"))
    found = []
    for net in (trained, twin):
        for leaf in leaves:
            leaf.grad = None
        y = loss(net(*sample, **kwargs))
        y.backward(retain_graph=True)
        y.backward()
        found.append([*grads(leaves), *grads(net.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    second = []
    for net in (trained, twin):
        y = loss(net(*sample, **kwargs))
        if net is trained:
            with pytest.warns(cs.BudgetWarning):
                first = torch.autograd.grad(y, leaves, create_graph=True)
        else:
            first = torch.autograd.grad(y, leaves, create_graph=True)
        norm = torch.stack([g.square().sum() for g in first]).sum()
        second.append(
            [norm, *torch.autograd.grad(norm, [*leaves, *net.parameters()], allow_unused=True)]
        )
    for a, b in zip(*second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_a_condition_that_comes_from_another_network() -> None:
    model, (x, _), kwargs = decoder()
    encoder = nn.Linear(3, 16)
    raw = torch.randn(2, 3)
    chain = cs.profile(model, x, encoder(raw), kwargs=kwargs)
    found = []
    twins = copy.deepcopy((model, encoder))
    for net, before in ((cs.checkpointed(model, tight(chain, "every_2")), encoder), twins):
        torch.manual_seed(4)
        x.grad = None
        net(x, before(raw), **kwargs).sum().backward()
        found.append([*grads(net.parameters()), *grads(before.parameters()), x.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_parameter_of_the_model_may_be_a_condition() -> None:
    model, (x, _), kwargs = decoder()
    model.register_parameter("start", nn.Parameter(torch.randn(2, 16)))
    chain = cs.profile(model, x, model.start, kwargs=kwargs)
    twin = copy.deepcopy(model)
    found = []
    for net in (cs.checkpointed(model, tight(chain, "every_2")), twin):
        torch.manual_seed(5)
        net(
            x, next(p for n, p in net.named_parameters() if n == "start"), **kwargs
        ).sum().backward()
        found.append(grads(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_calls_that_were_not_planned_are_refused() -> None:
    model, (x, condition), kwargs = decoder()
    chain = cs.profile(model, x, condition, kwargs=kwargs)
    trained = cs.checkpointed(model, tight(chain, "every_2"))
    trained(x, condition, **kwargs)
    for call in (
        lambda: trained(x, condition),
        lambda: trained(x, condition, mask=None),
        lambda: trained(x, condition[:1], **kwargs),
        lambda: trained(x, condition.detach(), **kwargs),
        lambda: trained(x, condition=condition, **kwargs),
        lambda: trained((x,), condition, **kwargs),
        lambda: trained(x.detach(), condition, **kwargs),
    ):
        with pytest.raises(PlanMismatchError, match=r"the plan is for a call with .*; found"):
            call()
    with torch.no_grad():
        assert trained(x[:1], condition[:1]).shape == (1, 7, 16)


def test_the_batch_may_come_by_the_name_that_the_model_gives_it() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
            y: Tensor = torch.tanh(self.inner(hidden))
            return y if mask is None else y * mask

    torch.manual_seed(0)
    x, mask = torch.randn(3, 4), torch.ones(3, 1)
    model, chained = Named(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    plan = cs.plan(model, kwargs={"mask": mask, "hidden": x}, budget="100%", capture=False)
    trained = cs.checkpointed(model, plan)
    assert cs.verify(model, plan, kwargs={"hidden": x, "mask": mask}).ok
    trained(mask=mask, hidden=x).sum().backward()
    found = model.inner.weight.grad
    model.zero_grad()
    model(x, mask).sum().backward()
    assert found is not None
    assert torch.equal(found, model.inner.weight.grad)

    with pytest.raises(PlanMismatchError, match=r"found only 'mask'; give .* or as hidden="):
        trained(mask=mask)
    with pytest.raises(cs.ProfileError, match=r"found only 'mask'; give .* 'hidden' in kwargs"):
        cs.profile(model, kwargs={"mask": mask}, capture=False)
    with pytest.raises(PlanMismatchError, match=r"found nothing; give .* 'hidden' in kwargs"):
        cs.verify(model, plan)
    expected = chained(x)
    assert torch.equal(cs.fit(chained, x, budget="100%")(input=x), expected)
    with torch.no_grad():
        assert torch.equal(trained(hidden=x), model(x))


def test_a_condition_that_changes_before_the_backward_is_caught() -> None:
    model, (x, condition), kwargs = decoder()
    condition = condition.detach()
    chain = cs.profile(model, x, condition, kwargs=kwargs)
    y = cs.checkpointed(model, tight(chain, "every_2"))(x, condition, **kwargs).sum()
    condition.add_(1)
    with pytest.raises(cs.ExecutionError, match="that every stage is given was changed in place"):
        y.backward()


class Odd(nn.Module):
    """Does what a test asks for, once the profile is over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.what = ""

    def forward(self, state: tuple[Tensor, Tensor], **given: Any) -> Any:
        x, y = state
        if self.what == "in place":
            y.add_(1)
        if self.what == "condition in place":
            given["condition"].add_(1)
        if self.what == "more":
            return self.inner(x), y, x * 2
        if self.what == "attached":
            return self.inner(x), self.inner(y)
        return self.inner(x), y.detach()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("in place", "stage '0' changed its input in place"),
        ("more", "stage '0' returned 3 tensors, and 2 when the model was profiled"),
        ("attached", "stage '0' returned a tensor that depends on parameters.*profile and plan"),
    ],
)
def test_what_the_profile_did_not_see_is_an_error(what: str, message: str) -> None:
    odd = Odd()
    model = nn.Sequential(odd, Odd(), Odd())
    state = (torch.randn(2, 4), torch.randn(2, 4))
    chain = cs.profile(model, state)
    trained = cs.checkpointed(model, tight(chain, "every_stage"))
    odd.what = what
    with pytest.raises(cs.ExecutionError, match=message):
        trained(state)[0].sum().backward()
    odd.what = ""
    trained(state)[0].sum().backward()


def test_a_stage_that_changes_a_condition_is_refused() -> None:
    class Odds(cs.StagedModule):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def stages(self) -> list[cs.StageCall]:
            return [cs.ModuleStage(self.odd)]

    model = Odds()
    model.odd.what = "condition in place"
    state = (torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(cs.ProfileError, match="changes what every stage is given in place"):
        cs.profile(model, state, kwargs={"condition": torch.ones(1)})


def test_an_output_without_gradient_has_none() -> None:
    model = nn.Sequential(Odd(), Odd())
    state = (torch.randn(2, 4), torch.randn(2, 4))
    trained = cs.checkpointed(model, tight(cs.profile(model, state), "every_2"))
    x, y = trained(state)
    assert x.requires_grad
    assert not y.requires_grad


def test_a_loss_is_profiled_on_what_the_model_returns() -> None:
    model, sample, kwargs = containers()
    chain = cs.profile(model, *sample, kwargs=kwargs)  # default loss, of all that carries
    assert cs.verify(model, tight(chain, "every_2"), *sample).ok
    trained = cs.fit(model, *sample, budget="100%", loss=of_dict)
    of_dict(trained(*sample)).backward()


class Hands(nn.Module):
    """Hands on, beside its result, something that is there already."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner, self.what = nn.Linear(8, 8), what
        self.table = nn.Parameter(torch.randn(50, 8))
        self.register_buffer("fixed", torch.randn(50, 8))

    def forward(self, state: Any, condition: Tensor) -> tuple[Tensor, Tensor]:
        x, more = state if isinstance(state, tuple) else (state, condition[:4])
        y = torch.tanh(self.inner(x) * more + self.table[:4])
        kept = {"condition": condition, "parameter": self.table, "buffer": self.fixed}[self.what]
        return y, kept[:4]


class Handing(cs.StagedModule):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Hands(what) for _ in range(5))

    def stages(self) -> list[cs.StageCall]:
        return [cs.ModuleStage(part) for part in self.parts]


@pytest.mark.parametrize("what", ["condition", "parameter", "buffer"])
def test_what_is_there_already_takes_no_bytes_as_part_of_a_state(what: str) -> None:
    model, x = Handing(what), torch.randn(4, 8, requires_grad=True)
    condition = torch.randn(30, 8, requires_grad=True)

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        return output[0].square().sum() + output[1].sum()

    chain = cs.profile(model, x, condition, loss=loss)
    for solver in SOLVERS:
        plan = tight(chain, solver)
        result = cs.verify(model, plan, x, condition, loss=loss)
        assert result.ok, (solver, str(result))
        # A buffer's bytes count, as stages that run again have clones; a gradient that only some
        # of the stages bring into being is provided for in each.
        spare = {"condition": condition.nbytes, "parameter": 0, "buffer": plan.peak_bytes}[what]
        assert result.measured_peak_bytes >= plan.peak_bytes - 128 - spare, solver


def test_a_gradient_that_an_opaque_argument_hides_is_not_lost() -> None:
    class Holder:
        tensor = torch.randn(4, 8)

    class Adds(nn.Module):
        def forward(self, x: Tensor, holder: Holder) -> Tensor:
            return torch.tanh(x + holder.tensor)

    class Adding(Handing):
        def __init__(self) -> None:
            super().__init__("condition")
            self.parts = nn.ModuleList(Adds() for _ in range(3))

    model, x, holder = Adding(), torch.randn(4, 8, requires_grad=True), Holder()
    trained = cs.checkpointed(model, tight(cs.profile(model, x, holder), "every_2"))
    holder.tensor = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(cs.ExecutionError, match="neither a parameter of the model nor an argument"):
        trained(x, holder).sum().backward()


def test_a_sequential_cannot_give_its_parts_more() -> None:
    model = nn.Sequential(*[Hands("condition") for _ in range(2)])
    with pytest.raises(cs.ProfileError, match="takes one argument, so its parts cannot be given"):
        cs.profile(model, torch.randn(4, 8), torch.randn(30, 8))


def test_estimates_know_states_of_any_shape() -> None:
    for name, make in MODELS.items():
        model, sample, kwargs = make()
        exact = cs.profile(model, *sample, kwargs=kwargs, loss=loss_of(name))
        guess = cs.profile(model, *sample, kwargs=kwargs, loss=loss_of(name), fake=True)
        assert [s.state_bytes for s in guess.stages] == [s.state_bytes for s in exact.stages], name
        assert guess.input_gradient_bytes == exact.input_gradient_bytes


def test_which_tensors_carry_is_written_and_read() -> None:
    carries = [(False,), (True, False), (True, False), (True,)]
    assert write_carries(carries) == "1x0 2x10 1x1"
    assert read_carries(write_carries(carries)) == carries
    for text in ("x1", "2x", "2x4", "ax1", "2"):
        with pytest.raises(PlanMismatchError, match="its file is damaged"):
            read_carries(text)
