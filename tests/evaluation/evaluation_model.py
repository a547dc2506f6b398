"""Tiny random models, and a tokenizer of whole words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 40


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {
        word: token for token, word in enumerate(["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(3, VOCABULARY))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def saved(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny model and the tokenizer in ``folder``."""
    tiny_model(seed, **changes).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
