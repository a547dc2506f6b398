"""Helpers for the proofs: tiny random models, their units, and a cut model beside a masked one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from secateur.structure import (
    ModelCut,
    Structure,
    UnitGroup,
    cut_tensors,
    find_all_units,
    mask_tensors,
    masked_out,
)

VOCABULARY = 61
Removals = list[tuple[UnitGroup, list[int]]]


def blocks_name(model: nn.Module) -> str:
    """The decoder blocks: the longest, outermost list of modules."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=lambda entry: (len(entry[1]), -entry[0].count(".")))[0]


def weightless(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def find(config: PreTrainedConfig) -> Structure:
    model = weightless(config)
    return inside_blocks(find_all_units(model, blocks_name(model)))


def inside_blocks(structure: Structure) -> Structure:
    """Only the units that live in one block."""
    units = [group for group in structure.units if group.kind not in ("hidden", "block")]
    return Structure(units, [refusal for refusal in structure.refused if refusal.kind != "hidden"])


def random_model(config: PreTrainedConfig) -> nn.Module:
    """A model whose every parameter matters: no zero biases, no norm weights of one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.12 if parameter.dim() > 1 else 0.3))
            if parameter.dim() == 1:
                parameter.add_(0.7)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """Logits of shape (2, 9, vocabulary)."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def changed(
    dense: nn.Module, removals_per_block: Sequence[Removals], change: Callable[..., dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The state dict with every block's tensors passed through ``cut_tensors`` or ``mask_tensors``."""
    name = blocks_name(dense)
    state = dict(dense.state_dict())
    for index, removals in enumerate(removals_per_block):
        prefix = f"{name}.{index}."
        block = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        state.update({prefix + key: value for key, value in change(block, removals).items()})
    return state


def assert_cut_equals_masked(
    dense: nn.Module, build: Callable[[dict[str, torch.Tensor]], nn.Module], removals: Sequence[Removals]
) -> None:
    """Compare the model that ``build`` makes from the cut tensors with the dense one, masked."""
    cut = build(changed(dense, removals, cut_tensors)).eval()
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in dense.parameters())
    masked = copy.deepcopy(dense)
    masked.load_state_dict(changed(dense, removals, mask_tensors))
    with masked_out(masked, blocks_name(masked), ModelCut(tuple(removals))):
        expected = logits(masked)
    assert (expected - logits(dense)).abs().max() > 1e-3, "the units matter, or the proof proves nothing"
    torch.testing.assert_close(logits(cut), expected, atol=5e-6 * float(expected.abs().max()), rtol=0)


def from_config(config: PreTrainedConfig) -> Callable[[dict[str, torch.Tensor]], nn.Module]:
    def build(state: dict[str, torch.Tensor]) -> nn.Module:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        model.load_state_dict(state)
        return model

    return build


def in_place(dense: nn.Module, **attributes: int) -> Callable[[dict[str, torch.Tensor]], nn.Module]:
    """For families whose config cannot say the size: put the tensors into a copy, and set ``attributes``."""

    def build(state: dict[str, torch.Tensor]) -> nn.Module:
        model = copy.deepcopy(dense)
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            if parameter.shape != state[name].shape:
                setattr(model.get_submodule(owner), leaf, nn.Parameter(state[name]))
        for module in model.modules():
            if isinstance(module, Conv1D):
                module.nf = module.weight.shape[1]
            for key, value in attributes.items():
                if key in vars(module):
                    setattr(module, key, value)
        return model

    return build
