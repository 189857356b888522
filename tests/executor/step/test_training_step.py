"""Steps by a plan: the gradients of plain autograd, side effects once, nothing left behind."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import ckptsched as cs
from ckptsched.memory.meters import default_meter
from ckptsched.workload.stage import TapeOption
from tests.support.networks import NETWORKS, ode_net, planned, tight

SOLVERS = ("store_all", "anode", "every_2", "every_stage", "input_only", "chain_dp")


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_equal_plain_autograd_to_the_bit_and_the_byte(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    chain = cs.profile(model, x)
    for solver in SOLVERS:
        plan = tight(chain, solver)
        result = cs.verify(model, plan, x)
        assert result.max_gradient_difference == 0.0, (solver, result.worst_gradient)
        assert result.loss_difference == 0.0, solver
        assert result.buffers_equal, solver
        assert result.random_state_equal, solver
        assert result.measured_peak_bytes <= plan.peak_bytes <= plan.budget_bytes, solver
        # Counters of BatchNorm, 8 bytes each, are cloned but not saved by a tape.
        assert result.measured_peak_bytes >= plan.peak_bytes - 128, solver


def test_stages_run_as_often_as_projected() -> None:
    calls = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    model = nn.Sequential(*[Counting(8, 8) for _ in range(9)])
    x = torch.randn(4, 8)
    chain = cs.profile(model, x)
    for solver in SOLVERS:
        plan = tight(chain, solver)
        trained = cs.checkpointed(model, plan)
        calls.clear()
        trained(x).sum().backward()
        assert len(calls) == plan.forwards, solver


def train(model: nn.Module, x: Tensor, steps: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("name", ["ode_net", "dropout_ode", "transformer"])
def test_training_gives_the_same_weights(name: str) -> None:
    torch.manual_seed(1)
    model, x = NETWORKS[name]()
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, planned(model, x, "chain_dp"))
    torch.manual_seed(2)
    expected = train(twin, x, 4)
    torch.manual_seed(2)
    found = train(trained, x, 4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_batch_norm_moves_once_a_step() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x, "input_only"))
    trained(x).sum().backward()
    # Four RK4 steps evaluate f 16 times, five Euler steps 5 times.
    counts = {n: int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")}
    assert counts["0.1.num_batches_tracked"] == 1
    assert counts["1.f.1.num_batches_tracked"] == 16
    assert counts["3.f.1.num_batches_tracked"] == 5


def test_the_module_stands_for_the_model() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x))
    assert list(trained.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(trained.parameters(), model.parameters(), strict=True))
    assert [n for n, _ in trained.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert trained.model is model
    trained.eval()
    assert not any(module.training for module in model.modules())
    trained.train()
    assert all(module.training for module in model.modules())
    model.load_state_dict({k: torch.zeros_like(v) for k, v in trained.state_dict().items()})
    assert all(not p.any() for p in trained.parameters())
    assert cs.checkpointed(trained, trained.plan).model is model


def test_copies_are_independent_and_work() -> None:
    torch.manual_seed(3)
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x))
    file = io.BytesIO()
    torch.save(trained, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    trained(x)  # what the first step finds out about modules must not go into copies
    twin = copy.deepcopy(trained)
    assert trained.calls.prepared.usage  # type: ignore[union-attr]
    assert not twin.calls.prepared.usage  # type: ignore[union-attr]
    plain = copy.deepcopy(model)
    plain(x).sum().backward()
    for twin in (copy.deepcopy(trained), loaded):
        twin(x).sum().backward()
        assert all(
            torch.equal(p.grad, q.grad)
            for p, q in zip(twin.parameters(), plain.parameters(), strict=True)
        )
        assert all(p.grad is None for p in model.parameters())
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_without_gradients_any_batch_runs() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x))
    other = torch.randn(7, 3, 20, 20)
    trained.eval()
    with torch.no_grad():
        assert torch.equal(trained(other), model(other))
    with torch.inference_mode():
        assert trained(other).shape == (7, 10)


def test_other_batches_and_modes_are_refused() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x))

    def refused(batch: object, message: str) -> None:
        with pytest.raises(cs.PlanMismatchError, match=message):
            trained(batch)

    refused(x[:2], r"shape \(4, 3, 16, 16\).*found \(2, 3, 16, 16\)")
    refused(x.double(), r"torch.float32 on cpu; found .*torch.float64")
    refused(x.to("meta"), "on cpu; found .* on meta")
    refused([x], r"for a call with one tensor; found list\(float32\[4, 3, 16, 16\]\); tuple\(\)")
    refused([1.0], "its first stage takes, found a list without tensors")
    refused(object(), "the model's first argument is a object where a state was expected")
    refused(x.to(memory_format=torch.channels_last), r"strides \(768, 256, 16, 1\), found \(768")
    refused(x.clone().requires_grad_(), "an input without gradient, found one that requires it")
    model[1].eval()
    refused(x, r"for mode 'train', found 'mixed .*call model.train\(\)")
    model.train()
    model[0][0].weight.requires_grad_(False)
    refused(x, "other parameters require gradients")
    model[0][0].weight.requires_grad_(True)
    trained(x).sum().backward()


def test_another_number_of_threads_is_refused() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x))
    torch.set_num_threads(2)
    try:
        with pytest.raises(cs.PlanMismatchError, match=r"with 1 threads, found 2.*set_num_threads"):
            trained(x)
    finally:
        torch.set_num_threads(1)
    trained(x).sum().backward()


def test_a_plan_for_another_model_is_refused() -> None:
    model, x = ode_net()
    plan = planned(model, x)
    wider = nn.Sequential(*model[:3], nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)))
    with pytest.raises(cs.PlanMismatchError, match=r"expects 18 stages in 5 blocks .*plan this"):
        cs.checkpointed(wider, plan)
    other_method = nn.Sequential(model[0], cs.ODEBlock(model[1].f, "midpoint", 4), *model[2:])
    with pytest.raises(cs.PlanMismatchError, match="the plan is for another model"):
        cs.checkpointed(other_method, plan)
    by_hand = cs.Chain.from_json({"u_f": [1], "u_b": [1], "w_a": [1, 1], "w_t": [2]})
    with pytest.raises(cs.PlanMismatchError, match="a chain without a model; profile the model"):
        cs.checkpointed(model, cs.plan(by_hand, budget=100))


def test_what_is_no_plan_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    chain = cs.profile(model, x)
    with pytest.raises(cs.PlanMismatchError, match=r"a Plan, found a Chain; make one of it: plan"):
        cs.checkpointed(model, chain)  # type: ignore[arg-type]
    with pytest.raises(cs.PlanMismatchError, match="a Plan, found a str"):
        cs.verify(model, "48MiB", x)  # type: ignore[arg-type]


def test_a_plan_with_another_tape_is_refused() -> None:
    model, x = ode_net()
    chain = planned(model, x).chain
    faster = TapeOption(tape_bytes=2**20, forward_seconds=0.0, backward_seconds=0.0)
    stages = tuple(replace(stage, other_tapes=(faster,)) for stage in chain.stages)
    plan = cs.plan(replace(chain, stages=stages), budget=2**40)
    with pytest.raises(cs.PlanMismatchError, match="with tape 1 of those that it offers, and"):
        cs.checkpointed(model, plan)


def test_parameters_that_move_or_change_before_the_backward() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x))
    y = trained(x).sum()
    with torch.no_grad():
        model[3].f[0].weight.add_(1)
    with pytest.raises(cs.ExecutionError, match=r"'3.f.0.weight' was changed in place"):
        y.backward()
    y = trained(x).sum()
    model.to("meta")
    with pytest.raises(cs.ExecutionError, match="was on cpu in the forward pass and is on meta"):
        y.backward()


def test_gradients_accumulate_and_stay_out_of_autograd_grad() -> None:
    torch.manual_seed(4)
    model, x = NETWORKS["input_gradient_mlp"]()
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, planned(model, x))
    (found,) = torch.autograd.grad(trained(x).sum(), x)
    (expected,) = torch.autograd.grad(twin(x).sum(), x)
    assert torch.equal(found, expected)
    assert all(p.grad is None for p in model.parameters())
    for net in (trained, twin):
        net(x).sum().backward()
        net(x).square().sum().backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_hooks_of_parameters_fire_once_a_backward() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x, "every_2"))
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: fired.append(name))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    trained(x).sum().backward()
    assert sorted(fired) == sorted(2 * [name for name, _ in model.named_parameters()])


class Fragile(nn.Module):
    """Fails at a chosen call, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.forward_fuse, self.backward_fuse = -1, -1

    def forward(self, x: Tensor) -> Tensor:
        self.forward_fuse -= 1
        if self.forward_fuse == 0:
            raise RuntimeError("forward failed")
        out = torch.tanh(self.inner(x))
        if out.requires_grad:
            out.register_hook(self._backward)
        return out

    def _backward(self, gradient: Tensor) -> None:
        self.backward_fuse -= 1
        if self.backward_fuse == 0:
            raise RuntimeError("backward failed")


@pytest.mark.parametrize("fuse", [("forward", 3), ("forward", 8), ("backward", 3)])
def test_a_failed_step_releases_what_it_held(fuse: tuple[str, int]) -> None:
    torch.manual_seed(5)
    fragile = Fragile()
    model = nn.Sequential(*[m for _ in range(6) for m in (fragile, nn.Linear(64, 64))])
    x = torch.randn(128, 64)
    plan = planned(model, x, "every_4")
    trained = cs.checkpointed(model, plan)
    setattr(fragile, f"{fuse[0]}_fuse", fuse[1])

    def step() -> bool:
        try:
            trained(x).sum().backward()
        except RuntimeError as error:
            return "failed" in str(error)
        return False

    failed, measured = default_meter(x.device).measure(step)
    assert failed
    owned = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert measured.final_bytes == owned
    assert cs.verify(model, plan, x).ok


def test_a_stage_that_turns_to_in_place_operations_is_caught() -> None:
    class Turning(nn.Module):
        in_place = False

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) if self.in_place else x * 2

    turning = Turning()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), turning, nn.Linear(4, 4))
    x = torch.randn(2, 4)
    trained = cs.checkpointed(model, planned(model, x, "every_2"))
    turning.in_place = True
    with pytest.raises(cs.ExecutionError, match="stage '2' changed its input in place"):
        trained(x)
    turning.in_place = False
    trained(x).sum().backward()


def test_a_stage_that_changes_shape_when_run_again_is_caught() -> None:
    class Shrinking(nn.Module):
        rows = 4

        def forward(self, x: Tensor) -> Tensor:
            return x[: self.rows]

    shrinking = Shrinking()
    model = nn.Sequential(nn.Linear(4, 4), shrinking, nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(4, 4)
    trained = cs.checkpointed(model, planned(model, x, "every_stage"))
    y = trained(x).sum()
    shrinking.rows = 3
    with pytest.raises(cs.ExecutionError, match=r"stage '1' returned shape \(4, 4\).*\(3, 4\)"):
        y.backward()
    shrinking.rows = 4
    trained(x).sum().backward()


def test_autocast_with_its_cache_keeps_the_budget() -> None:
    model, x = ode_net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = tight(cs.profile(model, x), "every_2")
        result = cs.verify(model, plan, x)
    assert result.measured_peak_bytes <= result.projected_peak_bytes, str(result)
    # The cache lets plain autograd add up gradients of a weight in low precision.
    assert result.uncached_gradient_difference == 0.0
    assert not result.ok
    assert result.buffers_equal
    assert result.random_state_equal


def test_autocast_is_replayed() -> None:
    torch.manual_seed(6)
    model, x = ode_net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chain = cs.profile(model, x)
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, tight(chain, "every_2"))
    with pytest.raises(cs.PlanMismatchError, match=r"autocast cpu to torch.bfloat16, found off"):
        trained(x)
    for net in (trained, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_functional_call_reaches_the_given_parameters() -> None:
    model, x = NETWORKS["input_gradient_mlp"]()
    trained = cs.checkpointed(model, planned(model, x))
    given = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    y = torch.func.functional_call(trained, given, (x,))
    y.sum().backward()
    expected = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, expected, (x,)).sum().backward()
    assert all(torch.equal(given[n].grad, expected[n].grad) for n in given)
    assert all(p.grad is None for p in model.parameters())


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", ["ode_net", "dropout_mlp"])
def test_the_mode_of_the_forward_holds_in_the_backward(name: str) -> None:
    torch.manual_seed(9)
    model, x = NETWORKS[name]()
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, planned(model, x, "input_only"))
    for net in (trained, twin):
        torch.manual_seed(10)
        y = net(x).square().sum()
        net.eval()
        y.backward()
        assert not any(module.training for module in net.modules())
    assert same(gradients(model), gradients(twin))


def test_several_forwards_before_a_backward() -> None:
    torch.manual_seed(11)
    model, x = NETWORKS["dropout_ode"]()
    twin = copy.deepcopy(model)
    trained = cs.checkpointed(model, planned(model, x, "every_2"))
    for net in (trained, twin):
        torch.manual_seed(12)
        first, second = net(x).square().sum(), net(x).sum()
        second.backward()
        first.backward()
    assert same(gradients(model), gradients(twin))


def test_functional_call_reaches_the_given_buffers() -> None:
    torch.manual_seed(13)
    model, x = ode_net()
    model.eval()
    trained = cs.checkpointed(model, planned(model, x, "input_only"))
    given = {n: t.detach().clone() + 0.5 for n, t in model.named_buffers() if "running" in n}
    torch.func.functional_call(trained, given, (x,)).sum().backward()
    found = gradients(model)
    model.zero_grad()
    torch.func.functional_call(model, given, (x,)).sum().backward()
    assert all(
        torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, gradients(model), strict=True)
    )


def test_buffers_that_change_before_the_backward_are_caught() -> None:
    model, x = ode_net()
    model.eval()
    trained = cs.checkpointed(model, planned(model, x, "input_only"))
    y = trained(x).sum()
    model[1].f[1].running_mean.add_(1)
    with pytest.raises(cs.ExecutionError, match="a buffer that the forward pass left alone"):
        y.backward()


def test_a_model_that_is_rebuilt_after_planning_is_refused() -> None:
    model, x = ode_net()
    trained = cs.checkpointed(model, planned(model, x))
    old = model[4][2]
    model[4][2] = nn.Linear(16, 10)
    with pytest.raises(cs.PlanMismatchError, match="a module of the model was replaced"):
        trained(x)
    model[4][2] = old
    trained(x).sum().backward()
    model.double()
    with pytest.raises(cs.PlanMismatchError, match="other shapes, dtypes"):
        trained(x)


def test_the_gradient_of_an_input_in_another_layout_is_within_the_plan() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
    plan = planned(model, x, "store_all")
    result = cs.verify(model, plan, x)
    assert result.ok, str(result)


def test_a_stage_that_turns_gradients_on_keeps_the_plan() -> None:
    class Eager(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return torch.tanh(super().forward(x))

    model = nn.Sequential(*[Eager(64, 64) for _ in range(6)])
    x = torch.randn(128, 64)
    result = cs.verify(model, planned(model, x, "every_stage"), x)
    assert result.ok, str(result)


def test_random_numbers_that_the_profile_did_not_see_are_caught() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    trained = cs.checkpointed(model, planned(model, x, "every_stage"))
    trained(x).sum().backward()
    model[1].p = 0.5
    with pytest.raises(cs.ExecutionError, match="drew random numbers, and none did"):
        trained(x)


def test_attention_in_eval_mode() -> None:
    torch.manual_seed(14)
    model, x = NETWORKS["transformer"]()
    model.eval()
    result = cs.verify(model, planned(model, x, "every_2"), x)
    assert result.ok, str(result)


def test_two_models_inside_one_graph() -> None:
    torch.manual_seed(7)
    (first, x), (second, _) = NETWORKS["dropout_mlp"](), NETWORKS["dropout_mlp"]()
    plain = copy.deepcopy(nn.Sequential(first, second))
    wants = x.clone().requires_grad_()
    chained = nn.Sequential(
        cs.checkpointed(first, planned(first, x)), cs.checkpointed(second, planned(second, wants))
    )
    gradients: list[list[Tensor]] = []
    for net in (chained, plain):
        torch.manual_seed(8)
        net(x).square().mean().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_fit_does_it_all() -> None:
    model, x = ode_net()
    trained = cs.fit(model, x, budget="50%", loss=lambda y: y.square().mean())
    assert trained is model
    plan = cs.plan_of(model)
    assert plan.budget_text == "50%"
    assert cs.verify(model, plan, x, loss=lambda y: y.square().mean()).ok
    with pytest.raises(cs.InfeasibleBudgetError) as caught:
        cs.fit(model, x, budget=1000)
    assert caught.value.least_budget_bytes is not None
    assert str(caught.value.least_budget_bytes) in str(caught.value)
    cs.fit(model, x, budget=int(1.2 * caught.value.least_budget_bytes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_on_cuda(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    model = model.cuda()
    x = x.detach().cuda().requires_grad_(x.requires_grad)
    plan = planned(model, x, "chain_dp")
    result = cs.verify(model, plan, x, tolerance=1e-4)
    assert result.ok, str(result)


def test_recurrent_layers_round_as_with_gradients() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[0]

    model = nn.Sequential(Recurrent(), nn.Linear(8, 8), Recurrent(), nn.Linear(8, 2))
    x = torch.randn(2, 5, 8, requires_grad=True)
    chain = cs.profile(model, x)
    assert cs.Chain.from_json(chain.to_json()) == chain
    for solver in ("store_all", "every_2", "every_stage", "input_only"):
        plan = tight(chain, solver)
        result = cs.verify(model, plan, x)
        assert result.ok, (solver, str(result))
        cs.checkpointed(model, plan, check="outputs")(x).sum().backward()
