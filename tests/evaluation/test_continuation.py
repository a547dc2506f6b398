from __future__ import annotations

import pytest
import torch
from evaluation_model import tiny_model, word_tokenizer

from secateur.errors import SecateurError
from secateur.evaluation import continuations

PROMPT = "w5 w9 w12"


def greedy(seed: int, new_tokens: int) -> list[int]:
    model, ids = tiny_model(seed), [5, 9, 12]
    for _ in range(new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == 1:
            break
        ids.append(token)
    return ids[3:]


def test_each_model_goes_on_with_its_likeliest_tokens() -> None:
    tokenizer = word_tokenizer()
    models = {"a": tiny_model(0), "b": tiny_model(1)}
    written = continuations(models, tokenizer, PROMPT, 6)
    assert list(written) == ["a", "b"]
    for seed, name in enumerate(models):
        assert written[name] == tokenizer.decode(greedy(seed, 6), skip_special_tokens=True)
    assert written["a"] != written["b"]


def test_sampling_settings_are_left_alone_but_not_used() -> None:
    model = tiny_model().train()
    model.generation_config.update(do_sample=True, temperature=5.0, max_length=4)
    settings = model.generation_config.to_dict()
    (written,) = continuations({"a": model}, word_tokenizer(), PROMPT, 6).values()
    assert written == word_tokenizer().decode(greedy(0, 6), skip_special_tokens=True)
    assert model.generation_config.to_dict() == settings
    assert model.training


def test_an_end_token_ends_it() -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = greedy(0, 1)[0]
    (written,) = continuations({"a": model}, word_tokenizer(), PROMPT, 6).values()
    assert len(written.split()) <= 1


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(SecateurError, match="the prompt is empty"):
        continuations({"a": tiny_model()}, word_tokenizer(), "", 6)
