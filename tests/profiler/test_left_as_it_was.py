"""`profile` and `verify` leave a model as it was, and stages that change parameters are refused."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.capture.model_state import ModelState
from tests.support.networks import planned


class Helper:
    """Keeps values for a layer, and is no module."""

    def __init__(self) -> None:
        self.calls, self.mean = 0, torch.zeros(8)


class Layer(nn.Module):
    """A layer that does something besides as well, in each forward or when it is armed."""

    def __init__(self, does: Callable[[Layer, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.does, self.armed = does, True
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("buffer", torch.zeros(8))
        self.plain, self.helper, self.calls = torch.randn(8), Helper(), 0
        self.log: list[Any] = []
        self.counts = {"calls": 0, "deep": [0]}
        self.recent, self.seen = deque([1, 2], maxlen=3), {1}
        self.ordered = OrderedDict(a=1, b=2)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.does is not None and self.armed:
            with torch.no_grad():
                self.does(self, x)
        return torch.tanh(self.lin(x))


def model_of(*does: Callable[[Layer, Tensor], Any] | None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*map(Layer, (None, *does, None)))


def batch() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def looks(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """All of a value: identities of what is in it, values of tensors, order of what has one."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        held = value.detach().flatten().tolist(), tuple(value.shape), str(value.dtype)
        return id(value), held, value.requires_grad, id(grad)
    if id(value) in seen:
        return id(value)
    seen[id(value)] = value
    if isinstance(value, dict):
        return id(value), [(k, looks(v, seen)) for k, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return id(value), [looks(v, seen) for v in value]
    if isinstance(value, set):
        return id(value), sorted(value)
    if isinstance(value, (nn.Module, Helper)):
        return id(value), looks(vars(value), seen)
    return id(value)


# -- what a stage may do and a plan can follow


def count(layer: Layer, y: Tensor) -> None:
    layer.calls += 1
    layer.helper.calls += 1
    layer.counts["calls"] += 1
    layer.counts["deep"].append(layer.calls)


def collect(layer: Layer, y: Tensor) -> None:
    layer.log.append(float(y.sum()))
    layer.recent.append(len(layer.log))
    layer.seen.add(len(layer.log))
    layer.ordered.pop("a", None)
    layer.ordered["c"] = 3


def fill_cache(layer: Layer, y: Tensor) -> None:
    if layer.cache is None:
        layer.cache = torch.ones(100)
        layer.made = torch.ones(7)


def draw_once(layer: Layer, y: Tensor) -> None:
    """Noise for all steps, in place, as the first of them begins."""
    if not layer.calls:
        layer.plain.normal_()
        layer.calls = 1
    y.add(layer.plain)


def go_to_eval(layer: Layer, y: Tensor) -> None:
    layer.lin.eval()


def hook_itself(layer: Layer, y: Tensor) -> None:
    if not layer.calls:
        layer.lin.register_forward_hook(lambda *_: None)
        layer.lin.register_full_backward_pre_hook(lambda *_: None)
        layer.register_state_dict_pre_hook(lambda *_: None)
    layer.calls = 1


def move_buffer(layer: Layer, y: Tensor) -> None:
    layer.buffer += y.sum(0)


def replace_buffer(layer: Layer, y: Tensor) -> None:
    layer.buffer = layer.buffer + y.sum(0)


def take_submodule(layer: Layer, y: Tensor) -> None:
    layer.extra = nn.Tanh()


FINE = [
    count,
    collect,
    fill_cache,
    draw_once,
    go_to_eval,
    hook_itself,
    move_buffer,
    replace_buffer,
    take_submodule,
]


@pytest.mark.parametrize("does", FINE)
def test_profile_leaves_a_model_as_it_was(does: Callable[[Layer, Tensor], None]) -> None:
    model = model_of(does, does)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, random = looks(model), torch.get_rng_state()
    cs.profile(model, batch())
    assert looks(model) == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("does", FINE)
def test_verify_leaves_a_model_as_it_was(does: Callable[[Layer, Tensor], None]) -> None:
    model = model_of(does)
    if does is go_to_eval:
        model[1].lin.eval()
    plan = planned(model, batch(), "every_stage")
    model[0].lin.weight.grad = torch.ones(8, 8)
    before = looks(model)
    cs.verify(model, plan, batch(), rounds=2)
    assert looks(model) == before


def test_what_a_stage_makes_once_and_keeps_is_reserved() -> None:
    model = model_of(fill_cache)
    kept = cs.profile(model, batch()).kept_bytes
    assert kept == cs.profile(model_of(count), batch()).kept_bytes + 400 + 28
    model(batch())
    assert cs.profile(model, batch()).kept_bytes == kept - 428


@pytest.mark.parametrize("solver", ["store_all", "every_stage"])
def test_noise_that_a_first_run_draws_in_place_is_as_in_plain_autograd(solver: str) -> None:
    def noisy() -> nn.Sequential:
        model = model_of(draw_once)
        model[1].register_forward_hook(lambda m, args, out: out * m.plain)
        return model

    plan = planned(noisy(), batch(), solver)
    results = []
    for follow in (lambda m: m, lambda m: cs.checkpointed(m, plan)):
        model = noisy()
        torch.manual_seed(5)
        for _ in range(2):
            follow(model)(batch()).square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*grads, model[1].plain, torch.get_rng_state()])
    assert all(map(torch.equal, *results))


# -- what no plan can follow


def add_to_frozen(layer: Layer, y: Tensor) -> None:
    layer.frozen += y.sum(0)


def add_by_data(layer: Layer, y: Tensor) -> None:
    layer.frozen.data.add_(1)


def other_data(layer: Layer, y: Tensor) -> None:
    layer.frozen.data = layer.frozen.data + 1


def clip_trained(layer: Layer, y: Tensor) -> None:
    layer.lin.weight.clamp_(-0.1, 0.1)


def keep_values(layer: Layer, y: Tensor) -> None:
    layer.lin.bias.copy_(layer.lin.bias.clone())


IN_PLACE = {
    add_to_frozen: r"parameter '1\.frozen'",
    add_by_data: r"parameter '1\.frozen'",
    other_data: r"parameter '1\.frozen'",
    clip_trained: r"parameter '1\.lin\.weight'",
    keep_values: r"parameter '1\.lin\.bias'",
    lambda layer, y: layer.plain.add_(1): r"the plain tensor '1\.plain'",
    lambda layer, y: layer.plain.data.add_(1): r"the plain tensor '1\.plain'",
    lambda layer, y: layer.helper.mean.add_(1): r"the plain tensor '1\.helper\.mean'",
}


@pytest.mark.parametrize(("does", "what"), IN_PLACE.items(), ids=[str(k) for k in range(8)])
def test_a_stage_that_changes_what_is_no_buffer_is_refused_in_these_words(
    does: Callable[[Layer, Tensor], None], what: str
) -> None:
    model = model_of(does, count)
    before = looks(model)
    plan = planned(model, batch())
    assert looks(model) == before
    message = rf"stage '1' changes {what} in its forward.*keep it in a buffer: register_buffer"
    with pytest.raises(cs.PlanMismatchError, match=message):
        cs.checkpointed(model, plan)
    with pytest.raises(cs.PlanMismatchError, match=message):
        cs.fit(model, batch(), budget="100%")
    assert looks(model) == before


def test_a_codebook_that_is_read_and_changed_is_refused_and_left() -> None:
    """Vector quantisation by moving averages, kept in a frozen parameter or a plain tensor."""

    class Quantised(nn.Module):
        def __init__(self, *, plain: bool) -> None:
            super().__init__()
            book = torch.randn(5, 8)
            self.book = book if plain else nn.Parameter(book, requires_grad=False)
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.lin(x)
            nearest = torch.cdist(x, self.book).argmin(1)
            q = self.book[nearest]
            with torch.no_grad():
                self.book[nearest] = 0.9 * self.book[nearest] + 0.1 * x
            return x + (q - x).detach()

    for plain in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), Quantised(plain=plain), nn.Linear(8, 8))
        before = looks(model)
        plan = planned(model, batch())
        assert looks(model) == before
        with pytest.raises(cs.PlanMismatchError, match=r"stage '1' changes .*'1\.book'"):
            cs.checkpointed(model, plan)


def test_the_reason_is_given_where_something_else_fails_because_of_it() -> None:
    class Clipping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            with torch.no_grad():
                self.weight.clamp_(-1e-3, 1e-3)  # which the backward of the linear layer needs
            return y

    model = nn.Sequential(nn.Linear(8, 8), Clipping(8, 8))
    before = looks(model)
    with pytest.raises(cs.ProfileError, match=r"stage '1' changes parameter '1\.weight'") as told:
        cs.profile(model, batch())
    assert "modified by an inplace operation" in str(told.value.__cause__)
    assert looks(model) == before


def test_an_embedding_that_renormalises_its_weight_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 8))
    before, x = looks(model), torch.randint(10, (4,))
    plan = planned(model, x)
    assert looks(model) == before
    with pytest.raises(cs.PlanMismatchError, match=r"stage '0' changes parameter '0\.weight'"):
        cs.checkpointed(model, plan)


def test_a_parameter_of_another_stage_is_watched_too() -> None:
    model = model_of(None)
    other = [model[2]]
    model[0].does = lambda layer, y: other[0].frozen.add_(1)
    before = looks(model)
    plan = planned(model, batch())
    assert looks(model) == before
    with pytest.raises(cs.PlanMismatchError, match=r"a stage changes parameter '2\.frozen'"):
        cs.checkpointed(model, plan)


def add_in_backward(layer: nn.Module, *gradients: Any) -> None:
    layer.frozen.data.add_(1)


def test_a_change_that_begins_late_or_in_the_backward_is_found() -> None:
    def late(layer: Layer, y: Tensor) -> None:
        layer.calls += 1
        if layer.calls > 6:
            layer.frozen.add_(1)

    backward = model_of(None)
    for model in (model_of(late), backward):
        if model is backward:
            model[1].register_full_backward_hook(add_in_backward)
        before = looks(model)
        plan = planned(model, batch())
        assert looks(model) == before
        with pytest.raises(cs.PlanMismatchError, match=r"changes parameter '1\.frozen'"):
            cs.checkpointed(model, plan)


def replace_parameter(layer: Layer, y: Tensor) -> None:
    layer.frozen = nn.Parameter(layer.frozen + 1, requires_grad=False)


def make_parameter(layer: Layer, y: Tensor) -> None:
    layer.new = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("does", [replace_parameter, make_parameter])
def test_a_stage_that_puts_parameters_in_place_is_refused(
    does: Callable[[Layer, Tensor], None],
) -> None:
    model = model_of(does)
    before = looks(model)
    with pytest.raises(
        cs.ProfileError,
        match=r"stage '1' puts another tensor in the place of parameter '1\.(froz|new)",
    ):
        cs.profile(model, batch())
    assert looks(model) == before


def test_the_refusal_of_a_hidden_state_names_what_changes() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = torch.zeros(8)

        def forward(self, x: Tensor) -> Tensor:
            self.memory = self.memory + x.detach().sum(0)
            return x + self.memory

    model = nn.Sequential(nn.Linear(8, 8), Remembering())
    before = looks(model)
    with pytest.raises(cs.ProfileError, match=r"gives another result.*changes '1\.memory'"):
        cs.profile(model, batch())
    assert looks(model) == before


def test_plans_on_disk_remember_that_a_model_is_unfit(tmp_path: Any) -> None:
    model = model_of(add_to_frozen)
    planned(model, batch()).save(tmp_path / "plan.json")
    with pytest.raises(cs.PlanMismatchError, match="keep it in a buffer"):
        cs.checkpointed(model, cs.Plan.load(tmp_path / "plan.json"))


# -- however it ends


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit, MemoryError])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 6, 9])
def test_it_is_left_as_it_was_when_a_stage_fails(error: type[BaseException], call: int) -> None:
    calls = [0]

    def fail(layer: Layer, y: Tensor) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise error

    def all_sorts(layer: Layer, y: Tensor) -> None:
        for does in (count, collect, fill_cache, add_to_frozen, add_by_data, move_buffer):
            does(layer, y)

    model = model_of(all_sorts, fail)
    model.insert(0, nn.LSTM(8, 8))
    model.insert(1, First())
    before = looks(model)
    expected = (error, cs.ProfileError) if issubclass(error, Exception) else error
    with pytest.raises(expected):
        cs.profile(model, batch())
    assert looks(model) == before


class First(nn.Module):
    """The output of a recurrent layer, without its state."""

    def forward(self, x: Any) -> Tensor:
        return x[0]


class Interrupting:
    """Ctrl-C at a given line of some files, as a tracer."""

    def __init__(self, files: tuple[str, ...], line: int = -1) -> None:
        self.files, self.line, self.count = files, line, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return self.at_line if frame.f_code.co_filename.endswith(self.files) else None

    def at_line(self, frame: FrameType, event: str, arg: object) -> Any:
        self.count += event == "line"
        if event == "line" and self.count == self.line:
            raise KeyboardInterrupt
        return self.at_line

    def run(self, function: Callable[[], object]) -> bool:
        """Whether the function was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


@pytest.mark.parametrize(
    "files",
    [("profile.py", "survey.py", "stage_probe.py"), ("model_state.py", "parameter_swap.py")],
)
def test_it_is_left_as_it_was_by_ctrl_c_at_any_line(files: tuple[str, ...]) -> None:
    """Also while it is being put back."""
    model = model_of(add_to_frozen, count)
    del model[3]
    before = looks(model)

    def measured() -> object:
        return cs.profile(model, batch())

    counting = Interrupting(files)
    assert not counting.run(measured)
    lines = counting.count
    assert lines > 100
    ends = range(max(1, lines - 700), lines, 29)
    for line in (*range(1, lines, max(1, lines // 20)), *ends):
        Interrupting(files, line).run(measured)
        assert looks(model) == before, (line, lines)


# -- a step in which it begins


@pytest.mark.parametrize("solver", ["store_all", "every_stage", "input_only"])
def test_a_change_that_begins_in_a_step_is_an_error_that_says_so(solver: str) -> None:
    for does in (add_to_frozen, clip_trained):
        model = model_of(does)
        model[1].armed = False
        trained = cs.checkpointed(model, planned(model, batch(), solver))
        trained(batch()).sum().backward()
        model[1].armed = True
        with pytest.raises(
            cs.ExecutionError,
            match=r"parameter '1\..*' of stage '1' was changed in place in the forward pass: a "
            r"stage changes it in its forward.*register_buffer",
        ):
            trained(batch())
        model[1].armed = False
        trained(batch()).sum().backward()


@pytest.mark.parametrize("solver", ["every_stage", "input_only"])
def test_a_change_that_begins_as_a_stage_runs_again_is_an_error(solver: str) -> None:
    model = model_of(add_to_frozen)
    model[1].armed = False
    trained = cs.checkpointed(model, planned(model, batch(), solver))
    y = trained(batch()).sum()
    model[1].armed = True
    with pytest.raises(cs.ExecutionError, match=r"'1\.frozen' of stage '1' .* as it ran again"):
        y.backward()


@pytest.mark.parametrize("solver", ["store_all", "every_stage"])
def test_a_parameter_that_is_replaced_in_a_step_is_an_error(solver: str) -> None:
    model = model_of(replace_parameter)
    model[1].armed = False
    trained = cs.checkpointed(model, planned(model, batch(), solver))
    model[1].armed = True
    held = model[1].frozen
    with pytest.raises(cs.ExecutionError, match=r"'1\.frozen' of stage '1' was replaced: a stage"):
        trained(batch())
    assert model[1].frozen is held


def test_an_optimizer_between_forward_and_backward_is_still_blamed() -> None:
    model = model_of(None)
    trained = cs.checkpointed(model, planned(model, batch()))
    y = trained(batch()).sum()
    with torch.no_grad():
        model[1].frozen.add_(1)
    with pytest.raises(cs.ExecutionError, match=r"call backward before optimizer\.step"):
        y.backward()


def test_an_optimizer_that_steps_within_the_backward_is_let_be() -> None:
    """As gradients become complete: `register_post_accumulate_grad_hook`."""

    def trained_by(follow: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        model = model_of(None, None)
        followed = follow(model)

        def update(parameter: Tensor) -> None:
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            followed(batch()).square().sum().backward()
        return [p.detach() for p in model.parameters()]

    model = model_of(None, None)
    plan = planned(model, batch(), "every_2")
    found = trained_by(lambda m: cs.checkpointed(m, plan))
    assert all(map(torch.equal, found, trained_by(lambda m: m)))


# -- the mechanism


def test_states_are_put_back_whatever_tensors_became() -> None:
    layer = Layer()
    layer.round = [layer]
    layer.round.append(layer.round)  # a circle
    layer.many = (torch.zeros(3), [torch.ones(2)])
    before = looks(layer)
    state = ModelState([*layer.modules()])
    with torch.no_grad():
        layer.frozen.data = torch.zeros(3, 3)
        layer.buffer.resize_(2)
        layer.lin.weight.zero_()
        layer.many[1][0].fill_(float("nan"))
        layer.many[1].append(5)
    layer.lin.bias.requires_grad_(False)
    layer.lin.bias.grad = torch.ones(8)
    del layer.plain, layer.lin
    layer.buffer = torch.ones(1)
    layer.register_parameter("another", nn.Parameter(torch.ones(1)))
    state.put_back()
    assert looks(layer) == before


def test_what_has_not_changed_is_not_touched() -> None:
    layer = Layer()
    layer.frozen.data.fill_(float("nan"))
    versions = [t._version for t in (*layer.parameters(), *layer.buffers(), layer.plain)]
    state = ModelState([*layer.modules()])
    layer.buffer.add_(1)
    state.put_back()
    now = [t._version for t in (*layer.parameters(), layer.plain)]
    assert now == [*versions[:3], versions[-1]]
