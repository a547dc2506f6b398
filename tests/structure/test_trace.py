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
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
)

from secateur.errors import StructureError
from secateur.structure import find_all_units, find_units

TINY = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
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
        (lambda s: s - s.mean(-1, keepdim=True), "mlp.act_fn takes statistics over the channel units"),
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


def test_a_norm_over_all_heads_refuses_them_by_name() -> None:
    structure = find(Olmo2Config(**TINY, pad_token_id=0))
    assert {group.kind for group in structure.units} == {"channel"}
    reasons = {refusal.kind: refusal.reason for refusal in structure.refused}
    assert reasons["head"] == "self_attn.q_norm takes statistics over the head units (aten.mean.dim)"
    assert set(reasons) == {"head", "query"}


def test_heads_tied_to_constant_slopes_are_refused() -> None:
    for config in (
        BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=61),
        MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=61),
    ):
        structure = find(config)
        assert {group.kind for group in structure.units} == {"channel"}
        assert "has a constant with an entry for each of the head units" in structure.refused[0].reason


def test_heads_of_two_levels_are_refused() -> None:
    structure = find(CodeGenConfig(n_embd=64, n_layer=2, n_head=8, rotary_dim=4, vocab_size=61))
    assert {group.kind for group in structure.units} == {"channel"}
    assert any("two levels" in refusal.reason for refusal in structure.refused)


def test_experts_are_refused_not_guessed() -> None:
    with pytest.raises(StructureError, match=r"mlp"):
        find(MixtralConfig(**TINY, num_local_experts=4))


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
    start = time.perf_counter()
    structure = find_all_units(model, "model.layers")
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024**2  # KiB
    assert [(g.kind, g.count, g.families) for g in structure.of_block(79)] == [
        ("head", 8, 1), ("query", 64, 8), ("channel", 28672, 1),
    ]  # fmt: skip
