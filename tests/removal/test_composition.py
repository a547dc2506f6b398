"""Cuts one after the other equal their composition, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from secateur.removal.composition import compose
from secateur.removal.decision import model_cut
from secateur.structure import OUTSIDE, cut_tensors, find_all_units

KINDS = ("block", "hidden", "head", "query", "channel")


def random_removals(structure, generator, kinds):
    """For some groups some units, the same number from every family; hidden units alike everywhere."""
    everywhere: dict[int, list] = {}
    for kind in kinds:
        groups = [group for group in structure.units if group.kind == kind]
        alike = None
        for group in groups:
            size = group.count // group.families
            gone = int(torch.randint(0, min(3, size), (1,), generator=generator))
            units = [
                family * size + int(unit)
                for family in range(group.families)
                for unit in torch.randperm(size, generator=generator)[:gone]
            ]
            if kind == "hidden":
                alike = sorted(units) if alike is None else alike
                units = alike
            everywhere.setdefault(group.block, []).append((group, sorted(units)))
    return everywhere


def cut_by_hand(tensors, everywhere, blocks):
    """All tensors of a Llama after a cut, by their new names."""
    cut = model_cut(everywhere, blocks)
    outside = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    result = cut_tensors(outside, cut.outside)
    for new, old in enumerate(cut.kept()):
        prefix = f"model.layers.{old}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        result |= {f"model.layers.{new}.{n}": t for n, t in cut_tensors(own, cut.blocks[old]).items()}
    return result


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kinds", [KINDS, ("head", "query"), ("block", "channel"), ("hidden",)])
def test_three_cuts_in_a_row_equal_their_composition(kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(num_hidden_layers=6, num_attention_heads=24, num_key_value_heads=6, hidden_size=24, head_dim=4)
    model = tiny_llama(**sizes, intermediate_size=40)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure = find_all_units(model, "model.layers")
    chosen, tensors, current, blocks = {}, dense, structure, 6
    for _ in range(3):
        found = random_removals(current, generator, kinds)
        found = _alike_everywhere(found)
        tensors = cut_by_hand(tensors, found, blocks)
        chosen = compose(structure, chosen, found)
        blocks = len(model_cut(chosen, 6).kept())
        if blocks < 2:
            break
        current = _traced(tensors, blocks)
    together = cut_by_hand(dense, chosen, 6)
    assert tensors.keys() == together.keys()
    assert all(torch.equal(tensor, together[name]) for name, tensor in tensors.items())


def _alike_everywhere(found):
    """The same number from every block, so that a plain Llama has the sizes; block 0's choice."""
    first = {group.kind: units for group, units in found.get(0, [])}
    return {
        block: [
            (group, first[group.kind] if block != OUTSIDE and group.kind in first else units) for group, units in all_
        ]
        for block, all_ in found.items()
    }


def _traced(tensors, blocks):
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    q, k = shape["model.layers.0.self_attn.q_proj.weight"], shape["model.layers.0.self_attn.k_proj.weight"]
    config = MistralConfig(
        vocab_size=128, hidden_size=q[1], head_dim=4, num_attention_heads=q[0] // 4, num_key_value_heads=k[0] // 4,
        intermediate_size=shape["model.layers.0.mlp.up_proj.weight"][0], num_hidden_layers=blocks,
    )  # fmt: skip
    return find_all_units(MistralForCausalLM(config), "model.layers")
