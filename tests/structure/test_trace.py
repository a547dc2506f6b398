"""Where the trace must stop, what it must not offer, and what it must not disturb."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

import pytest
import torch
from proving import find, inside_blocks, weightless
from torch import nn
from transformers import (
    BloomConfig,
    CodeGenConfig,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
)

from secateur.errors import StructureError
from secateur.structure import OUTSIDE, find_all_units, find_units

TINY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip

LATENT = {
    **TINY, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
}  # fmt: skip


class Applied(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.function(states)


def with_activation(function: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    model = weightless(LlamaConfig(**TINY))
    for block in model.model.layers:
        block.mlp.act_fn = Applied(function)
    return model


def test_an_unknown_operator_stops_the_trace_by_name_and_place() -> None:
    model = with_activation(lambda states: states.roll(1, dims=-1))
    with pytest.raises(StructureError, match=r"block 0: the operator aten\.roll\.default in mlp\.act_fn has no rule"):
        find_all_units(model, "model.layers")


def test_control_flow_on_data_stops_the_trace() -> None:
    model = with_activation(lambda states: states if states.sum().item() > 0 else -states)
    with pytest.raises(StructureError, match=r"mlp\.act_fn .*control flow may depend on data"):
        find_all_units(model, "model.layers")


def test_a_picked_index_that_is_not_known_stops_the_trace() -> None:
    model = with_activation(lambda states: states[..., torch.zeros(24, dtype=torch.long, device="meta")])
    with pytest.raises(StructureError, match=r"aten\.index\.Tensor in mlp\.act_fn cannot be followed"):
        find_all_units(model, "model.layers")


def test_a_write_into_a_buffer_stops_the_trace() -> None:
    model = with_activation(lambda states: torch.empty(states.shape, device="meta").copy_(states))
    with pytest.raises(StructureError, match=r"aten\.copy_\.default in mlp\.act_fn writes into a buffer"):
        find_all_units(model, "model.layers")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda s: s.softmax(-1), "mlp.act_fn normalises over the channel units"),
        (lambda s: s * s[..., :1], "mlp.act_fn takes one fixed index of the channel units"),
        (lambda s: s * torch.ones(24, device="meta"), "mlp.act_fn has a constant with an entry for each of"),
        (lambda s: s * s.unbind(-1)[3].unsqueeze(-1), "mlp.act_fn takes single fixed indices of"),
        (lambda s: s.transpose(1, 2) @ s @ s.transpose(1, 2) @ s, "mlp.act_fn mixes activations across"),
    ],
)
def test_what_zeroing_would_not_be_removal_for_is_refused(
    function: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    def padded(states: torch.Tensor) -> torch.Tensor:
        result = function(states)
        return result if result.shape == states.shape else states

    structure = inside_blocks(find_all_units(with_activation(padded), "model.layers"))
    assert {group.kind for group in structure.units} == {"head", "query"}
    if "mixes" not in words:  # attention features are no channels at all, so nothing is refused
        assert [refusal.kind for refusal in structure.refused] == ["channel", "channel"]
        assert words in structure.refused[0].reason


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda s: s.tanh(), {1}),
        (lambda s: s + torch.cat([s[..., 12:], s[..., :12]], -1), {2}),  # index i comes with i + 12
        (lambda s: s + s.chunk(3, -1)[0].repeat(1, 1, 3), set()),  # a few for all
        (lambda s: s.view(*s.shape[:-1], 2, 12).flatten(-2), set()),  # split like heads: not a plain channel
        (lambda s: s + s.view(*s.shape[:-1], 12, 2)[..., 0].repeat_interleave(2, -1), set()),
    ],
)
def test_ties_inside_the_activation_are_seen(
    function: Callable[[torch.Tensor], torch.Tensor], expected: set[int]
) -> None:
    """How many indices of each member one channel owns; nothing where channels cannot leave."""
    try:
        structure = find_all_units(with_activation(function), "model.layers")
    except StructureError:
        assert not expected
        return
    channels = [group for group in structure.of_block(0) if group.kind == "channel"]
    assert {member.index_UC.shape[1] for group in channels for member in group.members} == expected
    for group in channels:
        for member in group.members:
            step = 24 // member.index_UC.shape[1]
            assert member.index_UC.tolist() == [list(range(u, 24, step)) for u in range(step)]


def test_statistics_over_units_are_offered_where_a_module_can_take_them_over_the_survivors() -> None:
    model = with_activation(lambda states: states - states.mean(-1, keepdim=True))
    channel = next(group for group in find_all_units(model, "model.layers").of_block(0) if group.kind == "channel")
    assert [norm.module for norm in channel.norms] == ["mlp.act_fn"]
    for block in model.model.layers:  # the same, but not in a module of its own
        block.mlp.act_fn = nn.Sequential(Applied(torch.tanh), nn.Identity())
        block.mlp.act_fn.forward = lambda states: states - states.mean(-1, keepdim=True)
    structure = find_all_units(model, "model.layers")
    reason = next(refusal.reason for refusal in structure.refused if refusal.kind == "channel")
    assert reason == "mlp.act_fn takes statistics over the channel units (aten.mean.dim)"


def test_a_norm_over_all_heads_goes_along_with_them() -> None:
    structure = find(Olmo2Config(**TINY, pad_token_id=0))
    norms = {group.kind: [norm.module for norm in group.norms] for group in structure.of_block(0)}
    assert norms == {
        "head": ["self_attn.k_norm", "self_attn.q_norm"],
        "query": ["self_attn.q_norm"],
        "channel": [],
    }
    head = next(group for group in structure.of_block(0) if group.kind == "head")
    assert head.norms[1].index_UC.tolist() == [list(range(16)), list(range(16, 32))]


@pytest.mark.parametrize(
    ("config", "path", "period"),
    [
        (BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=61), "alibi", 4),
        (MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=61), "position_bias", 4),
    ],
)
def test_constant_slopes_go_along_with_their_heads(config: object, path: str, period: int) -> None:
    head = next(group for group in find(config).of_block(0) if group.kind == "head")
    assert [(argument.path, argument.dim, argument.period) for argument in head.arguments] == [(path, 0, period)]
    assert head.arguments[0].index_UC.tolist() == [[0], [1], [2], [3]]


def test_heads_of_two_levels_are_refused() -> None:
    structure = find(CodeGenConfig(n_embd=64, n_layer=2, n_head=8, rotary_dim=4, vocab_size=61))
    assert {group.kind for group in structure.units} == {"channel"}
    assert any("two levels" in refusal.reason for refusal in structure.refused)


def test_experts_come_with_their_router_and_a_token_keeps_enough_of_them() -> None:
    structure = find(MixtralConfig(**TINY, num_local_experts=6, num_experts_per_tok=2))
    experts = next(group for group in structure.of_block(0) if group.kind == "expert")
    assert (experts.count, experts.families, experts.minimum) == (6, 1, 2)
    roles = {member.parameter: (member.dim, member.role) for member in experts.members}
    assert roles == {
        "mlp.gate.weight": (0, "choice"),
        "mlp.experts.gate_up_proj": (0, "producer"),
        "mlp.experts.down_proj": (0, "producer"),
    }
    channels = next(group for group in structure.of_block(0) if group.kind == "channel")
    owned = {member.parameter: (member.dim, member.index_UC[0].tolist()) for member in channels.members}
    assert owned == {"mlp.experts.gate_up_proj": (1, [0, 24]), "mlp.experts.down_proj": (2, [0])}


def test_experts_chosen_in_groups_leave_every_group_alike() -> None:
    structure = find(DeepseekV3Config(**LATENT, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2))
    experts = next(group for group in structure.of_block(1) if group.kind == "expert")
    assert (experts.count, experts.families, experts.minimum) == (16, 4, 2)
    bias = next(member for member in experts.members if member.parameter.endswith("e_score_correction_bias"))
    assert bias.role == "choice"


def test_latent_attention_offers_whole_heads_and_refuses_its_latent_space_by_name() -> None:
    structure = find(DeepseekV3Config(**LATENT, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1))
    heads = next(group for group in structure.of_block(0) if group.kind == "head")
    assert {member.parameter for member in heads.members} == {
        "self_attn.q_b_proj.weight",
        "self_attn.kv_b_proj.weight",
        "self_attn.o_proj.weight",
    }
    refused = {refusal.reason for refusal in structure.refused if refusal.block == 0}
    assert {reason.split()[6] for reason in refused} == {"self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_channels_span_every_block_and_what_stands_outside(tied: bool) -> None:
    structure = find_all_units(weightless(LlamaConfig(**TINY, tie_word_embeddings=tied)), "model.layers")
    hidden = [group for group in structure.units if group.kind == "hidden"]
    assert [(group.block, group.count) for group in hidden] == [(0, 32), (1, 32), (OUTSIDE, 32)]
    outside = {(member.parameter, member.dim) for member in hidden[-1].members}
    assert outside == {("model.embed_tokens.weight", 1), ("model.norm.weight", 0), ("lm_head.weight", 1)}
    inside = {(member.parameter, member.dim): member.role for member in hidden[0].members}
    assert inside["self_attn.q_proj.weight", 1] == "consumer"
    assert inside["self_attn.o_proj.weight", 0] == "producer"
    assert len(inside) == 9
    assert [norm.module for norm in hidden[0].norms] == ["input_layernorm", "post_attention_layernorm"]


def test_a_residual_stream_with_a_constant_for_each_channel_is_refused_by_name() -> None:
    model = weightless(LlamaConfig(**TINY))
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda module, args, out: out * torch.ones(32, device="meta"))
    structure = find_all_units(model, "model.layers")
    assert not [group for group in structure.units if group.kind == "hidden"]
    reason = next(refusal.reason for refusal in structure.refused if refusal.kind == "hidden")
    assert "has a constant with an entry for each of the hidden channels" in reason


def test_a_model_that_reads_neither_tokens_nor_pixels_is_refused_in_a_sentence() -> None:
    model = weightless(LlamaConfig(**TINY))
    model.main_input_name = "input_features"
    with pytest.raises(StructureError, match="runs on input_features, not on token ids or pixels"):
        find_all_units(model, "model.layers")


def test_shared_parameters_are_refused() -> None:
    model = weightless(LlamaConfig(**TINY))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(StructureError, match="are one parameter"):
        find_all_units(model, "model.layers")


def test_wrong_places_are_refused() -> None:
    model = weightless(LlamaConfig(**TINY))
    with pytest.raises(StructureError, match="no module transformer"):
        find_all_units(model, "transformer.h")
    with pytest.raises(StructureError, match="no list of blocks"):
        find_all_units(model, "model.norm")
    with pytest.raises(StructureError, match="no block 2"):
        find_units(model, "model.layers", 2)


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61)])
def test_the_model_is_left_as_it_was(config: object) -> None:
    model = weightless(config)
    model.train()
    model.config._attn_implementation = "sdpa"
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    name = "model.layers" if hasattr(model, "model") else "transformer.h"
    find_all_units(model, name)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_a_70b_config_is_traced_in_seconds_and_little_memory() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    model = weightless(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    structure = find_all_units(model, "model.layers")
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024**2  # KiB
    assert [(g.kind, g.count, g.families) for g in structure.of_block(79)] == [
        ("head", 8, 1), ("query", 64, 8), ("channel", 28672, 1), ("hidden", 8192, 1),
    ]  # fmt: skip
