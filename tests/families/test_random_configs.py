"""Whatever the sizes, ties and biases: what is cut equals what is masked out, and one form of output says it."""

from __future__ import annotations

from typing import Any

import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.checkpoint.skeleton import build_skeleton
from secateur.proof import judge
from secateur.small import small_model
from secateur.structure import OUTSIDE, ModelCut, find_all_units

COMMON = {"vocab_size": 61, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@st.composite
def configs(draw: Any) -> Any:
    groups, repeats, width = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 6, 8]))
    heads, tied, bias = groups * repeats, draw(st.booleans()), draw(st.booleans())
    channels, hidden = draw(st.integers(3, 20)), heads * width * draw(st.integers(1, 2))
    sizes = {"num_attention_heads": heads, "hidden_size": hidden, "intermediate_size": channels}
    grouped = sizes | {"num_key_value_heads": groups, "head_dim": width}
    family = draw(st.sampled_from(["Llama", "Qwen3", "Granite", "Mixtral", "OPT", "GPT2", "GPTNeoX"]))
    more: dict[str, Any] = {
        "Llama": grouped | {"attention_bias": bias, "mlp_bias": bias},
        "Qwen3": grouped | {"attention_bias": bias},
        "Granite": grouped | {"attention_bias": bias},
        "Mixtral": grouped | {"num_local_experts": draw(st.integers(3, 6)), "num_experts_per_tok": 2},
        "OPT": sizes | {"ffn_dim": channels, "word_embed_proj_dim": hidden, "enable_bias": bias},
        "GPT2": {"n_head": heads, "n_embd": hidden, "n_inner": channels, "n_layer": 2},
        "GPTNeoX": sizes | {"attention_bias": bias, "rotary_pct": 0.5},
    }
    return getattr(transformers, f"{family}Config")(**COMMON, **more[family], tie_word_embeddings=tied)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.data())
def test_random_cuts_of_random_configs_equal_the_masked_model(config: Any, data: st.DataObject) -> None:
    skeleton = build_skeleton(config)
    small = small_model(skeleton, find_all_units(skeleton.model, skeleton.blocks_name))
    structure = small.structure
    removals: list[list[Any]] = [[] for _ in skeleton.blocks]
    outside: list[Any] = []
    kinds = {group.kind for group in structure.units} - {"block"}
    chosen = data.draw(st.sets(st.sampled_from(sorted(kinds)), min_size=1))
    hidden: list[int] | None = None
    for group in structure.units:
        if group.kind not in chosen:
            continue
        size = group.count // group.families
        leaving = data.draw(st.integers(0, size - group.minimum))
        units = [
            family * size + place
            for family in range(group.families)
            for place in data.draw(st.permutations(range(size)))[:leaving]
        ]
        if group.kind == "hidden":
            hidden = hidden if hidden is not None else units
            units = hidden
        (outside if group.block == OUTSIDE else removals[group.block]).append((group, sorted(units)))
    cut = ModelCut(tuple(removals), outside)
    verdict = judge(small, cut)
    assert verdict.form is not None, verdict.failed
    assert verdict.difference < 1e-4
