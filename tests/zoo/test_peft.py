"""Models of which peft has made most parameters frozen, and put small ones in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .training import Maker, Training, assert_trains_within_budgets, library

hf = library("transformers")
peft = library("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* would keep keys and values:UserWarning"),
    pytest.mark.filterwarnings("ignore:`.*checkpointing.*` is deprecated:FutureWarning"),
]

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 97, (4, 24))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2))


def of_lora() -> Training:
    config = peft.LoraConfig(
        r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return Training(peft.get_peft_model(llama(), config), kwargs=batch())


def of_dora() -> Training:
    config = peft.LoraConfig(
        r=4, use_dora=True, target_modules="all-linear", init_lora_weights=False
    )
    return Training(peft.get_peft_model(llama(), config), kwargs=batch())


def of_ia3() -> Training:
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    return Training(peft.get_peft_model(llama(), config), kwargs=batch())


def of_prompt() -> Training:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return Training(peft.get_peft_model(llama(), config), kwargs=batch())


def of_lora_on_bert() -> Training:
    model = hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3))
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS")
    kwargs = {**batch(), "labels": torch.tensor([0, 1, 2, 0])}
    return Training(peft.get_peft_model(model, config), kwargs=kwargs)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
