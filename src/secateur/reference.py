"""The two sides of a proof, on a model in memory: the dense one with units masked out, and the tensors that a cut leaves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.checkpoint.architecture import call_model
from secateur.checkpoint.skeleton import Skeleton
from secateur.structure import ModelCut, cut_tensors, mask_tensors, masked_out


def logits(skeleton: Skeleton, inputs: Mapping[str, Tensor]) -> Tensor:
    """The model's logits in evaluation mode."""
    with torch.no_grad():
        return call_model(skeleton.model, inputs).logits


def masked_logits(skeleton: Skeleton, cut: ModelCut, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits of the dense model with everything that ``cut`` takes masked out; its weights are left as they were."""
    model = skeleton.model
    before = dict(model.state_dict())
    masked = dict(before)
    for index, removals in enumerate(cut.blocks):
        prefix = skeleton.block_prefix(index)
        own = {name.removeprefix(prefix): tensor for name, tensor in before.items() if name.startswith(prefix)}
        masked |= {prefix + name: tensor for name, tensor in mask_tensors(own, removals).items()}
    outer = {name: tensor for name, tensor in before.items() if not name.startswith(skeleton.blocks_name + ".")}
    masked |= mask_tensors(outer, cut.outside)
    changed = {name: tensor for name, tensor in masked.items() if tensor is not before[name]}
    try:
        model.load_state_dict(changed, strict=False, assign=True)
        model.tie_weights()
        with masked_out(model, skeleton.blocks_name, cut):
            return logits(skeleton, inputs)
    finally:
        model.load_state_dict(before, assign=True)
        model.tie_weights()
        model.requires_grad_(False)


def cut_state(skeleton: Skeleton, cut: ModelCut) -> dict[str, Tensor]:
    """The tensors that stay, by their new names."""
    state = skeleton.model.state_dict()
    outer = {name: tensor for name, tensor in state.items() if not name.startswith(skeleton.blocks_name + ".")}
    result = dict(cut_tensors(outer, cut.outside))
    for number, index in enumerate(cut.kept()):
        prefix = skeleton.block_prefix(index)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        new = skeleton.block_prefix(number)
        result |= {new + name: tensor for name, tensor in cut_tensors(own, cut.blocks[index]).items()}
    return result
