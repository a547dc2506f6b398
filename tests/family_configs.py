"""Tiny configs of every family that has to pass; nothing in the package knows any of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

BASE = {
    "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 3,
    "hidden_size": 64, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}
PLAIN = {"num_attention_heads": 4}
LATENT = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """A config class with tiny sizes, and the class of model where it is no causal language model."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    architecture: str | None = None

    def make_config(self) -> Any:
        kind = getattr(transformers, self.config)
        config = kind(**{**BASE, **self.fields})
        if self.architecture:
            config.architectures = [self.architecture]
        return config

    def make_model(self) -> Any:
        """A random model in which every parameter matters: no norm of ones, no bias of zeros."""
        config = self.make_config()
        torch.manual_seed(0)
        if self.architecture:
            model = getattr(transformers, self.architecture)(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.7 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
        return model.eval()


FAMILIES = {
    "Llama": Family("LlamaConfig", GROUPED),
    "Llama, no groups, biases": Family(
        "LlamaConfig", {**PLAIN, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "Mistral": Family("MistralConfig", GROUPED),
    "Qwen2": Family("Qwen2Config", GROUPED),
    "Qwen3": Family("Qwen3Config", GROUPED),
    "Gemma 2": Family("Gemma2Config", GROUPED),
    "Gemma 3": Family("Gemma3TextConfig", {**GROUPED, "num_hidden_layers": 7}),
    "Phi": Family("PhiConfig", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "Phi-3": Family("Phi3Config", GROUPED),
    "OPT": Family("OPTConfig", {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 64}),
    "BLOOM": Family("BloomConfig", {"n_layer": 3, "n_head": 4}),
    "GPT-2": Family("GPT2Config", {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_inner": 48, "n_positions": 64}),
    "GPT-J": Family(
        "GPTJConfig", {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_inner": 48, "n_positions": 64, "rotary_dim": 8}
    ),
    "GPT-NeoX": Family("GPTNeoXConfig", PLAIN),
    "Falcon 7B": Family("FalconConfig", {**PLAIN, "multi_query": True}),
    "Falcon, new decoder": Family(
        "FalconConfig", {"num_attention_heads": 8, "new_decoder_architecture": True, "num_kv_heads": 4}
    ),
    "Falcon, ALiBi": Family("FalconConfig", {**PLAIN, "alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "GLM": Family("GlmConfig", GROUPED),
    "GLM-4": Family("Glm4Config", GROUPED),
    "OLMo-2": Family("Olmo2Config", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "OLMoE": Family("OlmoeConfig", {"num_attention_heads": 8, "num_key_value_heads": 4, **EXPERTS}),
    "StarCoder2": Family("Starcoder2Config", GROUPED),
    "MPT": Family("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2}),
    "SmolLM3": Family("SmolLM3Config", {**GROUPED, "num_hidden_layers": 4}),
    "Granite": Family("GraniteConfig", GROUPED),
    "Cohere": Family("CohereConfig", GROUPED),
    "Mixtral": Family("MixtralConfig", {**GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "Qwen3-MoE": Family("Qwen3MoeConfig", {**GROUPED, **EXPERTS, "moe_intermediate_size": 24}),
    "DeepSeek-V3": Family(
        "DeepseekV3Config", {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    ),
    "GPT-OSS": Family("GptOssConfig", {**GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "BERT": Family("BertConfig", PLAIN, "BertForMaskedLM"),
    "ViT": Family("ViTConfig", {**PLAIN, "image_size": 16, "patch_size": 8}, "ViTForImageClassification"),
}
