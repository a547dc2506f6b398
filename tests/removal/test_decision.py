"""Carrying out a decision: in place or on copies the same numbers, and what is not the caller's to lose stays."""

from __future__ import annotations

import pytest
import torch
from tiny_families import tiny
from tiny_models import tiny_llama

from secateur.checkpoint.skeleton import Skeleton
from secateur.removal.decision import BlockDecision
from secateur.structure import find_all_units, mask_tensors

MODELS = {
    "llama": lambda: tiny_llama(),
    "kept transposed": lambda: tiny("gpt2"),
    "packed experts": lambda: tiny("mixtral"),
}


@pytest.fixture(params=MODELS)
def block(request):
    """A skeleton with weights, its block 1's tensors, and its units of a kind that leaves some of each matrix."""
    skeleton = Skeleton(MODELS[request.param]())
    kind = "expert" if request.param == "packed experts" else "channel"
    group = next(g for g in find_all_units(skeleton.model, skeleton.blocks_name).of_block(1) if g.kind == kind)
    tensors = {name: tensor.clone() for name, tensor in skeleton.blocks[1].state_dict().items()}
    return skeleton, tensors, group


def decision_for(block, removed):
    skeleton, tensors, group = block
    decision = BlockDecision([(group, removed)] if removed else [], {}, skeleton.prunable(1))
    generator = torch.Generator().manual_seed(1)
    for name in decision.matrices:
        rows, columns = decision.survivors(name, tensors)
        if len(rows):
            decision.masks[name] = torch.rand(len(rows), len(columns), generator=generator) < 0.5
    return decision


@pytest.mark.parametrize("removed", [[], [1]])
@pytest.mark.parametrize("way", ["carry_out", "in_dense_shapes"])
def test_in_place_is_the_same_and_otherwise_nothing_is_touched(way, removed, block):
    _, tensors, _ = block
    decision, before = decision_for(block, removed), {name: tensor.clone() for name, tensor in tensors.items()}
    apart = getattr(decision, way)(tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    own = getattr(decision, way)(tensors, in_place=True)
    assert list(own) == list(apart)
    assert all(torch.equal(own[name], tensor) for name, tensor in apart.items())
    if not removed:
        assert all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items()), "nothing is copied"


@pytest.mark.parametrize("removed", [[], [1]])
def test_dense_shapes_are_zeroed_where_the_mask_of_the_survivors_says(removed, block):
    _, tensors, _ = block
    decision = decision_for(block, removed)
    found, expected = decision.in_dense_shapes(tensors), mask_tensors(tensors, decision.removals)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    for name, mask in decision.masks.items():
        weight_OI, (rows, columns) = decision.matrices[name].of(expected), decision.survivors(name, tensors)
        for at, row in enumerate(rows):
            weight_OI[row, columns[~mask[at]]] = 0
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
