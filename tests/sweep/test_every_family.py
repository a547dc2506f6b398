"""What a sweep measures of every family, beside plain backpropagation and inputs worked out by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_families import DECODERS, ROUTED_DECODERS, tiny
from torch import nn

from secateur.checkpoint.matrices import BlockMatrix, in_own_layout
from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.skeleton import build_skeleton
from secateur.errors import ModelError
from secateur.statistics import GradientAbs, GradientMean, GradientSquare, InputNorm, InputSecondMoment
from secateur.sweep import Sweep, SweepSettings, taps
from secateur.sweep.taps import GradientTaps

WINDOWS, TOKENS = 4, 5  # so few tokens that experts go without
KINDS = frozenset({GradientMean, GradientAbs, GradientSquare, InputNorm})


@pytest.fixture
def ids_NT() -> torch.Tensor:
    return torch.randint(96, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(5))


def gather(folder, ids_NT, scratch, micro_batch=1, memory=0, needs=KINDS):
    checkpoint = open_checkpoint(str(folder))
    found = {}

    def visit(index, block, statistics):
        assert list(statistics) == list(checkpoint.skeleton.prunable(index))
        found[index] = statistics

    sweep = Sweep(checkpoint, ids_NT, SweepSettings(micro_batch, memory, scratch))
    sweep.dense(needs, range(len(checkpoint.skeleton.blocks)), visit)
    return checkpoint.skeleton, found


def window_gradients(model, ids_NT):
    """For each window the gradient of every parameter, by plain backpropagation."""
    model.set_experts_implementation("eager")
    gradients = []
    for ids_T in ids_NT:
        model.zero_grad()
        logits_TV = model(input_ids=ids_T[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits_TV.float(), ids_T[1:]).backward()
        gradients.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        )
    return gradients


@pytest.mark.parametrize(("micro_batch", "memory"), [(1, 0), (3, 1 << 30)])
@pytest.mark.parametrize("family", DECODERS | ROUTED_DECODERS)
def test_gradients_equal_plain_backpropagation(family, micro_batch, memory, save, ids_NT, tmp_path):
    model = tiny(family)
    plain = window_gradients(model, ids_NT)
    skeleton, found = gather(save(model), ids_NT, tmp_path / "s", micro_batch, memory)
    for index, statistics in found.items():
        prefix = skeleton.block_prefix(index)
        blocks = [{n.removeprefix(prefix): g for n, g in window.items()} for window in plain]
        for name, matrix in skeleton.prunable(index).items():
            gradients = torch.stack([matrix.of(block) for block in blocks])
            expected = {
                GradientMean: gradients.mean(0),
                GradientAbs: gradients.abs().mean(0),
                GradientSquare: gradients.square().mean(0),
            }
            for kind, value in expected.items():
                statistic = statistics[name][kind]
                assert statistic.windows == WINDOWS
                scale = value.abs().max().clamp_min(1e-12)
                assert ((statistic.mean() - value).abs() <= 2e-5 * scale).all(), (prefix + name, kind)
            assert statistics[name][InputNorm].windows == WINDOWS


def inputs_of_modules(model, kind, ids_NT):
    """For each window what enters every module of ``kind``, by hooks."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: seen[-1].update({name: args[0].detach()[0]}))
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    with torch.no_grad():
        for ids_T in ids_NT:
            seen.append({})
            model(input_ids=ids_T[None])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_inputs_of_matrices_kept_transposed(micro_batch, save, ids_NT, tmp_path):
    from transformers.pytorch_utils import Conv1D

    model = tiny("gpt2")
    needs = frozenset({InputNorm, InputSecondMoment})
    skeleton, found = gather(save(model), ids_NT, tmp_path / "s", micro_batch, needs=needs)
    seen = inputs_of_modules(model, Conv1D, ids_NT)
    for index, statistics in found.items():
        assert len(statistics) == 4
        for name, kinds in statistics.items():
            module = skeleton.block_prefix(index) + name.removesuffix(".weight")
            x_NTI = torch.stack([window[module] for window in seen])
            norm_I = x_NTI.square().sum(1).mean(0).sqrt()
            assert torch.allclose(kinds[InputNorm].norm_I(), norm_I, rtol=1e-4, atol=1e-5)
            moment = torch.einsum("nti,ntj->ij", x_NTI, x_NTI) / WINDOWS
            assert torch.allclose(kinds[InputSecondMoment].mean(), moment, rtol=1e-4, atol=1e-4)


def test_an_expert_sees_its_own_tokens_only(save, ids_NT, tmp_path):
    """Routed by hand: an expert's norm is over the tokens that chose it, its mean over all windows."""
    model = tiny("mixtral")
    model.set_experts_implementation("eager")
    _, found = gather(save(model), ids_NT, tmp_path / "s", micro_batch=4, needs=frozenset({InputNorm}))
    calls = []
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda m, args, index=index: calls[-1].update({index: args}))
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for ids_T in ids_NT:
            calls.append({})
            model(input_ids=ids_T[None])
    for hook in hooks:
        hook.remove()
    idle = 0
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for expert in range(4):
            sums = {"gate_up_proj": torch.zeros(32), "down_proj": torch.zeros(48)}
            for call in calls:
                hidden_SI, chosen_SK, _ = call[index]
                x_TI = hidden_SI[(chosen_SK == expert).any(dim=1)].detach()
                idle += len(x_TI) == 0
                gate, up = (x_TI @ experts.gate_up_proj[expert].T).chunk(2, dim=1)
                sums["gate_up_proj"] += x_TI.square().sum(0)
                sums["down_proj"] += (experts.act_fn(gate) * up).detach().square().sum(0)
            for name, total_I in sums.items():
                statistic = found[index][f"mlp.experts.{name}[{expert}]"][InputNorm]
                assert statistic.windows == WINDOWS
                assert torch.allclose(statistic.mean(), total_I / WINDOWS, rtol=1e-4, atol=1e-6), (index, expert, name)
    assert idle, "the windows have to be short enough for an expert to go without"


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss", "deepseek_v3", "phimoe"])
def test_matrices_are_views_and_come_together_again(family, save):
    checkpoint = open_checkpoint(str(save(tiny(family))))
    matrices = checkpoint.skeleton.prunable(1)
    tensors = checkpoint.block_tensors(1)
    values = {name: matrix.of(tensors) for name, matrix in matrices.items()}
    assert all(
        value.shape == matrices[name].shape(checkpoint.skeleton.block_shapes(1)) for name, value in values.items()
    )
    for name, tensor in in_own_layout(matrices, values).items():
        assert torch.equal(tensor, tensors[name])
    for value in values.values():
        value.zero_()
    assert not any(tensors[matrix.parameter].any() for matrix in matrices.values())
    assert not [name for name in matrices if "router" in name or name.startswith("mlp.gate.")]


def test_a_matrix_that_is_fed_no_windows_is_refused():
    block = nn.Sequential(nn.Linear(4, 3))
    watching = GradientTaps({"0.weight": BlockMatrix("0.weight", "0.weight")}, windows=2)
    with pytest.raises(ModelError, match="mixes windows"), watching.watching(block):
        block(torch.zeros(5, 4, requires_grad=True))


def test_what_cannot_be_watched_is_refused(save, ids_NT, tmp_path, monkeypatch):
    monkeypatch.setattr(taps.Products, "_find", lambda self, weight: None)
    with pytest.raises(ModelError, match="cannot be watched"):
        gather(save(tiny("llama")), ids_NT, tmp_path / "s")


def test_a_huge_packed_parameter_costs_no_memory():
    """One layer's experts, 128 GiB as float32, on any machine; and complex rotary numbers are no choice."""
    from transformers import DeepseekV2Config

    fields = {"vocab_size": 96, "num_hidden_layers": 1, "hidden_size": 8192, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 4, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    experts = {
        "n_routed_experts": 256,
        "moe_intermediate_size": 8192,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
    }
    config = DeepseekV2Config(**fields, **heads, **experts)
    config.architectures = ["DeepseekV2ForCausalLM"]
    matrices = build_skeleton(config).prunable(0)
    assert matrices["mlp.experts.gate_up_proj[255]"].parameter == "mlp.experts.gate_up_proj"
    assert "self_attn.q_proj.weight" in matrices
    assert "mlp.gate.weight" not in matrices
