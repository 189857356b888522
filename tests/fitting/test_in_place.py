"""Models that are fitted in place: what they stay, and which plan each call follows."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.fitting.in_place import MOST_KINDS
from ckptsched.memory.meters import default_meter
from tests.capture.recording.test_stages import Language, language, unet

WORDS = 50


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, *args: Any, seed: int = 1, **kwargs: Any) -> list[Tensor | None]:
    """Those of the parameters after one step, and the output's numbers."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = model(*args, **kwargs)
    loss = output["loss"] if isinstance(output, dict) else output.square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return len(one) == len(other) and all(
        (a is None) is (b is None) and (a is None or b is None or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def peak(model: nn.Module, x: Tensor) -> int:
    """Bytes of one step at its peak."""
    model.zero_grad(set_to_none=True)
    with default_meter(x.device).window() as window:
        loss = model(x, labels=x)["loss"]
        window.mark()
        loss.backward()
    return window.phases[0].peak_bytes


@pytest.fixture
def fitted() -> tuple[Language, Language]:
    """A language model that is fitted in place, and its twin by plain autograd."""
    torch.manual_seed(0)
    plain = Language()
    model = copy.deepcopy(plain)
    x = ids(4, 16)
    cs.fit(model, x, kwargs={"labels": x}, budget="70%")
    return model, plain


def test_it_stays_the_model_that_it_is(fitted: tuple[Language, Language]) -> None:
    model, plain = fitted
    assert type(model) is Language
    assert "forward" in vars(model)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert repr(model) == repr(plain)
    plan = cs.plan_of(model)
    assert plan.overhead > 0
    x = ids(4, 16)
    assert cs.verify(model, plan, x, kwargs={"labels": x}).ok
    with pytest.raises(cs.PlanMismatchError, match="the plan is for a call with"):
        cs.verify(model, plan, ids(4, 16), kwargs={"labels": ids(4, 16)})  # two tensors
    assert cs.unfit(model) is model
    assert "forward" not in vars(model)
    with pytest.raises(cs.PlanMismatchError, match="follows no plan; fit it"):
        cs.plan_of(model)


@pytest.mark.parametrize("made", [language, unet])
def test_steps_are_those_of_plain_autograd_within_the_budget(made: Any) -> None:
    torch.manual_seed(0)
    plain, args, kwargs = made()
    for share in (0.0, 0.4, 1.0):
        model = copy.deepcopy(plain)
        whole = cs.plan(plain, *args, kwargs=kwargs, budget="100%")
        room = whole.store_all_bytes - whole.least_budget_bytes
        budget = whole.least_budget_bytes + int(share * room)
        cs.fit(model, *args, kwargs=kwargs, budget=budget)
        for seed in (1, 2):
            assert same(
                gradients(model, *args, seed=seed, **kwargs),
                gradients(plain, *args, seed=seed, **kwargs),
            )
        assert all(map(torch.equal, model.buffers(), plain.buffers()))
        assert cs.plan_of(model).peak_bytes <= budget


def test_copies_train_and_pickles_are_the_model_alone(fitted: tuple[Language, Language]) -> None:
    model, plain = fitted
    twin = copy.deepcopy(model)
    assert cs.plan_of(twin).budget_bytes == cs.plan_of(model).budget_bytes
    x = ids(4, 16)
    expected = gradients(plain, x, labels=x)
    assert same(gradients(twin, x, labels=x), expected)
    assert all(p.grad is None for p in model.parameters())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for loaded in (
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        with pytest.raises(cs.PlanMismatchError):
            cs.plan_of(loaded)
        assert same(gradients(loaded, x, labels=x), expected)
        again = copy.deepcopy(loaded)
        assert again.forward.__self__ is again


def test_without_gradients_and_in_eval_mode_the_forward_is_the_plain_one(
    fitted: tuple[Language, Language], caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = fitted
    with caplog.at_level(logging.INFO, "ckptsched"):
        with torch.no_grad():
            torch.manual_seed(3)
            found = model(ids(9, 5), labels=ids(9, 5))["logits"]
            torch.manual_seed(3)
            assert torch.equal(found, plain(ids(9, 5), labels=ids(9, 5))["logits"])
        model.eval()
        plain.eval()
        assert same(
            gradients(model, ids(9, 5), labels=ids(9, 5)),
            gradients(plain, ids(9, 5), labels=ids(9, 5)),
        )
    assert not caplog.records


def test_batches_that_are_nowhere_larger_follow_the_same_schedule(
    fitted: tuple[Language, Language], caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = fitted
    budget = cs.plan_of(model).budget_bytes
    with caplog.at_level(logging.INFO, "ckptsched"):
        for rows, length in ((4, 9), (1, 16), (3, 2), (4, 16)):
            x = ids(rows, length)
            assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))
            assert peak(model, x) <= budget
    assert [r.levelname for r in caplog.records] == ["INFO"] * 3
    assert all("same schedule" in r.getMessage() for r in caplog.records)


def test_larger_batches_are_planned_within_the_same_budget(
    fitted: tuple[Language, Language], caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = fitted
    budget = cs.plan_of(model).budget_bytes
    for rows, length in ((5, 16), (4, 20)):
        x = ids(rows, length)
        assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))
        assert peak(model, x) <= budget
        assert f"[{rows}, {length}]" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2  # once a shape
    with pytest.raises(cs.InfeasibleBudgetError, match="the least that works"):
        model(ids(64, 32), labels=ids(64, 32))
    x = ids(4, 16)
    assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))


def test_calls_of_a_new_kind_can_be_refused_or_run_plainly() -> None:
    torch.manual_seed(0)
    plain = Language()
    x, other = ids(4, 16), ids(4, 20)
    model = copy.deepcopy(plain)
    cs.fit(model, x, kwargs={"labels": x}, budget="70%", on_new_input="refuse")
    with pytest.raises(cs.PlanMismatchError, match=r"\[4, 20\].*planned for .*\[4, 16\]"):
        model(other, labels=other)
    assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))
    cs.fit(model, x, kwargs={"labels": x}, budget="70%", on_new_input="plain")
    with pytest.warns(cs.BudgetWarning, match=r"plain autograd.*\d+ bytes"):
        found = gradients(model, other, labels=other)
    assert same(found, gradients(plain, other, labels=other))
    with pytest.raises(cs.ExecutionError, match="'plan', 'refuse' or 'plain'"):
        cs.fit(model, x, budget="70%", on_new_input="wait")  # type: ignore[arg-type]
    assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))


def test_the_kinds_that_are_kept_are_bounded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    cs.fit(model, torch.randn(90, 3), budget="100%")
    fitted: Any = vars(model)["forward"]
    for rows in range(1, MOST_KINDS + 4):
        fitted._keep(rows, rows)
    assert len(fitted._known) == MOST_KINDS
    assert MOST_KINDS + 3 in fitted._known


def test_calls_before_one_backward_are_said_with_both_figures(
    fitted: tuple[Language, Language],
) -> None:
    model, plain = fitted
    x, peak_bytes = ids(4, 16), cs.plan_of(model).peak_bytes
    for _ in range(3):  # outputs that are gone, or gone back through, are no calls to come
        loss = model(x, labels=x)["loss"]
        loss.backward()
        model(x, labels=x)
    for net in (model, plain):
        net.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        one = net(x, labels=x)["loss"]
        if net is model:
            message = f"{peak_bytes} bytes .* together may take up to {2 * peak_bytes} "
            with pytest.warns(cs.BudgetWarning, match=message):
                other = net(x, labels=x)["loss"]
        else:
            other = net(x, labels=x)["loss"]
        (one + other).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        # One graph adds up the uses of a tied weight in all calls, each plan those in its own.
        exact = {} if name == "words.weight" else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(p.grad, q.grad, **exact)
    one = model(x, labels=x)["loss"]
    other = model(x, labels=x)["loss"]  # which has been said
    with pytest.warns(cs.BudgetWarning, match=f"2 earlier calls .* up to {3 * peak_bytes} "):
        _ = model(x, labels=x)["loss"]
    del one, other


class Steered(nn.Module):
    """Goes one of two ways, by a mask that carries no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if bool(mask.all()):
            return torch.tanh(self.b(x))
        return torch.tanh(self.c(x)) * mask


def test_values_that_steer_lead_to_plans_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    plain = Steered()
    model, x = copy.deepcopy(plain), torch.randn(6, 8)
    ones, holes = torch.ones(6, 1), torch.tensor([[1.0], [0.0]]).repeat(3, 1)
    cs.fit(model, x, ones, budget="100%")
    for mask in (ones, holes, ones, holes):
        assert same(gradients(model, x, mask), gradients(plain, x, mask))
    assert len(caplog.records) == 1


def test_what_is_frozen_or_added_later_is_planned_anew() -> None:
    torch.manual_seed(0)
    plain = Language()
    x = ids(4, 16)
    model = cs.fit(copy.deepcopy(plain), x, kwargs={"labels": x}, budget="90%")
    for net in (model, plain):
        net.mixers[0].requires_grad_(False)
    assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))
    for net in (model, plain):
        torch.manual_seed(5)
        net.mixers[1].out = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))
    assert all(a.grad is not None for a in model.mixers[1].out.parameters())


def test_hooks_of_the_model_run_once_around_its_forward() -> None:
    torch.manual_seed(0)
    model, args, kwargs = language()
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    cs.fit(model, *args, kwargs=kwargs, budget="70%")
    model.register_forward_hook(lambda *_: seen.append("after"))
    seen.clear()
    for _ in range(2):
        gradients(model, *args, **kwargs)
    assert seen == ["before", "after"] * 2


class Counting(nn.Module):
    """One stage, as it reads what it computes; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = torch.tanh(self.inner(x))
        return y * float(y.detach().max() > 0)


def test_one_stage_is_called_by_the_names_of_its_arguments() -> None:
    torch.manual_seed(0)
    plain = Counting()
    model, batch = copy.deepcopy(plain), {"x": torch.randn(16, 4)}
    with pytest.raises(cs.InfeasibleBudgetError, match=r"one stage.*cannot be taken apart"):
        cs.fit(model, kwargs=batch, budget="50%")
    cs.fit(model, kwargs=batch, budget="100%")
    assert same(gradients(model, **batch), gradients(plain, **batch))
    wrong = {"x": torch.randn(16, 3)}
    with pytest.raises(cs.ProfileError, match="mat1 and mat2") as refused:
        cs.fit(copy.deepcopy(plain), kwargs=wrong, budget="100%")
    assert "needs a sample" not in str(refused.value)


def test_a_model_that_cannot_be_recorded_is_one_stage_and_says_why() -> None:
    torch.manual_seed(0)
    plain = Counting()
    model, x = copy.deepcopy(plain), torch.randn(16, 4)
    chain = cs.profile(model, x)
    assert len(chain) == 1
    assert chain.signature is not None
    assert "cannot be taken apart" in chain.signature.whole
    with pytest.raises(cs.ProfileError, match="cannot be taken apart"):
        cs.profile(model, x, capture=True)
    with pytest.raises(cs.InfeasibleBudgetError, match=r"one stage.*cannot be taken apart"):
        cs.fit(model, x, budget="50%")
    assert "forward" not in vars(model)
    seen: list[int] = []
    cs.fit(model, x, budget="100%")
    model.register_forward_hook(lambda *_: seen.append(1))
    assert same(gradients(model, x), gradients(plain, x))
    assert model.calls == plain.calls == 1
    assert seen == [1]


def test_a_fitted_model_can_be_fitted_again_and_a_failure_changes_nothing(
    fitted: tuple[Language, Language],
) -> None:
    model, plain = fitted
    x = ids(4, 16)
    before = cs.plan_of(model)
    with pytest.raises(cs.InfeasibleBudgetError):
        cs.fit(model, x, kwargs={"labels": x}, budget=1000)
    assert cs.plan_of(model) is before
    cs.fit(model, x, kwargs={"labels": x}, budget="90%")
    assert cs.plan_of(model).budget_text == "90%"
    assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))
    cs.unfit(model)
    assert same(gradients(model, x, labels=x), gradients(plain, x, labels=x))


def test_other_parameters_can_be_given_for_a_call(fitted: tuple[Language, Language]) -> None:
    model, plain = fitted
    x = ids(4, 16)
    other = {name: (p + 0.1).detach() for name, p in plain.named_parameters()}
    found = []
    for net in (model, plain):
        given = {name: p.clone().requires_grad_() for name, p in other.items()}
        torch.manual_seed(2)
        loss = torch.func.functional_call(net, given, (x,), {"labels": x})["loss"]
        found.append(torch.autograd.grad(loss, [*given.values()]))
    assert all(map(torch.equal, *found))


def test_chains_are_fitted_in_place_too() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)])
    model, x = copy.deepcopy(plain), torch.randn(64, 16)
    assert cs.fit(model, x, budget="60%") is model
    assert len(model) == 6
    assert model[2] is next(m for n, m in model.named_modules() if n == "2")
    assert same(gradients(model, x), gradients(plain, x))
    assert same(gradients(model, x[:5]), gradients(plain, x[:5]))


def test_a_wrapper_hides_nothing_of_the_model() -> None:
    torch.manual_seed(0)
    model, args, kwargs = language()
    plan = cs.plan(model, *args, kwargs=kwargs, budget="80%")
    net = cs.checkpointed(model, plan)
    assert net.words is model.words
    assert net.mixers is model.mixers
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = net.nothing_like_this
    plain = copy.deepcopy(model)
    assert same(gradients(net, *args, **kwargs), gradients(plain, *args, **kwargs))
    with pytest.raises(cs.PlanMismatchError):
        net(ids(4, 20), labels=ids(4, 20))


def test_a_saved_plan_is_followed_by_a_recording_of_its_own(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, args, kwargs = language()
    plan = cs.plan(model, *args, kwargs=kwargs, budget="70%")
    plan.save(tmp_path / "plan.json")
    loaded = cs.Plan.load(tmp_path / "plan.json")
    net, plain = cs.checkpointed(copy.deepcopy(model), loaded), model
    assert same(gradients(net, *args, **kwargs), gradients(plain, *args, **kwargs))
    deeper = Language(layers=4)
    with pytest.raises(cs.PlanMismatchError):
        cs.checkpointed(deeper, loaded)(*args, **kwargs)


def test_a_loss_with_targets_of_the_first_batch_is_provided_for_on_others() -> None:
    torch.manual_seed(0)
    plain, x, more = Steered(), torch.randn(6, 8), torch.randn(9, 8)
    targets = torch.randn(6, 8)

    def loss(y: Tensor) -> Tensor:
        return torch.stack([(y - targets).square()] * 20).mean()  # more than a cross-entropy's

    model = copy.deepcopy(plain)
    cs.fit(model, x, torch.ones(6, 1), budget="200%", loss=loss)
    fitted: Any = vars(model)["forward"]
    first = cs.plan_of(model).chain
    assert same(
        gradients(model, x[:4], torch.ones(4, 1)), gradients(plain, x[:4], torch.ones(4, 1))
    )
    chain = fitted._all()[-1].plan.chain
    assert chain.held_bytes >= first.held_bytes
    assert chain.loss_overhead_bytes >= first.loss_overhead_bytes
    with pytest.warns(cs.BudgetWarning, match=r"loss that fit was given fails.*\d+ bytes"):
        found = gradients(model, more, torch.ones(9, 1))
    assert same(found, gradients(plain, more, torch.ones(9, 1)))


class Keyed(nn.Module):
    """It takes its batch by name alone, and goes the way that its values say."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, *, pixels: Tensor) -> Tensor:
        y: Tensor = self.layer(pixels)
        return y * 2 if y.sum() > 100 else y


def test_a_model_that_is_neither_recorded_nor_a_stage_is_refused_with_both_reasons() -> None:
    with pytest.raises(cs.ProfileError, match=r"found only 'pixels'.*Tensor.__bool__ reads values"):
        cs.fit(Keyed(), kwargs={"pixels": torch.randn(2, 4)}, budget="50%")


def test_messages_name_the_class_of_a_model_that_is_one_stage() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y: Tensor = self.layer(x) * self.calls
            return y

    with pytest.raises(cs.ProfileError, match="'Counting'"):
        cs.fit(Counting(), torch.randn(2, 4), budget="100%", capture=False)
