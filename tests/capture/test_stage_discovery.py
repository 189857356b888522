"""A module becomes the chain of stages that its structure says, and computes the same."""

import copy
import io
import pickle
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.base.errors import ProfileError
from ckptsched.capture.inspection import Inspection
from ckptsched.capture.stage_discovery import (
    FusedStage,
    ModuleStage,
    Outline,
    StageCall,
    StagedModule,
    TracedBlock,
    trace,
)
from ckptsched.ode import ODEBlock


def names(model: nn.Module) -> list[list[str]]:
    return [[stage.name for stage in block.stages] for block in trace(Outline.of(model))]


def run(blocks: tuple[TracedBlock, ...], x: Tensor) -> Tensor:
    for block in blocks:
        for stage in block.stages:
            x = stage(x)
    return x


class Half(StageCall):
    """Half of a `Twice`, written by a user."""

    __slots__ = ("index", "module")

    def __init__(self, module: "Twice", index: int) -> None:
        self.prefix = ""
        self.module = module
        self.index = index

    def __call__(self, x: Tensor) -> Tensor:
        return self.module.linear(x)

    @property
    def label(self) -> str:
        return f"half[{self.index}]"

    @property
    def key(self) -> tuple[str, int]:
        return ("half", id(self.module))


class Twice(StagedModule):
    """One linear layer, applied `times` times."""

    def __init__(self, width: int, times: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.times = times

    def stages(self) -> list[StageCall]:
        return [Half(self, index) for index in range(self.times)]


class Residual(nn.Sequential):
    """A subclass whose forward is not that of its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_each_child_is_a_block_and_nested_sequentials_are_flattened() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))
    model = nn.Sequential(OrderedDict(entry=nn.Linear(3, 3), layer=inner, exit=nn.Tanh()))
    assert names(model) == [["entry"], ["layer.0", "layer.1.0", "layer.1.1"], ["exit"]]
    blocks = trace(Outline.of(model))
    assert [block.name for block in blocks] == ["entry", "layer", "exit"]
    assert [block.module for block in blocks] == list(model)


def test_staged_modules_bring_their_own_stages_at_any_depth() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), ODEBlock(nn.Tanh(), steps=2)))
    assert names(model) == [["0"], ["1.0", "1.1.step[0]", "1.1.step[1]"]]
    assert names(Twice(3)) == [["half[0]", "half[1]"]]
    assert trace(Outline.of(Twice(3)))[0].name == ""


def test_a_staged_module_runs_its_stages_by_default() -> None:
    torch.manual_seed(0)
    twice, x = Twice(3), torch.randn(2, 3)
    assert torch.equal(twice(x), twice.linear(twice.linear(x)))


def test_any_other_module_is_a_chain_of_one_stage() -> None:
    layer = nn.TransformerEncoderLayer(8, 2)
    (block,) = trace(Outline.of(layer))
    assert [stage.name for stage in block.stages] == [""]
    assert block.module is layer
    assert block.stages[0].module is layer


def test_nothing_is_run() -> None:
    class Explosive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("ran")

    assert names(nn.Sequential(Explosive(), ODEBlock(Explosive(), steps=2)))[0] == ["0"]


def test_a_sequential_with_its_own_forward_is_one_stage() -> None:
    assert names(nn.Sequential(Residual(nn.Linear(3, 3), nn.Tanh()))) == [["0"]]
    overridden = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    overridden.forward = lambda x: x  # type: ignore[method-assign]
    assert names(nn.Sequential(overridden)) == [["0"]]


def test_a_subclass_that_keeps_the_forward_is_flattened() -> None:
    class Named(nn.Sequential):
        pass

    assert names(Named(nn.Linear(3, 3), nn.Tanh())) == [["0"], ["1"]]


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "forward_pre", "backward", "backward_pre"],
)
@pytest.mark.parametrize("container", [nn.Sequential(nn.Tanh(), nn.Tanh()), Twice(3)])
def test_a_container_with_hooks_is_one_stage(register, container: nn.Module) -> None:
    container = copy.deepcopy(container)
    handle = register(container)
    assert names(nn.Sequential(container)) == [["0"]]
    assert names(container) == [[""]]
    handle.remove()
    assert len(names(nn.Sequential(container))[0]) == 2


def test_hooks_on_a_child_do_not_matter() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Tanh())
    model[0].register_forward_hook(lambda *_: None)
    assert names(model) == [["0"], ["1"]]


def test_a_module_used_twice_is_there_twice_and_shares_its_key() -> None:
    linear, block = nn.Linear(3, 3), ODEBlock(nn.Tanh(), steps=2)
    model = nn.Sequential(linear, block, linear, block, nn.Linear(3, 3))
    keys = [stage.key for one in trace(Outline.of(model)) for stage in one.stages]
    assert names(model)[2:4] == [["2"], ["3.step[0]", "3.step[1]"]]
    assert keys[0] == keys[3] != keys[6]
    assert len({*keys[1:3], *keys[4:6]}) == 1
    assert [stage.key for one in trace(Outline.of(model)) for stage in one.stages] == keys


def test_keys_of_fused_stages_are_those_of_their_parts() -> None:
    relu = nn.ReLU(inplace=True)
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, relu, linear, relu, linear)
    (a,), (b,), (c,) = (block.stages for block in trace(Outline.of(model)))
    assert a.key == b.key != c.key


def test_an_empty_model_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"Sequential has no modules.*at least one module"):
        trace(Outline.of(nn.Sequential()))
    with pytest.raises(ProfileError, match=r"Twice \(1\) lists no stages.*at least one"):
        trace(Outline.of(nn.Sequential(nn.Tanh(), Twice(3, times=0))))


def test_a_stage_that_is_none_is_refused() -> None:
    class Bare(StagedModule):
        def stages(self) -> Any:
            return [nn.Tanh()]

    with pytest.raises(ProfileError, match=r"stages\(\) of Bare \(1\) lists a Tanh.*ModuleStage"):
        trace(Outline.of(nn.Sequential(nn.Tanh(), Bare())))


def test_an_empty_sequential_inside_is_an_identity() -> None:
    assert names(nn.Sequential(nn.Tanh(), nn.Sequential(), nn.Tanh())) == [["0"], ["1"], ["2"]]


IN_PLACE = nn.ReLU(inplace=True)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ([nn.Tanh(), IN_PLACE, nn.Tanh()], [["0+1"], ["2"]]),
        ([nn.Tanh(), nn.Sequential(IN_PLACE, nn.Tanh())], [["0+1.0"], ["1.1"]]),
        ([nn.Sequential(nn.Tanh(), nn.SiLU(inplace=True))], [["0.0+0.1"]]),
        ([nn.Tanh(), IN_PLACE, nn.Dropout(inplace=True)], [["0+1+2"]]),
        # A view hands the storage on, so the state before it is in danger as well.
        ([nn.Tanh(), nn.Flatten(), IN_PLACE], [["0+1+2"]]),
        ([nn.Tanh(), nn.Sequential(nn.Identity()), nn.Dropout(), IN_PLACE], [["0+1.0+2+3"]]),
        ([nn.Tanh(), nn.Sequential(), IN_PLACE], [["0+1+2"]]),
        # Nothing comes before: the caller's input is changed, as without us.
        ([IN_PLACE, nn.Tanh()], [["0"], ["1"]]),
        ([nn.Flatten(), IN_PLACE, nn.Tanh()], [["0+1"], ["2"]]),
        ([Twice(3), IN_PLACE], [["0.half[0]", "0.half[1]+1"]]),
        ([nn.Tanh(), nn.ReLU(inplace=False)], [["0"], ["1"]]),
    ],
)
def test_in_place_modules_join_the_stage_before(
    model: list[nn.Module], expected: list[list[str]]
) -> None:
    assert names(nn.Sequential(*model)) == expected


def test_a_hooked_sequential_that_starts_in_place_joins_the_stage_before() -> None:
    inner = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))
    inner.register_forward_hook(lambda *_: None)
    assert names(nn.Sequential(nn.Tanh(), inner)) == [["0+1"]]


def test_a_fused_block_holds_the_parameters_of_all_its_stages() -> None:
    class Scale(nn.Module):
        inplace = True

        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(self.factor)

    model = nn.Sequential(nn.Linear(3, 3), Scale(), nn.Linear(3, 3))
    first, second = trace(Outline.of(model))
    assert set(first.module.parameters()) == {*model[0].parameters(), model[1].factor}
    assert set(first.stages[0].module.parameters()) == set(first.module.parameters())
    assert second.module is model[2]


def test_no_state_between_stages_is_changed_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.SiLU(inplace=True),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.Linear(4 * 36, 3)),
        Twice(3),
        nn.Identity(),
        nn.Hardswish(inplace=True),
    )
    state = torch.randn(2, 2, 8, 8)
    for block in trace(Outline.of(model)):
        for stage in block.stages:
            before = state.clone()
            after = stage(state)
            assert torch.equal(state, before), stage.name
            state = after


LEAVES = st.sampled_from(
    [
        lambda: nn.Linear(3, 3),
        nn.Tanh,
        nn.Identity,
        nn.Sequential,
        lambda: nn.ReLU(inplace=True),
        lambda: Twice(3),
        lambda: ODEBlock(nn.Tanh(), "heun", steps=2),
        lambda: Residual(nn.Tanh()),
    ]
)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


def build(tree: object) -> nn.Module:
    if isinstance(tree, list):
        return nn.Sequential(*map(build, tree))
    module = tree()  # type: ignore[operator]
    assert isinstance(module, nn.Module)
    return module


@given(tree=st.lists(TREES, min_size=1, max_size=5))
def test_the_stages_compute_what_the_model_computes(tree: list[object]) -> None:
    torch.manual_seed(0)
    model = build(tree).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    blocks = trace(Outline.of(model))
    assert torch.equal(run(blocks, x.clone()), model(x.clone()))
    held = {id(p) for block in blocks for p in block.module.parameters()}
    assert held == {id(p) for p in model.parameters()}
    for block in blocks:
        own = {id(p) for p in block.module.parameters()}
        assert all(id(p) in own for stage in block.stages for p in stage.module.parameters())
    every = [stage.name for block in blocks for stage in block.stages]
    assert len(set(every)) == len(every)


def test_names_are_paths_in_the_state_dict() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))))
    found = [stage.name for block in trace(Outline.of(model)) for stage in block.stages]
    assert all(f"{name}.weight" in model.state_dict() for name in found)


def test_stages_are_copied_and_pickled_with_their_model() -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), nn.ReLU(inplace=True), ODEBlock(nn.Linear(3, 3), steps=2)
    )
    pair = (model, trace(Outline.of(model)))
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(pair),
        pickle.loads(pickle.dumps(pair)),
        torch.load(buffer, weights_only=False),
    ]
    for other_model, blocks in copies:
        assert isinstance(blocks[0].stages[0], FusedStage)
        assert {id(p) for block in blocks for p in block.module.parameters()} == {
            id(p) for p in other_model.parameters()
        }
        with torch.no_grad():
            other_model[0].weight.zero_()
            other_model[2].f.weight.zero_()
        x = torch.ones(1, 3)
        assert torch.equal(run(blocks, x), other_model(x))
        assert not torch.equal(run(blocks, x), model(x))


def test_a_long_chain_is_small_objects() -> None:
    (block,) = trace(Outline.of(ODEBlock(nn.Tanh(), steps=100_000)))
    assert len(block.stages) == 100_000
    assert block.stages[-1].name == "step[99999]"
    assert sys.getsizeof(block.stages[0]) <= 100
    assert not hasattr(block.stages[0], "__dict__")
    assert not hasattr(ModuleStage(nn.Tanh()), "__dict__")


def shared_and_nested() -> nn.Sequential:
    """A layer that occurs twice, a buffer and a parameter that two modules share, a bare name."""
    layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    other = nn.BatchNorm1d(4)
    other.running_mean = norm.running_mean
    return nn.Sequential(layer, nn.Sequential(norm, layer, tied), other, nn.Tanh())


def test_an_inspection_names_what_torch_names() -> None:
    model = shared_and_nested()
    found = Inspection.of(model)
    assert list(zip(found.paths, found.modules, strict=True)) == list(model.named_modules())
    named = [(name, tensor) for _, name, tensor in found.named_tensors()]
    expected = [*model.named_parameters(), *model.named_buffers()]
    assert [name for name, _ in named] == [name for name, _ in expected]
    assert all(a is b for (_, a), (_, b) in zip(named, expected, strict=True))
    assert found.slots.parameters() == list(model.parameters())
    assert found.name_of((model[1][0], "running_var")) == "1.0.running_var"
    assert found.name_of((nn.BatchNorm1d(4), "running_var")) == ""
    assert found.buffer_places(["2.running_var"]) == [(model[2], "running_var")]


def test_fit_walks_the_tree_of_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
    walks, walk = 0, nn.Module.named_modules

    def counted(module: nn.Module, *args: object, **kwargs: object) -> object:
        nonlocal walks
        walks += module is model
        return walk(module, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    trained = cs.fit(model, torch.randn(2, 4), budget="100%")
    assert walks == 1
    trained(torch.randn(2, 4)).sum().backward()
    assert walks == 1
