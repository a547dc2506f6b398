"""Cutting and masking: what is sliced, what is zeroed, and what is refused."""

from __future__ import annotations

import pytest
import torch
from proving import find, random_model
from transformers import LlamaConfig

from secateur.errors import StructureError
from secateur.structure import Structure, UnitGroup, cut_shapes, cut_tensors, kept_indices, mask_tensors

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=10, num_hidden_layers=1,
    num_attention_heads=8, num_key_value_heads=4, head_dim=4, attention_bias=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def structure() -> Structure:
    return find(CONFIG)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    block = random_model(CONFIG).model.layers[0]
    return {name: tensor.to(torch.bfloat16) for name, tensor in block.state_dict().items()}


def group_of(structure: Structure, kind: str) -> UnitGroup:
    return next(group for group in structure.units if group.kind == kind)


def test_removals_combine_per_parameter(structure: Structure, tensors: dict[str, torch.Tensor]) -> None:
    # KV group 2 leaves with its query heads 4 and 5; query heads 1, 2 and 7 leave groups 0, 1 and 3.
    removals = [(group_of(structure, "head"), [2]), (group_of(structure, "query"), [1, 2, 7])]
    kept = kept_indices(removals, {name: tensor.shape for name, tensor in tensors.items()})
    heads = [0, 3, 6]
    expected = [head * 4 + d for head in heads for d in range(4)]
    assert kept["self_attn.q_proj.weight", 0].tolist() == expected
    assert kept["self_attn.q_proj.bias", 0].tolist() == expected
    assert kept["self_attn.o_proj.weight", 1].tolist() == expected
    assert kept["self_attn.k_proj.weight", 0].tolist() == [*range(8), *range(12, 16)]
    assert not any(name.startswith("mlp") for name, _ in kept)


def test_cut_slices_keeps_dtype_and_leaves_the_rest(structure: Structure, tensors: dict[str, torch.Tensor]) -> None:
    removals = [(group_of(structure, "channel"), [0, 9, 4]), (group_of(structure, "head"), [1])]
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    cut = cut_tensors(tensors, removals)
    stay = [1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(cut["mlp.gate_proj.weight"], before["mlp.gate_proj.weight"][stay])
    assert torch.equal(cut["mlp.down_proj.weight"], before["mlp.down_proj.weight"][:, stay])
    assert all(tensor.is_contiguous() and tensor.dtype == torch.bfloat16 for tensor in cut.values())
    assert cut["input_layernorm.weight"] is tensors["input_layernorm.weight"]
    assert all(torch.equal(before[name], tensors[name]) for name in before), "the input is not touched"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert cut_shapes(shapes, removals) == {name: tuple(tensor.shape) for name, tensor in cut.items()}


def test_mask_zeroes_consumers_only(structure: Structure, tensors: dict[str, torch.Tensor]) -> None:
    masked = mask_tensors(tensors, [(group_of(structure, "query"), [0, 3, 4, 6])])
    gone = [head * 4 + d for head in (0, 3, 4, 6) for d in range(4)]
    changed = [name for name in tensors if not torch.equal(masked[name], tensors[name])]
    assert changed == ["self_attn.o_proj.weight"]
    assert torch.equal(masked[changed[0]].eq(0).all(0).nonzero().flatten(), torch.tensor(gone))


def test_nothing_removed_changes_nothing(structure: Structure, tensors: dict[str, torch.Tensor]) -> None:
    removals = [(group, []) for group in structure.units]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in cut_tensors(tensors, removals).items())


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ({"head": [4]}, "there is no unit 4"),
        ({"head": [-1]}, "there is no unit -1"),
        ({"head": [0, 1, 2, 3]}, "keep at least one"),
        ({"channel": range(10)}, "keep at least one"),
        ({"query": [0]}, "same number from each"),
        ({"query": [0, 1]}, "same number from each"),
        ({"head": [0], "query": [0, 2, 4]}, "same number from each"),
        ({"query": range(8)}, "keep at least one"),
    ],
)
@pytest.mark.parametrize("change", [cut_tensors, mask_tensors])
def test_impossible_removals_are_refused(
    structure: Structure, tensors: dict[str, torch.Tensor], removed: dict, words: str, change: object
) -> None:
    removals = [(group_of(structure, kind), list(units)) for kind, units in removed.items()]
    with pytest.raises(StructureError, match=words):
        change(tensors, removals)


def test_a_missing_tensor_is_named(structure: Structure, tensors: dict[str, torch.Tensor]) -> None:
    partial = {name: tensor for name, tensor in tensors.items() if "down_proj" not in name}
    for change in (cut_tensors, mask_tensors):
        with pytest.raises(StructureError, match=r"no tensor mlp\.down_proj\.weight"):
            change(partial, [(group_of(structure, "channel"), [0])])
