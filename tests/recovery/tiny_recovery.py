"""What tests of recovery share: small models, text that can be learnt, masks, and looks at bits."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.recovery.places import block_linears


def tiny_llama(dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "initializer_range": 0.1,
    }
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True} | changes
    return LlamaForCausalLM(LlamaConfig(**options)).to(dtype).eval()


def learnable_windows(count: int = 40, length: int = 16) -> torch.Tensor:
    """Each token is the one before plus three: a pattern that a little training finds."""
    start_N1 = torch.randint(0, 128, (count, 1), generator=torch.Generator().manual_seed(1))
    return (start_N1 + 3 * torch.arange(length)) % 128


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def mask_half(model: nn.Module) -> dict[str, torch.Tensor]:
    """Zero a random half of every block matrix and give the masks."""
    generator, masks = torch.Generator().manual_seed(2), {}
    for name, linear in block_linears(model).items():
        masks[f"{name}.weight"] = torch.rand(linear.weight.shape, generator=generator) < 0.5
        linear.weight.data[~masks[f"{name}.weight"]] = 0.0
    return masks


def mask_two_of_four(model: nn.Module) -> dict[str, torch.Tensor]:
    """Keep the two largest of every four consecutive inputs of every block matrix and give the masks."""
    masks = {}
    for name, linear in block_linears(model).items():
        runs = linear.weight.data.abs().unflatten(1, (-1, 4))
        mask_OI = torch.zeros_like(runs, dtype=torch.bool).scatter_(2, runs.topk(2, dim=2).indices, True).flatten(1)
        linear.weight.data *= mask_OI
        masks[f"{name}.weight"] = mask_OI
    return masks
