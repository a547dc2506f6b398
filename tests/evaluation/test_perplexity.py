from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_model import VOCABULARY, tiny_model
from tiny_families import tiny
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.calibration import TokenWindows, text_windows
from secateur.errors import CalibrationError, SecateurError
from secateur.evaluation import perplexity

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"


def some_windows(count: int = 5, length: int = 12) -> TokenWindows:
    generator = torch.Generator().manual_seed(1)
    return TokenWindows(torch.randint(0, VOCABULARY, (count, length), generator=generator), "some", "some ids")


def brute_force(model: Any, ids_NT: torch.Tensor) -> float:
    """Token by token, from the probabilities, each prefix run on its own."""
    total, targets = 0.0, 0
    with torch.no_grad():
        for ids_T in ids_NT:
            for position in range(1, len(ids_T)):
                logits_V = model(input_ids=ids_T[None, :position]).logits[0, -1].double()
                total -= math.log(logits_V.softmax(0)[ids_T[position]])
                targets += 1
    return math.exp(total / targets)


def test_it_is_the_formula() -> None:
    model, windows = tiny_model(), some_windows()
    measured = perplexity(model, windows)
    assert measured.value == pytest.approx(brute_force(model, windows.ids_NT), rel=1e-5)
    assert (measured.tokens, measured.windows, measured.context) == (5 * 11, 5, 12)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_it_is_the_loss_of_transformers_whatever_the_batch(batch_size: int) -> None:
    model, windows = tiny_model(), some_windows()
    with torch.no_grad():
        losses = [model(input_ids=ids_T[None], labels=ids_T[None]).loss.item() for ids_T in windows.ids_NT]
    measured = perplexity(model, windows, batch_size)
    assert measured.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    # The standard error of a mean, carried through exp.
    deviation = torch.tensor(losses).std().item() / math.sqrt(5)
    assert measured.standard_error == pytest.approx(measured.value * deviation, rel=1e-3)


def test_windows_do_not_see_each_other() -> None:
    model, windows = tiny_model(), some_windows(2)
    swapped = TokenWindows(windows.ids_NT.flip(0), "swapped", "swapped")
    assert perplexity(model, windows, 2).value == pytest.approx(perplexity(model, swapped).value, rel=1e-6)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    measured = perplexity(model, some_windows())
    assert measured.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert measured.standard_error == pytest.approx(0, abs=1e-4)


def test_one_window_has_no_standard_error() -> None:
    assert perplexity(tiny_model(), some_windows(1)).standard_error is None


def test_the_protocol_says_all_that_matters() -> None:
    protocol = perplexity(tiny_model().bfloat16(), some_windows()).protocol
    for part in ("some ids", "context 12", "stride 12", "55 tokens", "no beginning-of-sequence token", "bfloat16"):
        assert part in protocol
    begun = dataclasses.replace(some_windows(), beginning="begun with <bos>")
    assert "begun with <bos>, float32" in perplexity(tiny_model(), begun).protocol


def test_low_precision_logits_are_summed_in_single() -> None:
    model, windows = tiny_model().bfloat16(), some_windows()
    with torch.no_grad():
        logits_NTV = model(input_ids=windows.ids_NT).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits_NTV.flatten(0, 1), windows.ids_NT[:, 1:].flatten())
    assert perplexity(model, windows, 5).value == pytest.approx(loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_given_back_in_its_mode(training: bool) -> None:
    model = tiny_model(attention_dropout=0.9).train(training)
    first, again = perplexity(model, some_windows()), perplexity(model, some_windows())
    assert first == again
    assert model.training is training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("weight", "word"), [(torch.nan, "not a number"), (1e6, "infinite")])
def test_what_is_not_finite_is_refused(weight: float, word: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = weight
    with pytest.raises(SecateurError, match=f"perplexity on some is {word}"):
        perplexity(model, some_windows())


def test_foreign_ids_are_refused() -> None:
    windows = TokenWindows(torch.tensor([[1, 2, VOCABULARY]]), "some", "some")
    with pytest.raises(CalibrationError, match="token id 40"):
        perplexity(tiny_model(), windows)


def test_windows_longer_than_the_positions_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=VOCABULARY))
    with pytest.raises(SecateurError, match="longer than the model's 8 positions; give --window-length 8 or less"):
        perplexity(model, some_windows())


@pytest.mark.skipif(not REFERENCE.exists(), reason="the reference windows are not here")
def test_reference_windows_are_read_as_they_are() -> None:
    windows = text_windows(str(REFERENCE / "evaluation-tokens.safetensors"), Path(), max_windows=2)
    assert windows.ids_NT.shape == (2, 512)
    model = tiny_model(vocab_size=49152, num_hidden_layers=1)
    measured = perplexity(model, windows)
    with torch.no_grad():
        loss = model(input_ids=windows.ids_NT, labels=windows.ids_NT).loss.item()
    assert measured.tokens == 2 * 511
    assert measured.value == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_only_causal_models_have_one(family: str) -> None:
    with pytest.raises(SecateurError, match="is not a causal language model"):
        perplexity(tiny(family), some_windows())


def test_experts_are_measured_too() -> None:
    model, windows = tiny("mixtral"), some_windows(2, 6)
    assert perplexity(model, windows).value == pytest.approx(brute_force(model, windows.ids_NT), rel=1e-5)
