"""Networks of torchaudio."""

from __future__ import annotations

import pytest
import torch

from .training import Maker, Training, assert_trains_within_budgets, library

audio = library("torchaudio").models


def of_conformer() -> Training:
    model = audio.Conformer(16, 4, 32, 2, 7, dropout=0.1)
    return Training(model, (torch.randn(3, 20, 16), torch.tensor([20, 17, 12])))


def of_conv_tasnet() -> Training:
    model = audio.ConvTasNet(2, 8, 16, 3, 8, 16, 2, 2)
    return Training(model, (torch.randn(2, 1, 200),))


def of_deep_speech() -> Training:
    model = audio.DeepSpeech(8, 16, 10, 0.1)
    return Training(model, (torch.randn(2, 1, 48, 8),), cuts="lean")


def of_emformer() -> Training:
    model = audio.Emformer(16, 4, 32, 2, 4, dropout=0.1, right_context_length=1)
    return Training(model, (torch.randn(2, 13, 16), torch.tensor([12, 9])))


def of_tacotron() -> Training:
    model = audio.Tacotron2(
        n_mels=8,
        n_symbol=20,
        symbol_embedding_dim=16,
        encoder_embedding_dim=16,
        encoder_n_convolution=1,
        decoder_rnn_dim=16,
        prenet_dim=8,
        attention_rnn_dim=16,
        attention_hidden_dim=8,
        postnet_embedding_dim=8,
        attention_location_n_filter=4,
        postnet_n_convolution=2,
    )
    words = torch.randint(0, 20, (2, 7))
    mels = torch.randn(2, 8, 6)
    args = words, torch.tensor([7, 5]), mels, torch.tensor([6, 4])
    # Where all are of one length, torch runs another LSTM, which takes far more.
    most = words, torch.tensor([7, 7]), mels, torch.tensor([6, 6])
    return Training(model, args, most=most)


MODELS: dict[str, Maker] = {
    name.removeprefix("of_"): make for name, make in globals().items() if name.startswith("of_")
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_within_budgets(name: str) -> None:
    torch.manual_seed(0)
    assert_trains_within_budgets(MODELS[name]())
