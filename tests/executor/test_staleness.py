"""What is noted of a model once must not be believed when the model is another by then."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import ckptsched as cs
from ckptsched.capture.inspection import Inspection
from tests.support.networks import conv_block, planned


def nested() -> tuple[Any, Tensor]:
    """Modules at several depths, in blocks and in stages."""
    torch.manual_seed(0)
    block = cs.ODEBlock(conv_block(3), method="euler", steps=3)
    head = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 2)))
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), block, head), torch.randn(2, 3, 4, 4)


def followed(solver: str = "store_all") -> tuple[Any, nn.Module, Tensor]:
    """A model, the same by a plan, and a batch; one step is done."""
    model, x = nested()
    trained = cs.checkpointed(model, planned(model, x, solver))
    step(trained, x)
    return model, trained, x


def step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Gradients of all parameters."""
    model.zero_grad()
    model(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_as_plain(model: nn.Module, trained: nn.Module, x: Tensor) -> None:
    """The next step gives, bit by bit, what it gives without a plan."""
    found, expected = step(trained, x), step(copy.deepcopy(model), x)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


def test_each_module_that_goes_over_to_eval_is_seen() -> None:
    model, trained, x = followed()
    for module in list(model.modules())[1:]:
        module.training = False
        with pytest.raises(cs.PlanMismatchError, match="the plan is for mode 'train'"):
            trained(x)
        module.training = True
    assert_as_plain(model, trained, x)


def test_each_parameter_that_is_frozen_is_seen() -> None:
    model, trained, x = followed()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        with pytest.raises(cs.PlanMismatchError, match="other parameters require gradients"):
            trained(x)
        parameter.requires_grad_(True)
    assert_as_plain(model, trained, x)


def test_each_module_that_is_replaced_added_or_taken_out_is_seen() -> None:
    model, trained, x = followed()
    places = [(m, name) for m in model.modules() for name in m._modules]
    for parent, name in places:
        child = parent._modules[name]
        for other in (copy.deepcopy(child), None):
            parent._modules[name] = other
            with pytest.raises(cs.PlanMismatchError, match="a module of the model was replaced"):
                trained(x)
            parent._modules[name] = child
        child.add_module("new", nn.Identity())
        with pytest.raises(cs.PlanMismatchError, match="a module of the model was replaced"):
            trained(x)
        del child.new
    assert_as_plain(model, trained, x)


def test_a_module_that_moves_to_the_container_beside_it_is_seen() -> None:
    first, second = nn.Sequential(nn.Tanh(), nn.ReLU()), nn.Sequential(nn.Sigmoid())
    model = nn.Sequential(first, second)
    inspection = Inspection.of(model)
    moved = first[1]
    del first[1]
    second.insert(0, moved)
    assert inspection.changed()
    del second[0]
    first.append(moved)
    assert not inspection.changed()


def _parametrized(layer: nn.Linear) -> None:
    parametrizations.weight_norm(layer)


def _with_another(layer: nn.Linear) -> None:
    layer.register_parameter("more", nn.Parameter(torch.zeros(1)))


def _without_one(layer: nn.Linear) -> None:
    del layer.bias


@pytest.mark.parametrize("change", [_parametrized, _with_another, _without_one])
def test_a_place_for_a_parameter_that_comes_or_goes_is_seen(
    change: Callable[[nn.Linear], None],
) -> None:
    model, trained, x = followed()
    change(model[2][1])
    with pytest.raises(cs.PlanMismatchError, match="was replaced, added or taken out"):
        trained(x)


def test_a_place_for_a_buffer_that_comes_or_goes_is_seen() -> None:
    model, trained, x = followed("every_2")
    norm = model[1].f[1]
    norm.register_buffer("more", torch.zeros(1))
    with pytest.raises(cs.PlanMismatchError, match="a buffer of a BatchNorm2d was replaced"):
        trained(x)
    del norm.more
    assert_as_plain(model, trained, x)
    del norm.running_mean
    with pytest.raises(cs.PlanMismatchError, match="a buffer of a BatchNorm2d was replaced"):
        trained(x)


class Repeated(cs.StagedModule):
    """One layer several times, which no other module tells."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(4, 4), times

    def stages(self) -> list[cs.StageCall]:
        return [cs.ModuleStage(self.layer) for _ in range(self.times)]


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [
        (lambda: cs.ODEBlock(nn.Linear(4, 4), steps=3), "steps", 5),
        (lambda: cs.ODEBlock(nn.Linear(4, 4), "rk4", 3), "granularity", "slope"),
        (lambda: Repeated(3), "times", 2),
    ],
)
def test_a_module_that_lists_other_stages_is_seen(
    module: Callable[[], nn.Module], name: str, other: object
) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), module()), torch.randn(2, 4)
    trained = cs.checkpointed(model, planned(model, x))
    before = getattr(model[1], name)
    setattr(model[1], name, other)
    with pytest.raises(cs.PlanMismatchError, match="a module lists other stages"):
        trained(x)
    with torch.no_grad():
        assert torch.equal(trained(x), model(x))
    setattr(model[1], name, before)
    assert_as_plain(model, trained, x)


def test_the_end_time_of_an_ode_may_change_between_steps() -> None:
    model, trained, x = followed("every_2")
    model[1].t1 = 2.5
    assert_as_plain(model, trained, x)


def test_lazy_modules_are_asked_to_run_first() -> None:
    model, x = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyBatchNorm1d()), torch.randn(4, 5)
    for fake in (False, True):
        with pytest.raises(cs.ProfileError, match="run it once on a batch"):
            cs.profile(model, x, fake=fake)
    with torch.no_grad():
        model(x)
    assert_as_plain(model, cs.checkpointed(model, planned(model, x)), x)


@pytest.mark.parametrize("solver", ["store_all", "every_2"])
def test_other_parameters_in_the_same_places_are_the_ones_that_are_trained(solver: str) -> None:
    model, trained, x = followed(solver)
    before = list(model.parameters())
    values = {
        name: torch.rand_like(t) for name, t in model.state_dict().items() if t.is_floating_point()
    }
    model.load_state_dict(values, strict=False, assign=True)
    assert not {id(p) for p in before} & {id(p) for p in model.parameters()}
    for parameter in before:
        parameter.grad = None
    assert_as_plain(model, trained, x)
    assert all(parameter.grad is None for parameter in before)
    for parameter in model.parameters():
        parameter.data = torch.rand_like(parameter)
    assert_as_plain(model, trained, x)
    for parameter in model.parameters():
        parameter.grad = None
    others = {name: torch.rand_like(p).requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(trained, others, (x,)).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    found = [p.grad for p in others.values()]
    for parameter in others.values():
        parameter.grad = None
    torch.func.functional_call(model, others, (x,)).square().sum().backward()
    for one, other in zip(found, others.values(), strict=True):
        assert one is not None
        assert other.grad is not None
        assert torch.equal(one, other.grad)


def _pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_looks_at_itself(again: Callable[[nn.Module], Any]) -> None:
    model, trained, x = followed()
    twin = again(trained)
    inner = twin.model
    inner[2][1].eval()
    with pytest.raises(cs.PlanMismatchError, match="the plan is for mode"):
        twin(x)
    assert_as_plain(model, trained, x)
    inner[2][1].train()
    inner[2][1] = nn.Linear(48, 6)
    with pytest.raises(cs.PlanMismatchError, match="a module of the model was replaced"):
        twin(x)
    assert_as_plain(model, trained, x)
    model[2][1] = nn.Linear(48, 6)
    twin = again(trained)
    with pytest.raises(cs.PlanMismatchError, match="a module of the model was replaced"):
        twin(x)


@given(
    picks=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=4),
    solver=st.sampled_from(["store_all", "every_2"]),
)
def test_sums_over_shared_layers_have_the_bits_of_one_graph(
    picks: list[list[int]], solver: str
) -> None:
    """Whichever layers come again, in one block or in several, also once their use is known."""
    torch.manual_seed(1)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*(nn.Sequential(*(layers[k] for k in group)) for group in picks))
    x = torch.randn(3, 4)
    trained = cs.checkpointed(model, planned(model, x, solver))
    for _ in range(3):
        assert_as_plain(model, trained, x)


class SharedGradients(nn.Module):
    """Parameters whose gradients are views of one another, and of the state's."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(16))
        self.square, self.turned = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.square + self.flat.view(4, 4) + self.turned.t()


@pytest.mark.parametrize("solver", ["store_all", "every_2", "every_stage", "input_only"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_sum_is_not_added_to_in_what_another_gradient_shares(solver: str, steps: int) -> None:
    torch.manual_seed(0)
    shared, x = SharedGradients(), torch.randn(4, 4)
    block = cs.ODEBlock(shared, "euler", steps)
    model = nn.Sequential(shared, nn.Tanh(), block, nn.Linear(4, 4), shared, shared)
    trained = cs.checkpointed(model, planned(model, x, solver))
    for _ in range(3):
        assert_as_plain(model, trained, x)


# -- plans that no longer apply


class Adapted(nn.Module):
    """A frozen layer with a trained one beside it, as low-rank adapters are."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 32)
        self.up = nn.Linear(32, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x).tanh())


class Holding(nn.Module):
    """A layer that is no stage of its own, and a function of its own choice."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(8, 8), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lin(x))


def _adapt(net: nn.Module) -> None:
    for part in net:
        part.lin = Adapted(part.lin)


def _parametrize(net: nn.Module) -> None:
    for part in net:
        parametrizations.weight_norm(part.lin)
        part.lin.parametrizations.weight.requires_grad_(True)


def _add_parameter(net: nn.Module) -> None:
    net[2].lin.register_parameter("scale", nn.Parameter(torch.ones(8)))


def _add_hooked_adapter(net: nn.Module) -> None:
    adapter = nn.Linear(8, 8)
    net[1].register_forward_hook(lambda module, args, out: out + adapter(args[0]))


def _patch_forward(net: nn.Module) -> None:
    extra, forward = nn.Linear(8, 8), net[1].forward
    net[1].forward = lambda x: forward(x) + extra(x)


@pytest.mark.parametrize(
    "change", [_adapt, _parametrize, _add_parameter, _add_hooked_adapter, _patch_forward]
)
def test_new_trained_parts_in_a_frozen_model_are_refused(
    change: Callable[[nn.Module], None],
) -> None:
    """Nothing that was planned is trained any more, and something else is."""
    model, x = nn.Sequential(*[Holding() for _ in range(4)]), torch.randn(3, 8)
    trained = cs.checkpointed(model, planned(model, x))
    model.requires_grad_(False)
    with torch.enable_grad():
        assert not trained(x).requires_grad  # as without a plan: nothing to do
    change(model)
    with pytest.raises(cs.PlanMismatchError, match="profile and plan again"):
        trained(x)
    with pytest.raises(cs.PlanMismatchError):
        trained(x.clone().requires_grad_())


def _prune(net: nn.Module) -> None:
    prune.l1_unstructured(net[0].lin, "weight", 0.5)


def _normalize(net: nn.Module) -> None:
    torch.nn.utils.spectral_norm(net[0].lin)


def _other_activation(net: nn.Module) -> None:
    net[1].act = nn.GELU()


def _other_class(net: nn.Module) -> None:
    net[1].act.__class__ = nn.GELU
    net[1].act.approximate = "none"


def _hook(net: nn.Module) -> None:
    net[3].act.register_forward_hook(lambda module, args, out: out.sigmoid() * out)


def _hook_before(net: nn.Module) -> None:
    net[3].lin.register_forward_pre_hook(lambda module, args: (args[0].exp(),))


def _half(net: nn.Module) -> None:
    net.half()


def _double(net: nn.Module) -> None:
    net.to(torch.float64)


def _unfreeze(net: nn.Module) -> None:
    net[0].requires_grad_(True)


@pytest.mark.parametrize(
    "change",
    [
        _adapt,
        _parametrize,
        _prune,
        _normalize,
        _other_activation,
        _other_class,
        _hook,
        _hook_before,
        _patch_forward,
        _half,
        _double,
        _unfreeze,
    ],
)
def test_a_model_that_computes_otherwise_than_planned_is_refused(
    change: Callable[[nn.Module], None],
) -> None:
    model, x = nn.Sequential(*[Holding() for _ in range(4)]), torch.randn(3, 8)
    model[0].requires_grad_(False)
    plan = planned(model, x)
    trained = cs.checkpointed(model, plan)
    step(trained, x)
    change(model)
    with pytest.raises(cs.PlanMismatchError):
        trained(x)


def test_layers_that_are_unfrozen_one_by_one_are_planned_for_one_by_one() -> None:
    model, x = nn.Sequential(*[Holding() for _ in range(4)]), torch.randn(3, 8)
    model[:3].requires_grad_(False)
    plan = planned(model, x)
    assert_as_plain(model, cs.checkpointed(model, plan), x)
    for k in (2, 1, 0):
        model[k].requires_grad_(True)
        with pytest.raises(cs.PlanMismatchError):
            cs.checkpointed(model, plan)
        plan = planned(model, x)
        assert_as_plain(model, cs.checkpointed(model, plan), x)


def test_a_hook_that_is_taken_off_again_leaves_the_plan_as_good_as_it_was() -> None:
    model, x = nn.Sequential(*[Holding() for _ in range(4)]), torch.randn(3, 8)
    trained = cs.checkpointed(model, planned(model, x))
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(cs.PlanMismatchError, match="a hook of a Holding was replaced, added"):
        trained(x)
    handle.remove()
    assert_as_plain(model, trained, x)


@pytest.mark.parametrize("solver", ["store_all", "every_2", "input_only"])
def test_a_frozen_model_sends_a_gradient_to_its_input(solver: str) -> None:
    model, x = nn.Sequential(*[Holding() for _ in range(4)]), torch.randn(3, 8).requires_grad_()
    model.requires_grad_(False)
    trained = cs.checkpointed(model, planned(model, x, solver))
    found, expected = (torch.autograd.grad(net(x).square().sum(), x)[0] for net in (trained, model))
    assert torch.equal(found, expected)
