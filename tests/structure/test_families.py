"""The proof, family by family: a cut model equals the dense one with the same units masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import transformers
from proving import VOCABULARY, Removals, assert_cut_equals_masked, find, from_config, in_place, random_model
from torch import nn

from secateur.structure import Structure, UnitGroup

BASE = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2,
    "hidden_size": 64, "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip


@dataclass
class Family:
    """A config and how its cut is written: by config fields, or in place where no field can say it."""

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    cut_config: str = ""  # another class for the cut, where the family's own validation refuses
    kinds: tuple[str, ...] = ("head", "query", "channel")
    # In place: module attributes to set, from (heads left, KV heads left). None: the config says it all.
    attributes: dict[str, Callable[[int, int], int]] | None = None

    def make(self, **changes: Any) -> Any:
        changes = {key: value for key, value in {**self.fields, **changes}.items() if value is not None}
        return getattr(transformers, self.config)(**{**BASE, **changes})


def grouped(config: str, heads: int = 4, kv_heads: int = 2, **more: Any) -> Family:
    options = {key: more.pop(key) for key in ("cut_config", "kinds", "attributes") if key in more}
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    return Family(config, {**sizes, **more}, **options)


def heads_left(heads: int, kv_heads: int) -> int:
    return heads


def kv_heads_left(heads: int, kv_heads: int) -> int:
    return kv_heads


def repeats_left(heads: int, kv_heads: int) -> int:
    return heads // kv_heads


def in_place_family(config: str, **more: Any) -> Family:
    """A family with 8 heads of 8 features each."""
    attributes = more.pop("attributes", {})
    grouped_heads = "num_key_value_heads" in more
    kinds = more.pop("kinds", ("head", "query", "channel") if grouped_heads else ("head", "channel"))
    return Family(config, {"num_attention_heads": 8, **more}, kinds=kinds, attributes=attributes)


FAMILIES = {
    "llama": grouped("LlamaConfig", cut_config="MistralConfig"),
    "llama_mha": grouped("LlamaConfig", 8, 8, cut_config="MistralConfig", kinds=("head", "channel")),
    "llama_4_per_kv": grouped("LlamaConfig", 16, 4, cut_config="MistralConfig"),
    "llama_mqa": grouped("LlamaConfig", 4, 1, cut_config="MistralConfig", kinds=("query", "channel")),
    "llama_tied": grouped("LlamaConfig", tie_word_embeddings=True, cut_config="MistralConfig"),
    "mistral": grouped("MistralConfig", 6, 3, sliding_window=None),
    "mistral_sliding": grouped("MistralConfig", 6, 3, sliding_window=4),
    "qwen2": grouped("Qwen2Config", 6, 3),
    "qwen2_tied": grouped("Qwen2Config", 8, 2, tie_word_embeddings=True),
    "qwen3": grouped("Qwen3Config", 6, 3),
    "qwen3_bias": grouped("Qwen3Config", 8, 2, attention_bias=True),
    "smollm3": grouped("SmolLM3Config", 6, 3),
    "granite": grouped("GraniteConfig", 6, 3),
    "granite_bias": grouped("GraniteConfig", 6, 3, attention_bias=True, mlp_bias=True),
    "gemma": grouped("GemmaConfig"),
    "gemma2": grouped("Gemma2Config", query_pre_attn_scalar=8),
    "gemma3": grouped("Gemma3TextConfig", query_pre_attn_scalar=8),
    "phi": Family("PhiConfig", {"num_attention_heads": 8, "head_dim": 8}, kinds=("head", "channel")),
    "phi3": grouped("Phi3Config", 6, 3),
    "starcoder2": grouped("Starcoder2Config", 6, 3),
    "glm": grouped("GlmConfig", 6, 3),
    "glm4": grouped("Glm4Config", 6, 3),
    "cohere": grouped("CohereConfig", 8, 4),
    "olmo2": grouped("Olmo2Config", 8, 4),
    "nemotron": grouped("NemotronConfig", 8, 4),
    "seed_oss": grouped("SeedOssConfig", 8, 4),
    "exaone4": grouped("Exaone4Config", 8, 4),
    "apertus": grouped("ApertusConfig", 8, 4),
    "modernbert_decoder": in_place_family("ModernBertDecoderConfig"),
    # No config field says these sizes (or the validation refuses them): the cut is put in place.
    "llama_bias": grouped(
        "LlamaConfig", 8, 4, attention_bias=True, mlp_bias=True, attributes={"num_key_value_groups": repeats_left}
    ),
    "cohere_qk_norm": grouped(
        "CohereConfig", 8, 4, use_qk_norm=True, attributes={"num_key_value_groups": repeats_left}
    ),
    "helium": grouped("HeliumConfig", 8, 4, attributes={"num_key_value_groups": repeats_left}),
    "arcee": grouped("ArceeConfig", 8, 4, attributes={"num_key_value_groups": repeats_left}),
    "stablelm": in_place_family(
        "StableLmConfig",
        num_key_value_heads=4,
        attributes={
            "num_key_value_groups": repeats_left,
            "num_heads": heads_left,
            "num_key_value_heads": kv_heads_left,
            "hidden_size": lambda heads, _: heads * 8,
        },
    ),
    "opt": in_place_family("OPTConfig", ffn_dim=24, word_embed_proj_dim=64, attributes={"num_heads": heads_left}),
    "gpt_neox": in_place_family("GPTNeoXConfig"),
    "gpt2": in_place_family(
        "GPT2Config",
        n_inner=24,
        attributes={
            "num_heads": heads_left,
            "split_size": lambda heads, _: heads * 8,
        },
    ),
    "gptj": in_place_family(
        "GPTJConfig",
        n_inner=24,
        rotary_dim=4,
        attributes={
            "num_attention_heads": heads_left,
            "embed_dim": lambda heads, _: heads * 8,
        },
    ),
    "gpt_neo": in_place_family(
        "GPTNeoConfig", num_layers=2, attention_types=[[["global", "local"], 1]], attributes={"num_heads": heads_left}
    ),
    "codegen": in_place_family("CodeGenConfig", n_inner=24, rotary_dim=4, kinds=("channel",)),
    "persimmon": in_place_family("PersimmonConfig", attributes={"num_heads": heads_left}),
    "biogpt": in_place_family("BioGptConfig", attributes={"num_heads": heads_left}),
    "bloom": in_place_family("BloomConfig", kinds=("channel",)),
    "mpt": in_place_family("MptConfig", kinds=("channel",), d_model=64, n_layers=2, expansion_ratio=2),
    "falcon_new": in_place_family(
        "FalconConfig",
        new_decoder_architecture=True,
        num_kv_heads=4,
        num_key_value_heads=4,
        attributes={"num_heads": heads_left, "num_kv_heads": kv_heads_left},
    ),
    "falcon_7b": in_place_family(
        "FalconConfig", kinds=("query", "channel"), num_key_value_heads=1, attributes={"num_heads": heads_left}
    ),
}


def removals_of(groups: list[UnitGroup], kind: str, many: bool) -> Removals:
    """One unit of one kind from the middle, or many, unevenly placed but as many from every family."""
    group = next(group for group in groups if group.kind == kind)
    per_family = group.count // group.families
    take = max(1, per_family // 2) if many else 1
    removed = []
    for family in range(group.families):
        places = [(family + 1 + 2 * step) % per_family for step in range(take)]
        removed += [family * per_family + place for place in dict.fromkeys(places)]
    return [(group, removed)] if len(removed) < group.count else []


def cut_fields(fields: dict[str, Any], removals: Removals) -> dict[str, Any]:
    """The config fields after the removal."""
    sizes = dict(fields)
    heads, kv_heads = sizes["num_attention_heads"], sizes.get("num_key_value_heads")
    groups = kv_heads or heads
    repeats = heads // groups
    for group, removed in removals:
        if group.kind == "channel":
            sizes["intermediate_size"] = group.count - len(removed)
        elif group.kind == "query":
            repeats -= len(removed) // group.families
        else:
            groups -= len(removed)
    sizes["num_attention_heads"] = groups * repeats
    if kv_heads:
        sizes["num_key_value_heads"] = groups
    return sizes


@cache
def found_and_dense(name: str) -> tuple[Structure, nn.Module]:
    config = FAMILIES[name].make()
    return find(config), random_model(config)


def prove(name: str, pick: Callable[[list[UnitGroup]], Removals]) -> None:
    family = FAMILIES[name]
    found, dense = found_and_dense(name)
    for block in range(2):
        assert {group.kind for group in found.of_block(block)} >= set(family.kinds)
    removals = [pick(found.of_block(block)) for block in range(2)]
    changes = cut_fields(family.fields, removals[0])
    heads = changes["num_attention_heads"]
    if family.attributes is not None:
        sizes = (heads, changes.get("num_key_value_heads") or heads)
        build = in_place(dense, **{key: size(*sizes) for key, size in family.attributes.items()})
    else:
        if family.cut_config and BASE["hidden_size"] % heads:
            family = Family(family.cut_config, {**family.fields, "sliding_window": None})
        build = from_config(family.make(**changes))
    assert_cut_equals_masked(dense, build, removals)


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize(
    ("family", "kind"), [(name, kind) for name, family in FAMILIES.items() for kind in family.kinds]
)
def test_cut_equals_masked(family: str, kind: str, many: bool) -> None:
    prove(family, lambda groups: removals_of(groups, kind, many))


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if len(family.kinds) > 1])
def test_all_kinds_together(family: str) -> None:
    kinds = FAMILIES[family].kinds
    prove(family, lambda groups: [r for kind in kinds for r in removals_of(groups, kind, True)])
