"""Tiny random models of the Llama family, big enough for every kind of unit."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A random Llama of hidden 64 with four KV heads of width 8, eight query heads, and three blocks."""
    fields = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return _spread(LlamaForCausalLM(LlamaConfig(**(fields | changes))))


def tiny_qwen2(**changes: Any) -> Qwen2ForCausalLM:
    """The same sizes with biases on q, k and v."""
    torch.manual_seed(1)
    fields = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.2}
    return _spread(Qwen2ForCausalLM(Qwen2Config(**(fields | heads | changes))))


def tiny_mistral(**changes: Any) -> MistralForCausalLM:
    """The same sizes with one query head a KV head."""
    torch.manual_seed(2)
    fields = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.2}
    return _spread(MistralForCausalLM(MistralConfig(**(fields | heads | changes))))


def _spread(model: Any) -> Any:
    """Give what starts as ones or zeros (norms, biases) values of its own, so that a mistake with them shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
