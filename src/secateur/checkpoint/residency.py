"""Bringing weights into the skeleton and letting them go: at most what a ``with`` block names is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.checkpoint.reader import Checkpoint

COMPUTE_DTYPE = torch.float32
"""What weights are computed in: one block is small, and float32 sums are what the formulas mean."""


@contextmanager
def resident_block(checkpoint: Checkpoint, index: int) -> Iterator[nn.Module]:
    """Block ``index`` with its weights in memory (float32) while the context lasts."""
    block = checkpoint.skeleton.blocks[index]
    tensors = {name: tensor.to(COMPUTE_DTYPE) for name, tensor in checkpoint.block_tensors(index).items()}
    block.load_state_dict(tensors, assign=True)
    block.requires_grad_(False)
    try:
        yield block
    finally:
        _release(block)


@contextmanager
def resident_outer(checkpoint: Checkpoint) -> Iterator[nn.Module]:
    """Everything outside the blocks (embeddings, final norm, head) in memory while the context lasts."""
    model = checkpoint.skeleton.model
    tensors = checkpoint.read(checkpoint.outer_names())
    model.load_state_dict(
        {name: tensor.to(COMPUTE_DTYPE) for name, tensor in tensors.items()}, strict=False, assign=True
    )
    model.tie_weights()
    model.requires_grad_(False)
    try:
        yield model
    finally:
        _release(model)


def _release(module: nn.Module) -> None:
    """Send parameters back to meta; buffers, which are computed and not stored, stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not parameter.is_meta:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
