"""Models in wrappers: taken off, refused by name, or as good as the model itself."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from tests.support.networks import planned


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])


def batch() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def _traced(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, batch())


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "compiled": (lambda m: torch.compile(m, backend="eager"), "compile the stages"),
    "compiled in place": (_compiled_in_place, "compile the stages"),
    "scripted": (_scripted, "give the Python module that it was made from"),
    "traced": (_traced, "give the Python module that it was made from"),
    "DataParallel": (nn.DataParallel, r"give the module in it \(model\.module\)"),
    "DistributedDataParallel": (
        nn.parallel.DistributedDataParallel,
        r"DistributedDataParallel\(ckptsched\.checkpointed\(model\.module, plan\)\)",
    ),
}


def _calls(plan: cs.Plan) -> dict[str, Callable[[nn.Module], object]]:
    return {
        "profile": lambda m: cs.profile(m, batch()),
        "estimate": lambda m: cs.profile(m, batch(), fake=True),
        "plan": lambda m: cs.plan(m, batch(), budget="100%"),
        "fit": lambda m: cs.fit(m, batch(), budget="100%"),
        "checkpointed": lambda m: cs.checkpointed(m, plan),
        "verify": lambda m: cs.verify(m, plan, batch()),
    }


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.usefixtures("one_process")
def test_what_cannot_be_unwrapped_is_refused_by_name(name: str) -> None:
    wrap, advice = WRAPPERS[name]
    plan = planned(net(), batch())
    for call in _calls(plan).values():
        with pytest.raises((cs.ProfileError, cs.PlanMismatchError), match=advice):
            call(wrap(net()))


@pytest.mark.parametrize("name", ["scripted", "traced", "DataParallel", "DistributedDataParallel"])
@pytest.mark.usefixtures("one_process")
def test_parts_that_cannot_be_stages_are_refused_with_their_path(name: str) -> None:
    wrap, advice = WRAPPERS[name]
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Tanh(), wrap(net())))
    with pytest.raises(cs.ProfileError, match=rf"'1\.1' of the model is a .*{advice}"):
        cs.profile(model, batch())


def test_what_is_no_module_is_refused() -> None:
    plan = planned(net(), batch())
    for name in ("profile", "checkpointed", "verify"):
        with pytest.raises(cs.CkptschedError, match=rf"{name} needs an nn\.Module, found a fun"):
            _calls(plan)[name](lambda x: x)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_parts_and_containers_are_stages() -> None:
    model = net()
    model[1].compile(backend="eager")
    model[2] = torch.compile(model[2], backend="eager")
    chain = cs.profile(model, batch())
    names = [chain.stage_name(i) for i in range(1, len(chain) + 1)]
    assert names == ["0.0", "0.1", "1", "2", "3.0", "3.1"]


def test_a_model_that_follows_a_plan_is_planned_as_the_model_itself() -> None:
    model, x = net(), torch.randn(64, 8)
    first = cs.fit(model, x, budget="100%")
    again = cs.fit(first, x, budget="80%")
    plan = cs.plan_of(again)
    assert plan.budget_text == "80%"
    assert len(plan.chain) == 8
    assert again is model
    assert len(cs.profile(cs.checkpointed(first, plan), x)) == 8
    assert cs.verify(again, plan, x).ok


def test_a_part_that_follows_a_plan_of_its_own_goes_on_following_it() -> None:
    x = torch.randn(64, 8)
    inner = cs.checkpointed(part := net(), planned(part, x.clone().requires_grad_(), "every_stage"))
    model = nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8))
    plan = planned(model, x, "every_2")
    assert len(plan.chain) == 3
    found = cs.verify(model, plan, x)
    assert found.ok
    assert found.measured_peak_bytes <= plan.peak_bytes


# -- state_dict


class Extra(nn.Sequential):
    """A root that does everything in a way of its own."""

    _version = 7

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.epoch, self.loaded = 3, []

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((n, p) for n, p in super().named_parameters(*args, **kwargs) if "bias" not in n)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "mine"] = torch.ones(1)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.loaded.append((prefix, args[0].get("version"), int(state.pop(prefix + "mine"))))
        super()._load_from_state_dict(state, prefix, *args)


def extra() -> tuple[Extra, cs.Checkpointed, list[str]]:
    """A model with hooks of all kinds, registered on it before and after, and on what stands."""
    log: list[str] = []
    model = Extra(*net())

    def register(one: nn.Module, name: str) -> None:
        one.register_state_dict_pre_hook(lambda m, *_: log.append(f"{name} before saving"))
        one.register_state_dict_post_hook(
            lambda m, state, prefix, _: state.__setitem__(f"{prefix}{name}", torch.zeros(1))
        )
        one.register_load_state_dict_pre_hook(
            lambda m, state, prefix, *_: state.pop(f"{prefix}{name}")
        )
        one.register_load_state_dict_post_hook(lambda m, _: log.append(f"{name} loaded"))

    register(model, "first")
    trained = cs.checkpointed(model, planned(model, batch()))
    register(model, "second")
    register(trained, "third")
    return model, trained, log


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    assert one._metadata == other._metadata
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]


def test_the_state_dict_is_the_models_own_in_everything() -> None:
    model, trained, log = extra()
    assert_same_state(trained.state_dict(), model.state_dict())
    assert log == [f"{name} before saving" for name in ("first", "second", "third")] * 2
    assert {"_extra_state", "mine", "first", "second", "third"} <= set(trained.state_dict())
    assert trained.state_dict()._metadata[""] == {"version": 7}
    assert_same_state(trained.state_dict(prefix="a."), model.state_dict(prefix="a."))
    assert trained.state_dict(keep_vars=True)["0.0.weight"] is model[0][0].weight


@pytest.mark.parametrize("order", ["to trained", "to model"])
@pytest.mark.parametrize("assign", [False, True])
def test_states_are_loaded_strictly_both_ways(order: str, assign: bool) -> None:
    model, trained, log = extra()
    source, target = copy.deepcopy(model), trained if order == "to trained" else model
    for parameter in nn.Sequential.parameters(source):
        parameter.data.add_(1)
    source.epoch = 9
    log.clear()
    found = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert [line for line in log if "loaded" in line] == [
        f"{name} loaded" for name in ("first", "second", "third")
    ]
    assert model.epoch == 9
    assert model.loaded == [("", 7, 1)]
    assert torch.equal(model[0][0].weight, source[0][0].weight)
    state = source.state_dict()
    del state["1.0.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict(state)
    trained(batch()).sum().backward()


def test_it_holds_where_the_planned_model_is_part_of_another() -> None:
    model, trained, _ = extra()
    whole, plain = nn.ModuleDict({"a": trained}), nn.ModuleDict({"a": model})
    assert_same_state(whole.state_dict(), plain.state_dict())
    state = plain.state_dict()
    model.epoch = 0
    whole.load_state_dict(state)
    assert (model.epoch, model.loaded) == (3, [("a.", 7, 1)])


def test_what_a_root_lists_and_moves_is_the_models_own() -> None:
    model, trained, _ = extra()
    names = [name for name, _ in trained.named_parameters()]
    assert names == [f"{k}.0.weight" for k in range(4)]
    assert list(trained.parameters()) == list(model.parameters())
    assert trained.half() is trained
    assert model[0][0].bias.dtype == torch.float16
    recurrent = nn.LSTM(3, 3)
    x = torch.randn(2, 1, 3)
    stands = cs.checkpointed(recurrent, planned(recurrent, x)).double()
    with torch.no_grad():
        assert stands(x.double())[0].dtype == torch.float64


def test_copies_keep_extra_state_and_hooks() -> None:
    model, trained, _ = extra()
    for twin in (copy.deepcopy(trained),):
        assert_same_state(twin.state_dict(), model.state_dict())
        twin.model.epoch = 5
        assert twin.state_dict()["_extra_state"] == {"epoch": 5}
        assert trained.state_dict()["_extra_state"] == {"epoch": 3}
    plain = Extra(*net())
    stands = cs.checkpointed(plain, planned(plain, batch()))
    file = io.BytesIO()
    torch.save(stands, file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=False).state_dict(), plain.state_dict())


# -- inside torch.utils.checkpoint


def deep() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(2)
    parts = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2)) for _ in range(8)]
    return nn.Sequential(*parts), torch.randn(256, 16).requires_grad_()


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Any]:
    model.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    call(x).square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters()), torch.get_rng_state()]


def most_said(told: warnings.WarningMessage, plan: cs.Plan) -> int:
    """The most bytes that a warning speaks of; it names the projected ones, too."""
    assert told.category is cs.BudgetWarning
    projected, most = (int(word) for word in str(told.message).split() if word.isdecimal())
    assert projected == plan.peak_bytes
    return most


@pytest.mark.parametrize("solver", ["store_all", "every_2", "input_only", "chain_dp"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_plan_holds_inside_torch_checkpoint(solver: str, reentrant: bool) -> None:
    model, x = deep()
    plan = planned(model, x, solver)
    trained = cs.checkpointed(model, plan)

    def inside(y: Tensor) -> Tensor:
        return checkpoint(trained, y, use_reentrant=reentrant)

    expected = gradients(model, model, x)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = gradients(model, inside, x)
        assert all(map(torch.equal, found, expected))
        model.zero_grad()
        x.grad = None
        with default_meter("cpu").window() as window:
            loss = torch.log_softmax(inside(x), -1).square().mean()
            loss.backward()
    allowed = plan.budget_bytes
    if reentrant:  # which holds the output of the run before
        allowed = most_said(told[-1], plan)
    else:
        assert not told
    assert window.measurement.peak_bytes <= allowed


def test_a_function_that_torch_runs_again_around_a_plan_says_what_it_takes() -> None:
    model, x = deep()
    plan = planned(model, x, "every_2")
    trained, head = cs.checkpointed(model, plan), nn.Linear(16, 16)

    def function(y: Tensor) -> Tensor:
        return head(trained(y)).sin()

    expected = gradients(model, lambda y: head(model(y)).sin(), x)
    with pytest.warns(cs.BudgetWarning, match="bytes were projected, and together") as told:
        found = gradients(model, lambda y: checkpoint(function, y, use_reentrant=False), x)
    assert all(map(torch.equal, found, expected))
    most = most_said(told[0], plan)
    model.zero_grad()
    with warnings.catch_warnings(), default_meter("cpu").window() as window:
        warnings.simplefilter("ignore")
        checkpoint(function, x, use_reentrant=False).sum().backward()
    own = sum(p.nbytes for p in head.parameters()) + 4 * x.nbytes  # of the function around it
    assert window.measurement.peak_bytes <= most + own


def test_hooks_of_others_are_back_after_a_plan_inside_torch_checkpoint() -> None:
    model, x = deep()
    trained = cs.checkpointed(model, planned(model, x))
    packed: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(1)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        checkpoint(trained, x, use_reentrant=False).sum().backward()
        before = len(packed)
        (x.sin() * x).sum()
        assert len(packed) > before


def test_where_torch_does_not_tell_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = deep()
    trained = cs.checkpointed(model, planned(model, x))
    expected = gradients(model, model, x)
    monkeypatch.setattr(
        "ckptsched.torch_state.torch_modes.torch", SimpleNamespace(_C=SimpleNamespace())
    )
    found = gradients(model, lambda y: checkpoint(trained, y, use_reentrant=False), x)
    assert all(map(torch.equal, found, expected))
