"""Models of transformers, called as a Trainer calls them: a batch by keyword, labels in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from .training import Maker, Training, assert_trains_within_budgets, library

hf = library("transformers")
tokenizers = library("tokenizers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the .* would keep keys and values:UserWarning"),
    pytest.mark.filterwarnings("ignore:`.*checkpointing.*` is deprecated:FutureWarning"),
]

ROWS, LENGTH, WORDS = 4, 24, 97
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(5, WORDS, (ROWS, length))


def padded(length: int = LENGTH) -> torch.Tensor:
    """A mask of rows of other lengths."""
    lengths = torch.tensor([length, length - 3, length - 9, length - 1])
    return (torch.arange(length) < lengths[:, None]).long()


def causal(model: Any, mask: torch.Tensor | None = None, **more: Any) -> Training:
    words = ids()
    masked = {} if mask is None else {"attention_mask": mask}
    return Training(model, kwargs={"input_ids": words, "labels": words, **masked, **more})


def of_gpt2() -> Training:
    config = hf.GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return causal(hf.GPT2LMHeadModel(config))


def of_gpt2_padded() -> Training:
    config = hf.GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return causal(hf.GPT2LMHeadModel(config), padded(), use_cache=False)


def of_gpt2_with_all_outputs() -> Training:
    config = hf.GPT2Config(
        vocab_size=WORDS,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        attn_implementation="eager",
    )
    return causal(hf.GPT2LMHeadModel(config), output_attentions=True, output_hidden_states=True)


def of_gpt2_checkpointed() -> Training:
    config = hf.GPT2Config(vocab_size=WORDS, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = hf.GPT2LMHeadModel(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return causal(model.train())


def of_llama() -> Training:
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, attention_dropout=0.1)
    return causal(hf.LlamaForCausalLM(config), padded())


def of_mistral() -> Training:
    config = hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)
    return causal(hf.MistralForCausalLM(config), torch.ones(ROWS, LENGTH).long())


def of_qwen3() -> Training:
    config = hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    return causal(hf.Qwen3ForCausalLM(config), padded())


def of_gemma2() -> Training:
    config = hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=8)
    return causal(hf.Gemma2ForCausalLM(config), padded())


def of_phi() -> Training:
    config = hf.PhiConfig(**SMALL, resid_pdrop=0.1, embd_pdrop=0.1)
    return causal(hf.PhiForCausalLM(config))


def of_bloom() -> Training:
    config = hf.BloomConfig(
        vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1
    )
    return causal(hf.BloomForCausalLM(config), padded())


def of_opt() -> Training:
    config = hf.OPTConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    )
    return causal(hf.OPTForCausalLM(config), padded())


def of_mixtral() -> Training:
    config = hf.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, output_router_logits=True
    )
    return replace(causal(hf.MixtralForCausalLM(config)), sizes_vary=True)


def of_mamba() -> Training:
    # Stages between dear calls keep more storages than are told apart to the byte.
    config = hf.MambaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, state_size=4)
    return replace(causal(hf.MambaForCausalLM(config)), cuts="smallest")


def of_bert() -> Training:
    """A batch as a tokenizer makes it, padded."""
    words = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c", "d"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")
    texts = ["a b c d " * 6, "a c", "d d a b c", "a b c d e f g"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    batch["labels"] = torch.randint(0, 3, (4,))
    return Training(
        hf.BertForSequenceClassification(hf.BertConfig(**SMALL, num_labels=3)), kwargs=batch
    )


def of_bert_masked() -> Training:
    words, mask = ids(), torch.ones(ROWS, LENGTH).long()
    labels = torch.where(torch.rand(ROWS, LENGTH) < 0.2, words, -100)
    model = hf.BertForMaskedLM(hf.BertConfig(**SMALL))
    return Training(model, kwargs={"input_ids": words, "attention_mask": mask, "labels": labels})


def of_roberta_tokens() -> Training:
    model = hf.RobertaForTokenClassification(hf.RobertaConfig(**SMALL, num_labels=5))
    labels = torch.randint(0, 5, (ROWS, LENGTH))
    return Training(model, (ids(),), {"attention_mask": padded(), "labels": labels})


def of_distilbert_answers() -> Training:
    config = hf.DistilBertConfig(vocab_size=WORDS, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    kwargs = {
        "input_ids": ids(),
        "attention_mask": padded(),
        "start_positions": torch.randint(0, 9, (ROWS,)),
        "end_positions": torch.randint(9, 14, (ROWS,)),
    }
    return Training(hf.DistilBertForQuestionAnswering(config), kwargs=kwargs)


def of_deberta() -> Training:
    config = hf.DebertaV2Config(
        **SMALL,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        type_vocab_size=0,
    )
    model = hf.DebertaV2ForSequenceClassification(config)
    labels = torch.randint(0, 2, (ROWS,))
    return Training(
        model, kwargs={"input_ids": ids(), "attention_mask": padded(), "labels": labels}
    )


def of_t5() -> Training:
    config = hf.T5Config(
        vocab_size=WORDS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    kwargs = {"input_ids": ids(), "attention_mask": padded(), "labels": ids(11)}
    return Training(hf.T5ForConditionalGeneration(config), kwargs=kwargs)


def of_bart() -> Training:
    """With layers that are left out by chance."""
    config = hf.BartConfig(
        vocab_size=WORDS,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        encoder_layerdrop=0.0,
    )
    kwargs = {"input_ids": ids(), "attention_mask": padded(), "labels": ids(11)}
    return Training(hf.BartForConditionalGeneration(config), kwargs=kwargs)


def of_vit() -> Training:
    small = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 3}
    model = hf.ViTForImageClassification(hf.ViTConfig(**small))
    kwargs = {"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.randint(0, 3, (8,))}
    return Training(model, kwargs=kwargs)


def of_segformer() -> Training:
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=3,
    )
    kwargs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(0, 3, (2, 32, 32))}
    return Training(hf.SegformerForSemanticSegmentation(config), kwargs=kwargs)


def of_clip() -> Training:
    text = {**SMALL, "eos_token_id": WORDS - 1}
    config = hf.CLIPConfig(
        text_config=text,
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    kwargs = {
        "input_ids": ids(),
        "attention_mask": padded(),
        "pixel_values": torch.randn(ROWS, 3, 32, 32),
        "return_loss": True,
    }
    return Training(hf.CLIPModel(config), kwargs=kwargs)


def of_whisper() -> Training:
    config = hf.WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=16,
        max_target_positions=32,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    kwargs = {"input_features": torch.randn(ROWS, 8, 32), "labels": ids(11)}
    return Training(hf.WhisperForConditionalGeneration(config), kwargs=kwargs)


def of_wav2vec2() -> Training:
    config = hf.Wav2Vec2Config(
        **SMALL,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        mask_time_prob=0.0,
        ctc_loss_reduction="mean",
    )
    kwargs = {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 9, (2, 5))}
    return Training(hf.Wav2Vec2ForCTC(config), kwargs=kwargs)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
