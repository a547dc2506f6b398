"""What the units are, index by index, against plain arithmetic on the config."""

from __future__ import annotations

import numpy as np
import pytest
from proving import assert_cut_equals_masked, find, from_config, random_model, weightless
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from secateur.structure import Structure, UnitGroup, find_units, parameters_per_unit

KV_HEADS, REPEATS, HEAD_DIM, WIDTH = 3, 4, 8, 20
HEADS = KV_HEADS * REPEATS
SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
}  # fmt: skip


def group_of(structure: Structure, kind: str, block: int = 0) -> UnitGroup:
    return next(group for group in structure.of_block(block) if group.kind == kind)


def rows(head: int) -> list[int]:
    return list(range(head * HEAD_DIM, (head + 1) * HEAD_DIM))


@pytest.fixture(scope="module")
def biased() -> Structure:
    return find(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))


def test_a_head_is_a_whole_kv_group_with_everything_that_is_its_own(biased: Structure) -> None:
    head = group_of(biased, "head")
    assert (head.count, head.families, head.module, head.block) == (KV_HEADS, 1, "self_attn", 0)
    assert [(m.parameter, m.dim, m.role) for m in head.members] == [
        ("self_attn.q_proj.weight", 0, "producer"),
        ("self_attn.q_proj.bias", 0, "producer"),
        ("self_attn.k_proj.weight", 0, "producer"),
        ("self_attn.k_proj.bias", 0, "producer"),
        ("self_attn.v_proj.weight", 0, "producer"),
        ("self_attn.v_proj.bias", 0, "producer"),
        ("self_attn.o_proj.weight", 1, "consumer"),
    ]
    for member in head.members:
        for group in range(KV_HEADS):
            own = [h for h in range(HEADS) if h // REPEATS == group]
            wide = "q_proj" in member.parameter or "o_proj" in member.parameter
            expected = [row for h in own for row in rows(h)] if wide else rows(group)
            assert member.index_UC[group].tolist() == expected
            assert member.index_UC.dtype == np.int64


def test_a_query_unit_is_one_query_head_and_leaves_keys_and_values(biased: Structure) -> None:
    query = group_of(biased, "query")
    assert (query.count, query.families, query.module) == (HEADS, KV_HEADS, "self_attn")
    assert [(m.parameter, m.dim, m.role) for m in query.members] == [
        ("self_attn.q_proj.weight", 0, "producer"),
        ("self_attn.q_proj.bias", 0, "producer"),
        ("self_attn.o_proj.weight", 1, "consumer"),
    ]
    for member in query.members:
        assert member.index_UC.tolist() == [rows(head) for head in range(HEADS)]


def test_a_channel_is_one_row_of_gate_and_up_and_one_column_of_down(biased: Structure) -> None:
    channel = group_of(biased, "channel")
    assert (channel.count, channel.families, channel.module) == (WIDTH, 1, "mlp")
    assert [(m.parameter, m.dim, m.role) for m in channel.members] == [
        ("mlp.gate_proj.weight", 0, "producer"),
        ("mlp.gate_proj.bias", 0, "producer"),
        ("mlp.up_proj.weight", 0, "producer"),
        ("mlp.up_proj.bias", 0, "producer"),
        ("mlp.down_proj.weight", 1, "consumer"),
    ]
    for member in channel.members:
        assert member.index_UC.tolist() == [[index] for index in range(WIDTH)]


def test_fused_projections_are_told_apart() -> None:
    found = find(Phi3Config(**SIZES, pad_token_id=0))
    keys, values = HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM
    for group, index in enumerate(group_of(found, "head").members[0].index_UC.tolist()):
        queries = [row for h in range(group * REPEATS, (group + 1) * REPEATS) for row in rows(h)]
        assert index == queries + [keys + r for r in rows(group)] + [values + r for r in rows(group)]
    assert group_of(found, "query").members[0].index_UC.tolist() == [rows(head) for head in range(HEADS)]
    fused = group_of(found, "channel").members[0]
    assert fused.index_UC.tolist() == [[index, WIDTH + index] for index in range(WIDTH)]


def test_query_units_need_shared_keys_and_heads_need_two_groups() -> None:
    plain = find(LlamaConfig(**{**SIZES, "num_key_value_heads": HEADS}))
    assert {group.kind for group in plain.units} == {"head", "channel"}
    single = find(LlamaConfig(**{**SIZES, "num_key_value_heads": 1}))
    assert {group.kind for group in single.units} == {"query", "channel"}
    assert group_of(single, "query").families == 1


def test_the_features_of_a_single_head_are_no_channels() -> None:
    single = find(LlamaConfig(**{**SIZES, "num_attention_heads": 1, "num_key_value_heads": 1}))
    assert [(group.kind, group.module) for group in single.of_block(0)] == [("channel", "mlp")]
    assert not single.refused


def test_every_block_gets_its_own_groups(biased: Structure) -> None:
    assert [(group.kind, group.block) for group in biased.units] == [
        (kind, block) for block in range(2) for kind in ("head", "query", "channel")
    ]
    model = weightless(LlamaConfig(**SIZES))
    alone = find_units(model, "model.layers", 1)
    assert {(group.kind, group.block) for group in alone} == {("head", 1), ("query", 1), ("channel", 1)}


def test_parameters_per_unit_counts_what_a_cut_saves(biased: Structure) -> None:
    model = weightless(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    shapes = {name: tuple(p.shape) for name, p in model.model.layers[0].named_parameters()}
    hidden, group_rows = 48, REPEATS * HEAD_DIM
    assert parameters_per_unit(group_of(biased, "channel"), shapes) == 3 * hidden + 2
    assert parameters_per_unit(group_of(biased, "query"), shapes) == 2 * HEAD_DIM * hidden + HEAD_DIM
    assert parameters_per_unit(group_of(biased, "head"), shapes) == (
        2 * group_rows * hidden + group_rows + 2 * (HEAD_DIM * hidden + HEAD_DIM)
    )


def test_random_sizes_never_break_the_proof() -> None:
    random = np.random.default_rng(0)
    for _ in range(12):
        kv_heads, repeats = int(random.integers(1, 5)), int(random.integers(1, 4))
        sizes = {
            "vocab_size": 61, "num_hidden_layers": 2, "hidden_size": int(random.choice([24, 40, 64])),
            "intermediate_size": int(random.integers(2, 40)), "head_dim": int(random.choice([2, 8, 12])),
            "num_key_value_heads": kv_heads, "num_attention_heads": kv_heads * repeats,
            "tie_word_embeddings": bool(random.integers(2)),
        }  # fmt: skip
        config_class = [MistralConfig, Qwen2Config][int(random.integers(2))]
        config = config_class(**sizes)
        found = find(config)
        removals = []
        for block in range(2):
            chosen = []
            for group in found.of_block(block):
                per_family = group.count // group.families
                take = {"head": 1, "query": 1, "channel": group.count // 3 + 1}[group.kind]
                units = [
                    family * per_family + int(place)
                    for family in range(group.families)
                    for place in random.choice(per_family, take, replace=False)
                ]
                chosen.append((group, units))
            removals.append(chosen)
        kinds = {group.kind for group, _ in removals[0]}
        taken = {group.kind: len(units) for group, units in removals[0]}
        kv_left, repeats_left = kv_heads - ("head" in kinds), repeats - ("query" in kinds)
        changes = {
            "num_key_value_heads": kv_left,
            "num_attention_heads": kv_left * repeats_left,
            "intermediate_size": sizes["intermediate_size"] - taken["channel"],
        }
        assert_cut_equals_masked(random_model(config), from_config(config_class(**{**sizes, **changes})), removals)
