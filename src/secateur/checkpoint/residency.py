"""Bringing weights into the skeleton and letting them go: at most what a ``with`` block names is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from secateur.checkpoint.reader import Checkpoint

COMPUTE_DTYPE = torch.float32
"""What weights are computed in: one block is small, and float32 sums are what the formulas mean."""

OuterChange = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


@contextmanager
def resident_block(checkpoint: Checkpoint, index: int) -> Iterator[nn.Module]:
    """Block ``index`` with its weights in memory (float32) while the context lasts."""
    block = checkpoint.skeleton.blocks[index]
    block.load_state_dict(_computable(checkpoint.block_tensors(index)), assign=True)
    block.requires_grad_(False)
    try:
        yield block
    finally:
        _release(block)


@contextmanager
def resident_outer(checkpoint: Checkpoint, change: OuterChange | None = None) -> Iterator[nn.Module]:
    """Everything outside the blocks (embeddings, final norm, head) in memory while the context lasts.

    ``change`` gets these tensors by name and returns what takes the place of those it names.
    """
    model = checkpoint.skeleton.model
    tensors = _computable(checkpoint.read(checkpoint.outer_names()))
    if change is not None:
        tensors |= change(tensors)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    try:
        yield model
    finally:
        _release(model)


def _computable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Numbers in the dtype of computing; indices and flags that a model stores beside its weights stay as they are."""
    return {n: tensor.to(COMPUTE_DTYPE) if tensor.is_floating_point() else tensor for n, tensor in tensors.items()}


def _release(module: nn.Module) -> None:
    """Send parameters back to meta; buffers, which are computed and not stored, stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not parameter.is_meta:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
