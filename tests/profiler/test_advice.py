"""Messages that help: what people most likely meant, and what to do instead."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ckptsched as cs
from ckptsched.base.errors import CkptschedError


def network() -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])


X = torch.randn(3, 8)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ([X, torch.zeros(3)], r"whole list.*batch\[0\]"),
        ((X, torch.zeros(3)), r"whole tuple.*batch\[0\]"),
        ({"image": X, "label": 1}, r"whole dict.*batch\['image'\]"),
        (np.zeros((3, 8), dtype="float32"), r"torch\.from_numpy"),
        ([np.zeros(3), np.zeros(3)], r"torch\.from_numpy"),
        ((3, 8), r"torch\.randn\(3, 8\)"),
    ],
    ids=["list", "tuple", "dict", "numpy", "list of numpy", "shape"],
)
def test_samples_that_people_give_by_mistake(sample: Any, words: str) -> None:
    for act in (cs.profile, lambda *args: cs.fit(*args, budget="100%")):
        with pytest.raises(cs.ProfileError, match=words):
            act(network(), sample)


def test_a_sample_of_inference_mode() -> None:
    with torch.inference_mode():
        sample = torch.randn(3, 8)
    with pytest.raises(cs.ProfileError, match=r"outside of torch.inference_mode"):
        cs.profile(network(), sample)


def test_what_float16_lacks_on_the_cpu() -> None:
    class Lacking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("\"some_kernel\" not implemented for 'Half'")

    with pytest.raises(cs.ProfileError, match="float16 has few operations on the CPU"):
        cs.profile(nn.Sequential(Lacking()), X.half())
    with pytest.raises(cs.ProfileError) as caught:
        cs.profile(nn.Sequential(Lacking()), X)
    assert "float16 has" not in str(caught.value)


def test_nothing_to_train() -> None:
    frozen = network().requires_grad_(False)
    with pytest.raises(cs.ProfileError, match=r"nothing to train: .*unfreeze"):
        cs.profile(frozen, X)
    cs.profile(frozen, X.clone().requires_grad_())


def test_a_plan_of_the_other_mode_says_which_to_profile_in() -> None:
    model = network()
    for mode, word in ((False, "eval"), (True, "train")):
        plan = cs.plan(model.train(mode), X, budget="100%")
        planned = cs.checkpointed(model, plan)
        planned.train(not mode)
        words = rf"for mode '{word}'.*model.{word}\(\).*profile and plan in the mode to train in"
        with pytest.raises(cs.PlanMismatchError, match=words):
            planned(X)


@pytest.mark.parametrize(
    ("budget", "meant"),
    [
        ("20", "20%"),
        (20, "20%"),
        (0.5, "50%"),
        ("0.5", "50%"),
        (1.0, "100%"),
        (" 7 ", "7%"),
        (0.125, "12.5%"),
        (np.int64(60), "60%"),
    ],
    ids=repr,
)
def test_a_sign_that_was_forgotten(budget: Any, meant: str) -> None:
    chain = cs.profile(network(), X)
    with pytest.raises(CkptschedError, match=f"if {meant} was meant, give '{meant}'"):
        cs.plan(chain, budget=budget)


@pytest.mark.parametrize("budget", [1.5, "1.5", np.float32(1.5)])
def test_half_a_byte_is_more_likely_a_gibibyte_or_a_share(budget: Any) -> None:
    chain = cs.profile(network(), X)
    with pytest.raises(CkptschedError, match=r"if 1.5 GiB or 150% .* give '1.5GiB' or '150%'"):
        cs.plan(chain, budget=budget)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_reentrant_checkpoint_of_what_needs_no_gradient_is_named() -> None:
    class Reentrant(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = checkpoint(super().forward, input, use_reentrant=True)
            return y

    model = nn.Sequential(*[Reentrant(4, 4) for _ in range(2)])
    with pytest.raises(cs.ProfileError, match=r"cuts the graph: .* use_reentrant=False"):
        cs.profile(model, torch.randn(3, 4))


def test_the_losss_own_error_says_where_it_arose() -> None:
    failure = KeyError("targets")

    def loss(y: Any) -> Any:
        raise failure

    with pytest.raises(KeyError) as caught:
        cs.profile(network(), X, loss=loss)
    assert caught.value is failure
    assert failure.__notes__ == [
        "this arose in the loss, while ckptsched.profile measured the model"
    ]


@pytest.mark.parametrize("budget", [101, "101", 10**3, "1kB", -1, "-5", 0])
def test_nothing_is_asked_where_bytes_are_meant(budget: Any) -> None:
    with pytest.raises(CkptschedError) as caught:
        cs.plan(cs.profile(network(), X), budget=budget)
    assert "was meant" not in str(caught.value)


@pytest.mark.parametrize("share", ["1%", "5%", "20%"])
def test_a_percentage_that_cannot_be_met_shows_the_parts(share: str) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    sample = torch.randn(2, 64)
    chain = cs.profile(model, sample)
    with pytest.raises(cs.InfeasibleBudgetError) as caught:
        cs.plan(chain, budget=share)
    message = str(caught.value)
    gradients = sum(p.numel() for p in model.parameters()) * 4
    assert f"gradients of parameters take {cs.format_bytes(gradients)}" in message
    assert "the largest stage ('" in message
    assert "the loss with the output" in message
    # The least budget that is named works, in per cent.
    (least,) = re.findall(r"the least budget is ([\d.]+%)", message)
    assert cs.plan(chain, budget=least).peak_bytes == caught.value.least_budget_bytes
