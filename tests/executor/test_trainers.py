"""Trainers of other libraries fit what they train: the same weights, within the budget."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import ckptsched as cs
from ckptsched.memory.meters import default_meter

# Of the libraries' own, here are warnings of many kinds.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::ckptsched.base.errors.BudgetWarning"),
]

BUDGET = "75%"


class Peaks:
    """Peaks of steps of kinds that were seen before: what plans a new one measures, too."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.bytes: list[int] = []

    @contextmanager
    def of(self, kind: Any) -> Iterator[None]:
        if kind not in self.seen:
            self.seen.add(kind)
            yield
            return
        with default_meter(torch.device("cpu")).window() as window:
            yield
        self.bytes.append(window.measurement.peak_bytes)

    def keep(self, plan: cs.Plan | None) -> None:
        assert plan is not None
        assert self.bytes
        assert max(self.bytes) <= plan.budget_bytes < plan.store_all_bytes


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    own = found.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(own.pop(name), value), name
    assert own == {}
    for module in found.modules():
        assert not isinstance(vars(module).get("forward"), cs.fitting.in_place.InPlace)


# ---- Hugging Face's Trainer ----------------------------------------------------------------------


class Measured(Trainer):  # type: ignore[misc]
    peaks: Peaks

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        # To save a model changes its configuration, after which it is recorded anew.
        saves = self.args.save_strategy != "no"
        with nullcontext() if saves else self.peaks.of(inputs["input_ids"].shape):
            return super().training_step(model, inputs, *args, **kwargs)


def language() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            loss_type="ForCausalLM",
        )
    )


def texts() -> list[dict[str, Tensor]]:
    """In an order that is kept: 8 long ones, 8 shorter, 4 short."""
    draw = torch.Generator().manual_seed(1)
    lengths = [16] * 8 + [12] * 8 + [9] * 4
    rows = [torch.randint(64, (length,), generator=draw) for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def trained(
    folder: Path, callback: Any = None, resume: str | None = None, **options: Any
) -> tuple[nn.Module, Peaks]:
    loss_func = options.pop("compute_loss_func", None)
    model, peaks = language(), Peaks()
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "num_train_epochs": 2,
            "train_sampling_strategy": "sequential",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "save_strategy": "no",
            **options,
        }
    )
    trainer = Measured(
        model=model,
        args=arguments,
        train_dataset=texts(),
        eval_dataset=texts()[:8],
        compute_loss_func=loss_func,
        callbacks=[callback] if callback else None,
    )
    trainer.peaks = peaks
    trainer.train(resume_from_checkpoint=resume)
    return model, peaks


def of_the_logits(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"]
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def of_any_labels(outputs: Any) -> Tensor:
    logits = outputs["logits"]
    return of_the_logits(outputs, torch.zeros(logits.shape[:2], dtype=torch.int64))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": of_the_logits},
    ],
    ids=lambda options: ",".join(options) or "as it is",
)
def test_hugging_faces_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    loss = of_any_labels if "compute_loss_func" in options else None
    callback = cs.TransformersCallback(BUDGET, loss=loss)
    model, peaks = trained(tmp_path, callback, **options)
    plain, _ = trained(tmp_path, **options)
    assert_same(model, plain)
    assert callback.plan is not None
    assert callback.plan.overhead > 0
    peaks.keep(callback.plan)


def test_hugging_faces_trainer_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    callback = cs.TransformersCallback(BUDGET)
    first = trained(tmp_path / "a", callback, **often)[0]
    plain = trained(tmp_path / "b", **often)[0]
    assert_same(first, plain)
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "a" / "checkpoint-6")
    assert_same(saved, plain)
    assert callback.plan is not None
    # In bytes: a share would be one of the first batch after the checkpoint, which is the smallest.
    resumed = cs.TransformersCallback(callback.plan.budget_bytes)
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    assert_same(trained(tmp_path / "c", resumed, checkpoint, **often)[0], plain)
    assert resumed.plan is not None


def test_a_step_of_hugging_faces_trainer_that_follows_no_plan_is_an_error() -> None:
    callback, model = cs.TransformersCallback(BUDGET), language()
    callback.on_train_begin(SimpleNamespace(label_smoothing_factor=0), None, None, model=model)
    model.transformer(torch.zeros(2, 8, dtype=torch.int64))
    with pytest.raises(cs.PlanMismatchError, match="without a call of the model, a GPT2LM"):
        callback.on_pre_optimizer_step(None, None, None)
    assert "forward" not in vars(model)


def test_budgets_that_cannot_be_read_are_refused_before_training() -> None:
    for kind in (cs.TransformersCallback, cs.LightningCallback):
        with pytest.raises(cs.BudgetSyntaxError):
            kind("much")


def test_callbacks_are_pickled_without_what_they_fit() -> None:
    """As trainers that start other processes do."""
    callback, model = cs.LightningCallback(BUDGET, module="network"), Lit()
    callback.on_train_start(None, model)
    other = pickle.loads(pickle.dumps(callback))
    assert other.plan is None
    other.on_train_end(None, model)
    assert "forward" in vars(model.network)


# ---- Lightning -----------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = [m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2))]
        self.body, self.head = nn.Sequential(*parts), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class Lit(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.criterion = Network(), nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, number: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, number: int) -> None:
        self.training_step(batch, number)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Several(Lit):
    """Trains two children, by a step that calls the parts of the one, and the other."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)

    def training_step(self, batch: Any, number: int) -> Tensor:
        y = self.other(self.network.head(self.network.body(batch[0])))
        return self.criterion(y, batch[1])  # type: ignore[no-any-return]


def batches() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    sizes = (256, 256, 100)
    made = [
        (torch.randn(n, 16, generator=draw), torch.randint(4, (n,), generator=draw)) for n in sizes
    ]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


class Watch(lightning.Callback):  # type: ignore[misc]
    """Measures from the start of a batch to the end of its backward."""

    def __init__(self) -> None:
        self.peaks = Peaks()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        self.window = self.peaks.of(batch[0].shape)
        self.window.__enter__()

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.window.__exit__(None, None, None)


def lit(module: Lit, *callbacks: Any, **options: Any) -> Lit:
    lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        **options,
    ).fit(module, batches(), batches())
    return module


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}],
    ids=lambda options: ",".join(options) or "as it is",
)
def test_lightning(options: dict[str, Any]) -> None:
    callback, watch = cs.LightningCallback(BUDGET), Watch()
    found = lit(Lit(), callback, watch, **options)
    assert_same(found, lit(Lit(), **options))
    assert callback.plan is not None
    assert callback.plan.overhead > 0
    watch.peaks.keep(callback.plan)


def test_the_lightning_module_itself() -> None:
    callback = cs.LightningCallback(BUDGET, module="")
    assert_same(lit(Lit(), callback), lit(Lit()))
    assert callback.plan is not None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "has 2 children with trained parameters: 'network', 'other'; name the module"),
        ("net", "has no module 'net' .*; name one of 'network', 'criterion', 'other'"),
        ("other.weight", "has no module 'other.weight'"),
        ("network", "has run without a call of 'network'"),
    ],
)
def test_what_is_to_be_fitted_is_found_or_asked_for(module: str | None, message: str) -> None:
    model = Several()
    with pytest.raises(cs.PlanMismatchError, match=message):
        lit(model, cs.LightningCallback(BUDGET, module=module), num_sanity_val_steps=0)
    assert all("forward" not in vars(part) for part in model.modules())
    assert all(p.grad is None for p in model.parameters())


# ---- accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """What accelerate keeps for the process, taken back: it has one precision for all."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(
    ("precision", "order"),
    [("no", "before"), ("no", "after"), ("bf16", "before"), ("bf16", "after")],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(precision: str, order: str, accumulate: int) -> None:
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
    )

    def trained(fits: bool) -> tuple[nn.Module, Peaks]:
        torch.manual_seed(0)
        model, peaks = Network(), Peaks()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if fits and order == "before":
            cs.fit(model, budget=BUDGET)
        model, optimizer = accelerator.prepare(model, optimizer)
        if fits and order == "after":
            cs.fit(model, budget=BUDGET)
        for _ in range(2):
            for x, target in batches():
                with accelerator.accumulate(model):
                    with peaks.of(x.shape):
                        loss = cross_entropy(model(x), target)
                        accelerator.backward(loss)
                        del loss
                    optimizer.step()
                    optimizer.zero_grad()
        return model, peaks

    model, peaks = trained(fits=True)
    plan = cs.plan_of(model)
    peaks.keep(plan)
    assert plan.overhead > 0
    plain = trained(fits=False)[0]
    assert not torch.is_autocast_enabled("cpu")  # its decorator was entered once at a time
    if order == "before":  # a copy of it trains, and is no other's
        twin, x = copy.deepcopy(model), torch.ones(256, 16)
        warns = (
            pytest.warns(cs.BudgetWarning, match="copy of a fitted Network")
            if (precision == "bf16")
            else nullcontext()
        )
        before = [p.grad for p in model.parameters()]
        with warns:
            twin(x).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
        assert [p.grad for p in model.parameters()] == before
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert cs.plan_of(model) is plan
    assert_same(cs.unfit(model), plain)


def test_a_copy_of_what_a_trainer_fits_is_a_model_of_its_own() -> None:
    """As averages of weights are: it is planned when it is trained, and not before."""
    module = Lit()
    callback = cs.LightningCallback(BUDGET)
    callback.on_train_start(None, module)
    average = copy.deepcopy(module)
    with torch.no_grad():
        average(torch.ones(4, 16))
    assert callback.plan is None
