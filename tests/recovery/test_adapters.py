"""Masked adapters: what is trained is what is merged."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.errors import SecateurError
from secateur.recovery.adapters import MaskedLoraLinear, _MaskedLinear, adapted, merged
from secateur.recovery.merging import replace_weights, rounded
from secateur.recovery.places import block_linears


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        vocab_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_bias=True,
    )
    return LlamaForCausalLM(config).eval()


def masked_half(model: nn.Module) -> dict[str, torch.Tensor]:
    masks = {f"{name}.weight": torch.rand(layer.weight.shape) < 0.5 for name, layer in block_linears(model).items()}
    for name, mask_OI in masks.items():
        model.get_parameter(name).data[~mask_OI] = 0.0
    return masks


def disturb(wrapped: nn.Module) -> None:
    """Give the adapters an effect: LoRA starts with B = 0."""
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)


def kept_in(dtype: torch.dtype, model: nn.Module) -> dict[str, torch.dtype]:
    return {f"{name}.weight": dtype for name in block_linears(model)}


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "masked"])
def test_the_merged_model_is_the_trained_function(sparse):
    model, ids_NT = tiny_llama(), torch.arange(40).view(2, 20)
    masks = masked_half(model) if sparse else {}
    before, dtypes = model(ids_NT).logits.detach(), kept_in(torch.float32, model)
    with adapted(model, block_linears(model), masks, rank=4, alpha=8, dropout=0.5) as wrapped:
        disturb(wrapped)
        assert sum(isinstance(layer, MaskedLoraLinear) for layer in wrapped.modules()) == len(masks)
        unmerged = wrapped.eval()(ids_NT).logits.detach()
        new = merged(wrapped)
    replace_weights(model, rounded(model, new, dtypes, masks))
    after = model(ids_NT).logits.detach()
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, unmerged, atol=0 if sparse else 1e-5, rtol=0)


def test_the_training_forward_masks_the_delta_and_drops_only_its_input():
    base = nn.Linear(6, 5)
    mask_OI = torch.rand(5, 6) < 0.5
    model = nn.ModuleList([nn.Sequential(base)])
    with adapted(model, {"0.0": base}, {"0.0.weight": mask_OI}, rank=2, alpha=6, dropout=0.5) as wrapped:
        disturb(wrapped)
        layer = next(layer for layer in wrapped.modules() if isinstance(layer, MaskedLoraLinear)).train()
        x_BTI = torch.randn(3, 4, 6)
        torch.manual_seed(9)
        result = layer(x_BTI)
        torch.manual_seed(9)
        dropped = F.dropout(x_BTI, 0.5)
        delta_OI = mask_OI * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * 3
        torch.testing.assert_close(result, base(x_BTI) + F.linear(dropped, delta_OI))
        with wrapped.disable_adapter():
            torch.testing.assert_close(layer(x_BTI), base(x_BTI), atol=0, rtol=0)


@pytest.mark.parametrize("folded", [False, True])
def test_the_gradients_are_exact(folded):
    def double(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    x_BTI, lora_A_RI, lora_B_OR = (tensor.requires_grad_() for tensor in (double(2, 3, 6), double(2, 6), double(5, 2)))
    weight_OI, bias_O = (double(5, 6), double(5)) if folded else (None, None)
    mask_OI = torch.rand(5, 6) < 0.5
    assert torch.autograd.gradcheck(
        lambda x, a, b: _MaskedLinear.apply(x, weight_OI, bias_O, a, b, mask_OI, 2.0), (x_BTI, lora_A_RI, lora_B_OR)
    )


def test_without_masks_the_merge_is_pefts_own():
    ours = tiny_llama()
    theirs = copy.deepcopy(ours)
    names = list(block_linears(ours))
    torch.manual_seed(1)
    with adapted(ours, block_linears(ours), {}, rank=4, alpha=8, dropout=0.0) as wrapped:
        disturb(wrapped)
        new = merged(wrapped)
    replace_weights(ours, rounded(ours, new, {f"{name}.weight": torch.float32 for name in names}, {}))
    torch.manual_seed(1)
    other = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    disturb(other)
    theirs = other.merge_and_unload()
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_a_merge_that_would_break_the_mask_or_overflow_changes_nothing(monkeypatch):
    model = tiny_llama()
    masks = masked_half(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapted(model, block_linears(model), masks, rank=4, alpha=8, dropout=0.0) as wrapped:
        disturb(wrapped)
        with monkeypatch.context() as patch:
            patch.setattr(MaskedLoraLinear, "get_delta_weight", lambda self, _: torch.ones_like(self.weight))
            with pytest.raises(SecateurError, match="revive pruned weights"):
                rounded(model, merged(wrapped), dict.fromkeys(masks, torch.float32), masks)
        wrapped.get_parameter("base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight").data[:] = 1e6
        new = merged(wrapped)
    with pytest.raises(SecateurError, match="overflow"):
        rounded(model, new, dict.fromkeys(masks, torch.float16), masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
