"""`will_it_fit`: figures from shapes beside those that are measured, and laws of the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import ckptsched as cs
from ckptsched.fitting.before_a_run.devices import DEVICES

from ...zoo.training import library

hf = library("transformers")

WORDS, ROWS, LENGTH = 97, 4, 24
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def mlp(depth: int = 6, width: int = 64) -> nn.Module:
    """A chain of equal layers."""
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())])


def llama() -> nn.Module:
    model: nn.Module = hf.LlamaForCausalLM(
        hf.LlamaConfig(**SMALL, num_key_value_heads=2, use_cache=False)
    )
    return model


def bert() -> nn.Module:
    model: nn.Module = hf.BertForMaskedLM(hf.BertConfig(**SMALL))
    return model


def gpt2() -> nn.Module:
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model: nn.Module = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=WORDS, use_cache=False, **sizes))
    return model


def words() -> dict[str, torch.Tensor]:
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % WORDS
    return {"input_ids": ids, "labels": ids.clone()}


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(16 * 64, 10)),
    )


MODELS: dict[str, Any] = {
    "mlp": (mlp, lambda: ((torch.zeros(16, 64),), {})),
    "convolutions": (convolutions, lambda: ((torch.zeros(8, 3, 16, 16),), {})),
    "llama": (llama, lambda: ((), words())),
    "gpt2": (gpt2, lambda: ((), words())),
    "bert": (bert, lambda: ((), words())),
}
if torch.__version__ < "2.10":
    del MODELS["llama"]  # attention with grouped heads cannot do without data there


@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_near_what_is_measured(name: str) -> None:
    """States and tapes within 2 %, the peak of the step and the least within 5 %."""
    torch.manual_seed(3)
    make, inputs = MODELS[name]
    model, (sample, kwargs) = make(), inputs()
    forecast = cs.will_it_fit(model, *sample, kwargs=kwargs, device_memory="1GiB")
    chain = cs.profile(model, *sample, kwargs=kwargs)
    measured = cs.plan(chain, budget="100%")
    guessed = forecast.store_all
    for figure in ("state_bytes", "tape_bytes", "parameter_gradient_bytes"):
        total = sum(getattr(stage, figure) for stage in chain.stages)
        found = sum(getattr(stage, figure) for stage in guessed.chain.stages)
        assert found == pytest.approx(total, rel=0.02), figure
    assert guessed.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)
    kept = forecast.kept_bytes
    assert kept["parameters"] == sum(p.nbytes for p in model.parameters())
    assert kept["buffers"] == sum(b.nbytes for b in model.buffers())
    assert kept["batch"] == sum(x.nbytes for x in (*sample, *kwargs.values()))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_meta_is_told_the_same(name: str) -> None:
    make, inputs = MODELS[name]
    sample, kwargs = inputs()
    with torch.device("meta"):
        bare = make()
    asked: dict[str, Any] = {"kwargs": kwargs, "device_memory": "1GiB"}
    assert (
        cs.will_it_fit(bare, *sample, **asked).to_json()
        == cs.will_it_fit(make(), *sample, **asked).to_json()
    )


def test_the_optimizer_keeps_what_torchs_keeps() -> None:
    model = mlp()
    parameters = list(model.parameters())
    model(torch.zeros(2, 64)).sum().backward()
    for name, optimizer in {
        "sgd": torch.optim.SGD(parameters),
        "sgd-momentum": torch.optim.SGD(parameters, momentum=0.9),
        "adagrad": torch.optim.Adagrad(parameters),
        "rmsprop": torch.optim.RMSprop(parameters),
        "adam": torch.optim.Adam(parameters),
        "adamw": torch.optim.AdamW(parameters),
    }.items():
        optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values()]
        expected = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.dim())
        found = cs.will_it_fit(model, torch.zeros(2, 64), device="T4", optimizer=name)
        assert found.kept_bytes["optimizer state"] == expected, name


def test_rows_add_up_and_plans_fit() -> None:
    with torch.device("meta"):
        model, x = mlp(depth=12), torch.empty(4096, 64)
    ample = cs.will_it_fit(model, x, device_memory="1GiB")
    assert ample.fits
    assert ample.plan is not None
    assert ample.plan.overhead == 0
    for memory in (ample.plain_bytes, (ample.plain_bytes + ample.least_bytes) // 2):
        found = cs.will_it_fit(model, x, device_memory=memory)
        assert found.fits == (memory == ample.plain_bytes)
        assert found.spare_bytes == memory - ample.plain_bytes
        rows = found.rows()
        for column in (0, 1):
            figures = [row[column] or 0 for name, row in rows.items() if name != "all"]
            assert min(figures) >= 0
            assert sum(figures) == rows["all"][column]
        assert rows["all"][0] == found.plain_bytes
        assert (rows["all"][1] or 0) <= memory
        assert json.loads(json.dumps(found.to_json())) == found.to_json()
        assert all(name in str(found) and name in found._repr_html_() for name in rows)
    none = cs.will_it_fit(model, x, device_memory=ample.least_bytes - 1)
    assert not none.fits
    assert not none.fits_with_plan
    assert "no plan fits" in str(none)


@pytest.mark.parametrize("shard", ["optimizer", "grads", "full"])
def test_more_devices_keep_less_each(shard: str) -> None:
    with torch.device("meta"):
        model, x = nn.ModuleDict({"layers": mlp(depth=16)})["layers"], torch.empty(16, 64)
    one = cs.will_it_fit(model, x, device_memory="1GiB")
    some = [
        cs.will_it_fit(model, x, device_memory="1GiB", devices=n, shard=shard) for n in (2, 4, 8)
    ]
    for n, found in zip((2, 4, 8), some, strict=True):
        assert found.kept_bytes["optimizer state"] == one.kept_bytes["optimizer state"] // n
        parted = shard == "full"
        assert found.kept_bytes["parameters"] == one.kept_bytes["parameters"] // (
            n if parted else 1
        )
        fewer = n if shard != "optimizer" else 1
        assert found.gradient_bytes == pytest.approx(one.gradient_bytes / fewer, abs=32)
        assert ("gathered units" in found.kept_bytes) == (shard != "optimizer")
        assert ("gradient buckets" in found.kept_bytes) == (shard == "optimizer")
    assert some[0].plain_bytes > some[1].plain_bytes > some[2].plain_bytes


def test_half_precision_halves_what_is_of_floating_point() -> None:
    kept = cs.will_it_fit(mlp(), torch.zeros(16, 64), device="H100").kept_bytes
    half = cs.will_it_fit(mlp(), torch.zeros(16, 64), device="H100", dtype="bf16").kept_bytes
    assert {name: size // 2 for name, size in kept.items()} == dict(half)
    masters = cs.will_it_fit(
        mlp(), torch.zeros(16, 64), device="H100", dtype="bf16", master_weights=True
    ).kept_bytes
    assert masters["master weights"] == kept["parameters"]
    assert masters["optimizer state"] == kept["optimizer state"]


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    with torch.device("meta"):
        model = mlp()
        asked: dict[str, Any] = {"device_memory": "2MiB"}
        found = cs.will_it_fit(model, torch.empty(16, 64), largest=["batch"], **asked)
        size = found.largest["batch"]
        assert size > 16
        assert cs.will_it_fit(model, torch.empty(size, 64), **asked).fits_with_plan
        assert not cs.will_it_fit(model, torch.empty(size + 1, 64), **asked).fits_with_plan
        tight = cs.will_it_fit(model, torch.empty(16, 64), device_memory=1000, largest="batch")
    assert tight.largest == {"batch": 0}


def test_seconds_follow_the_device() -> None:
    model, x = mlp(), torch.zeros(16, 64)
    slow, fast = (cs.will_it_fit(model, x, device=name) for name in ("T4", "H200"))
    assert slow.seconds > fast.seconds > 0
    figures = DEVICES["T4"]
    twice = cs.DeviceFigures(
        name="two",
        memory_bytes=figures.memory_bytes,
        bytes_per_second=2 * figures.bytes_per_second,
        flops_per_second=2 * figures.flops_per_second,
        half_flops_per_second=figures.half_flops_per_second,
        bfloat16_flops_per_second=figures.bfloat16_flops_per_second,
        source="a test",
    )
    own = cs.will_it_fit(model, x, device=twice)
    # A tenth is a margin, unless memory is named.
    assert slow.memory_bytes == own.memory_bytes == 9 * figures.memory_bytes // 10
    assert cs.will_it_fit(model, x, device="T4", device_memory="16GB").memory_bytes == 16 * 10**9
    assert own.seconds == pytest.approx(slow.seconds / 2)
    assert "estimated" in str(own)
    assert "estimated" not in str(cs.will_it_fit(model, x, device_memory="1GiB"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "H10"}, r"'H10' is not known; did you mean H100\? Known are A100"),
        ({}, "neither a device nor its memory"),
        ({"device_memory": "50%"}, "is a share of a size"),
        ({"device": "T4", "optimizer": "lion"}, "'lion' keeps is not known; give one of none, sgd"),
        ({"device": "T4", "dtype": "int8"}, "the dtype 'int8' is not known; give one of fp32"),
        ({"device": "T4", "devices": 0}, "0 devices: give a whole number of 1 or more"),
        ({"device": "T4", "devices": 2, "shard": "zero"}, "shard='zero' is not known; give one of"),
        ({"device": "T4", "shard": "full"}, "there is one; give devices=2 or more"),
        ({"device": "T4", "largest": ["width"]}, 'give "batch", "sequence" or both'),
    ],
)
def test_what_is_not_known_is_said_by_name(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(cs.WorkloadError, match=message):
        cs.will_it_fit(mlp(), torch.zeros(16, 64), **asked)


def test_a_model_is_left_as_it_was() -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cs.will_it_fit(model, torch.zeros(16, 64), device="H100", dtype="bf16")
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())


class Asks(nn.Module):
    """Decides by what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.line(x)
        return y if y.sum() > 0 else -y


class Counts(nn.Module):
    """Keeps in an attribute how often it was called, so that its insides are not looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.calls = nn.Linear(8, 8), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls * 2 + 1
        return torch.tanh(self.line(x))


class Around(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x) + x
        return x


def test_what_needs_data_is_refused_by_name_and_the_rest_is_not_whole() -> None:
    with pytest.raises(cs.ProfileError, match="hold no data"):
        cs.will_it_fit(Around(nn.Linear(8, 8), Asks()), torch.zeros(4, 8), device="T4")
    found = cs.will_it_fit(Around(nn.Linear(8, 8), nn.Linear(8, 8)), torch.zeros(4, 8), device="T4")
    assert found.whole == ""
    assert "one stage" not in str(found)
    counted = Around(nn.Linear(8, 8), Counts(), nn.Linear(8, 8))
    found = cs.will_it_fit(counted, torch.zeros(4, 8), device="T4")
    assert "'parts.1'" in found.whole
    assert found.whole == found.to_json()["whole"]
    assert f"one stage, so that plans are coarse: {found.whole}" in str(found)
