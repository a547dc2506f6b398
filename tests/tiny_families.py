"""Tiny random models of many families of transformers, for what has to hold whatever the family."""

from __future__ import annotations

from typing import Any

import torch
import transformers

BASE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
OLDER = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROUTED = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", BASE | GROUPED),
    "mistral": ("MistralForCausalLM", BASE | GROUPED),
    "qwen2": ("Qwen2ForCausalLM", BASE | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3ForCausalLM", BASE | GROUPED),
    "gemma2": ("Gemma2ForCausalLM", BASE | GROUPED),
    "gemma3": ("Gemma3ForCausalLM", BASE | GROUPED),
    "phi": ("PhiForCausalLM", BASE),
    "phi3": ("Phi3ForCausalLM", BASE | {"num_key_value_heads": 2}),
    "opt": ("OPTForCausalLM", BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_narrow": ("OPTForCausalLM", BASE | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2LMHeadModel", OLDER),
    "gptj": ("GPTJForCausalLM", OLDER | {"rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", BASE),
    "falcon": ("FalconForCausalLM", {k: v for k, v in BASE.items() if k != "intermediate_size"}),
    "falcon_new": (
        "FalconForCausalLM",
        {k: v for k, v in BASE.items() if k != "intermediate_size"}
        | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "glm": ("GlmForCausalLM", BASE | GROUPED),
    "glm4": ("Glm4ForCausalLM", BASE | GROUPED),
    "olmo2": ("Olmo2ForCausalLM", BASE),
    "starcoder2": ("Starcoder2ForCausalLM", BASE | {"num_key_value_heads": 2}),
    "mpt": ("MptForCausalLM", {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "smollm3": ("SmolLM3ForCausalLM", BASE | {"num_key_value_heads": 2}),
    "granite": ("GraniteForCausalLM", BASE | {"num_key_value_heads": 2}),
    "cohere": ("CohereForCausalLM", BASE | {"num_key_value_heads": 2}),
}

ROUTED_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", BASE | ROUTED | {"num_key_value_heads": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", BASE | GROUPED | ROUTED | {"moe_intermediate_size": 16}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        BASE | ROUTED | {"num_key_value_heads": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "olmoe": ("OlmoeForCausalLM", BASE | ROUTED),
    "phimoe": ("PhimoeForCausalLM", BASE | ROUTED | {"num_key_value_heads": 2}),
    "llama4": (
        "Llama4ForCausalLM",
        BASE | GROUPED | ROUTED | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "attention_chunk_size": 32},
    ),
    "gpt_oss": ("GptOssForCausalLM", BASE | GROUPED | ROUTED),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        BASE
        | {
            "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
        },
    ),
}  # fmt: skip

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", BASE),
    "bert_decoder": ("BertLMHeadModel", BASE | {"is_decoder": True}),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 8, "num_labels": 5,
        },
    ),
}  # fmt: skip

ALL = DECODERS | ROUTED_DECODERS | OTHERS


def tiny(name: str, **changes: Any) -> Any:
    """A random model of the family in evaluation mode; norms, biases and buffers have values of their own."""
    architecture, fields = ALL[name]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(len(name))
    model = model_class(model_class.config_class(**(fields | {"initializer_range": 0.2} | changes)))
    stored = model.state_dict()
    with torch.no_grad():
        for tensor in stored.values():
            if tensor.is_floating_point() and tensor.dim() >= 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()
