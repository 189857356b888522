"""Lightning and Hugging Face's Trainer train a model that follows a plan as any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckptsched as cs

SMALL = ["--method", "euler", "--steps", "3", "--batch", "16", "--limit", "64", "--epochs", "1"]

# Of the trainers' own: nothing here warns.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def assert_trained_alike(planned: nn.Module, plain: nn.Module) -> None:
    network = planned.network
    assert isinstance(network, cs.Checkpointed)
    assert network.plan.overhead > 0  # something ran again
    found, expected = planned.state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_lightning_trains_to_the_same_weights() -> None:
    pytest.importorskip("lightning")
    from examples import train_lightning

    planned = train_lightning.main([*SMALL, "--budget", "60%"])
    plain = train_lightning.main([*SMALL, "--budget", "none"])
    assert planned.losses == plain.losses
    assert len(plain.losses) == 4
    assert_trained_alike(planned, plain)


def test_hugging_face_trains_to_the_same_weights() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from examples import train_hf_trainer

    planned = train_hf_trainer.main([*SMALL, "--budget", "60%"])
    plain = train_hf_trainer.main([*SMALL, "--budget", "none"])
    assert planned.state.global_step == plain.state.global_step == 4
    assert_trained_alike(planned.model, plain.model)
