"""Bringing weights into the skeleton and letting them go: at most what a ``with`` block names is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from secateur.checkpoint.outside import OnDisk, large_tables
from secateur.checkpoint.placement import HERE, Placement, give_back_memory
from secateur.checkpoint.reader import Checkpoint

OuterChange = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


@contextmanager
def resident_block(
    checkpoint: Checkpoint, index: int, placement: Placement = HERE, ahead: int | None = None
) -> Iterator[nn.Module]:
    """Block ``index`` with its weights in memory while the context lasts.

    Args:
        placement: where it computes, and in which numbers.
        ahead: the block that will be wanted next, if there is one; it is read meanwhile.
    """
    block = checkpoint.skeleton.blocks[index]
    stored = checkpoint.block_tensors(index)
    numbers = {name: placement.numbers(stored.pop(name)) for name in list(stored)}  # each mapped tensor goes at once
    block.load_state_dict(numbers, assign=True)
    del numbers
    block.requires_grad_(False)
    if ahead is not None and 0 <= ahead < len(checkpoint.skeleton.blocks):
        checkpoint.read_ahead(ahead)
    try:
        yield block
    finally:
        release(block)
        give_back_memory()


@contextmanager
def resident_outer(
    checkpoint: Checkpoint, change: OuterChange | None = None, placement: Placement = HERE
) -> Iterator[nn.Module]:
    """Everything outside the blocks (embeddings, final norm, head) at hand while the context lasts.

    Large tables are not brought in: rows of embeddings are read as tokens ask for them, and a head multiplies in
    pieces, each read when its turn comes.

    Args:
        change: gets these tensors by name and returns what takes the place of those it names; then all are brought in.
    """
    model = checkpoint.skeleton.model
    tables = large_tables(checkpoint) if change is None else {}
    tensors = {
        name: placement.numbers(tensor)
        for name, tensor in checkpoint.read(name for name in checkpoint.outer_names() if name not in tables).items()
    }
    if change is not None:
        tensors |= change(tensors)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.requires_grad_(False)
    try:
        with OnDisk(checkpoint, tables, placement):
            yield model
    finally:
        release(model)
        give_back_memory()


@contextmanager
def buffers_on(model: nn.Module, placement: Placement) -> Iterator[None]:
    """What the model computes itself and keeps (rotary frequencies) on the device while the context lasts."""
    if not placement.is_gpu:
        yield
        return
    before = {(module, name): value for module in model.modules() for name, value in module._buffers.items()}
    for (module, name), value in before.items():
        if value is not None and not value.is_meta:
            module._buffers[name] = value.to(placement.device)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            module._buffers[name] = value


def release(module: nn.Module) -> None:
    """Send parameters back to meta; buffers, which are computed and not stored, stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not parameter.is_meta:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
