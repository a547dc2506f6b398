"""``self``: the windows a model writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibration_model import PADDING_ROWS, tiny_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.calibration import TokenWindows, written
from secateur.errors import CalibrationError, ModelError

Opened = Callable[..., TokenWindows]


def test_windows_are_full_and_without_special_tokens(opened: Opened, vocabulary: int) -> None:
    ids_NT = opened("self", windows=20, window_length=24).ids_NT  # more than one batch
    assert ids_NT.shape == (20, 24)
    assert ids_NT.dtype == torch.int64
    assert ids_NT.min() > 3  # <s>, </s>, <pad> and the added <|tool|>
    assert ids_NT.max() < vocabulary - PADDING_ROWS
    assert len(ids_NT[:, 0].unique()) > 10


def test_an_end_token_that_the_model_longs_for_ends_nothing(tmp_path: Path, opened: Opened) -> None:
    model = tiny_model(40, tie_word_embeddings=False)
    with torch.no_grad():  # every output points where the row of token 1, the end, points
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = 1000
        model.model.norm.weight.fill_(1)
    model.save_pretrained(tmp_path)
    ids_NT = opened("self", windows=4, window_length=30, model_folder=tmp_path, vocabulary=40).ids_NT
    assert ids_NT.shape == (4, 30)
    assert not (ids_NT <= 2).any()


def test_no_tokenizer_is_needed(opened: Opened, bare_folder: Path) -> None:
    ids_NT = opened("self", model_folder=bare_folder, vocabulary=40).ids_NT
    assert ids_NT.shape == (3, 8)
    assert ids_NT.min() > 2


def test_the_generation_settings_of_the_model_are_not_used(opened: Opened, tmp_path: Path) -> None:
    plain, bent = tmp_path / "plain", tmp_path / "bent"
    model = tiny_model(40)
    model.save_pretrained(plain)
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1, repetition_penalty=9.0)
    model.save_pretrained(bent)
    first, second = (opened("self", model_folder=folder, vocabulary=40) for folder in (plain, bent))
    assert torch.equal(first.ids_NT, second.ids_NT)


def test_the_seed_decides_and_the_random_state_of_others_is_left_alone(opened: Opened) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = opened("self")
    assert torch.equal(torch.rand(3), expected)
    assert opened("self").sha256 == first.sha256
    assert opened("self", seed=1).sha256 != first.sha256


def test_samples_follow_the_model(opened: Opened, tmp_path: Path) -> None:
    """A model whose next token depends on nothing: the frequencies of what it writes are its probabilities."""
    model = tiny_model(12, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.copy_(torch.linspace(-1, 1, 12)[:, None].expand(12, 32) / 32)
    model.save_pretrained(tmp_path)
    ids_NT = opened("self", windows=16, window_length=128, model_folder=tmp_path, vocabulary=12).ids_NT
    measured = ids_NT[:, 1:].flatten().bincount(minlength=12).double() / (16 * 127)
    logits = torch.linspace(-1, 1, 12).double()
    logits[:3] = -torch.inf
    assert torch.allclose(measured, logits.softmax(0), atol=0.025)


def test_kept_windows_are_read_back(opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened("self", cache=tmp_path)
    (kept,) = (tmp_path / "windows").iterdir()
    assert kept.suffix == ".safetensors"
    assert torch.equal(load_file(kept)["input_ids"], first.ids_NT)

    def fails(*arguments: object, **named: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(written, "load", fails)
    assert opened("self", cache=tmp_path).sha256 == first.sha256
    for change in ({"seed": 1}, {"windows": 4}, {"window_length": 9}, {"model_hash": "other"}):
        with pytest.raises(AssertionError, match="loaded again"):
            opened("self", cache=tmp_path, **change)


@pytest.mark.parametrize("damage", ["truncate", "other shape"])
def test_damaged_kept_windows_are_written_again(damage: str, opened: Opened, tmp_path: Path) -> None:
    first = opened("self", cache=tmp_path)
    (kept,) = (tmp_path / "windows").iterdir()
    if damage == "truncate":
        kept.write_bytes(kept.read_bytes()[:50])
    else:
        save_file({"input_ids": torch.zeros(2, 2, dtype=torch.int64)}, kept)
    assert opened("self", cache=tmp_path).sha256 == first.sha256
    assert torch.equal(load_file(kept)["input_ids"], first.ids_NT)


def test_half_precision_is_written_in_single(opened: Opened, tmp_path: Path) -> None:
    single, half = tmp_path / "single", tmp_path / "half"
    model = tiny_model(40).half()
    model.save_pretrained(half)
    model.float().save_pretrained(single)
    first, second = (opened("self", model_folder=folder, vocabulary=40) for folder in (single, half))
    assert torch.equal(first.ids_NT, second.ids_NT)


def test_a_damaged_model_is_named(opened: Opened, tmp_path: Path) -> None:
    model = tiny_model(40)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{tmp_path} gives values that are not finite"):
        opened("self", model_folder=tmp_path, vocabulary=40)


def test_a_missing_model_is_an_error(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        opened("self", model_folder=tmp_path / "nowhere")


def test_windows_longer_than_the_positions_are_refused(opened: Opened, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=40, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="longer than the model's 8 positions; give --window-length 8 or less"):
        opened("self", model_folder=tmp_path, vocabulary=40, window_length=12)


def test_a_model_of_special_tokens_only_cannot_write(opened: Opened, tmp_path: Path) -> None:
    tiny_model(3).save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="every token of the model"):
        opened("self", model_folder=tmp_path, vocabulary=3)


def test_special_tokens_come_from_every_file(tmp_path: Path, model_folder: Path, vocabulary: int) -> None:
    model = tiny_model(40)
    model.generation_config.eos_token_id = [5, 6, 99]
    assert written.special_tokens(tmp_path, model.config, model.generation_config, 40) == [0, 1, 2, 5, 6]
    config = json.loads((model_folder / "config.json").read_text())
    assert config["vocab_size"] == vocabulary
    found = written.special_tokens(model_folder, model.config, model.generation_config, vocabulary)
    assert found == [0, 1, 2, 3, 5, 6, 99, *range(vocabulary - PADDING_ROWS, vocabulary)]


def test_a_family_lost_without_its_first_token_writes_after_it(
    opened: Opened, model_folder: Path, vocabulary: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "beginning", lambda tokenizer, folder: [0])
    cache = tmp_path / "cache"
    begun = opened("self", windows=20, window_length=12, cache=cache).ids_NT
    assert begun.shape == (20, 12)
    assert begun[:, 0].tolist() == [0] * 20
    assert begun[:, 1:].min() > 3
    assert len(begun[:, 1].unique()) > 10
    monkeypatch.undo()  # what was kept of the one is not taken for the other
    assert opened("self", windows=20, window_length=12, cache=cache).ids_NT.min() > 3
