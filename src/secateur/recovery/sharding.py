"""Weights shared out among workers: each keeps a part of every block, and has a block whole only while it computes.

torch's ``fully_shard`` (FSDP2) does it, on blocks that stand in for the model's own for as long as it lasts. This is the one
file that knows of the tensors it makes: everywhere else a tensor is a part (``local``) or all of it (``whole``).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from secateur.recovery.places import blocks_of
from secateur.workers import USE_FSDP, Workers


def is_shared(tensor: Tensor) -> bool:
    """Whether this worker has a part of ``tensor`` only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This worker's part of ``tensor``, without gradient and in the same memory; all of it where it is not shared out."""
    data = tensor.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, without gradient; where it is shared out, every worker has to ask at once."""
    data = tensor.detach()
    return data.full_tensor() if isinstance(data, DTensor) else data


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor``, which every worker has whole, shared out as ``other`` is."""
    if not isinstance(other, DTensor):
        return tensor
    # Each worker cuts its own part, in memory of its own: a view would keep the whole alive.
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None).clone()


def as_part_of(part: Tensor, other: Tensor) -> Tensor:
    """This worker's ``part`` as a tensor that is shared out as ``other`` is."""
    if not isinstance(other, DTensor) or part.shape != local(other).shape:
        return part
    return DTensor.from_local(
        part, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


@contextmanager
def shared_out(model: Any, workers: Workers, device: torch.device, products: torch.dtype | None) -> Iterator[None]:
    """Put blocks whose parameters are shared out in the place of ``model``'s own, which are not touched, and take them out again.

    One block after another goes to ``device`` as float32 and leaves a part of it there. What a block shares with another
    part of the model, and numbers without a dimension, stay as they are.

    Args:
        products: the dtype in which blocks are gathered to compute; None for float32. Parts and sums of gradients are float32.
    """
    blocks = blocks_of(model)
    originals, left = list(blocks), _not_divided(model, blocks)
    mesh = init_device_mesh(device.type, (workers.size,))
    policy = MixedPrecisionPolicy(products, torch.float32, cast_forward_inputs=False)
    try:
        for index, block in enumerate(originals):
            blocks[index] = _stand_in(block, left, device)
            fully_shard(blocks[index], mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=left)
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


def lead(student: nn.Module) -> None:
    """Make ``student`` the root of its blocks, so that they share buffers and what one has gathered is let go in time."""
    mesh = next(parameter.device_mesh for parameter in student.parameters() if isinstance(parameter, DTensor))
    fully_shard(student, mesh=mesh, ignored_params={p for p in student.parameters() if not is_shared(p)})


def _not_divided(model: nn.Module, blocks: nn.ModuleList) -> set[nn.Parameter]:
    inside = set(blocks.modules())
    seen = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
    left = set()
    for block in blocks:
        own = set(block.parameters())
        left |= {p for p in own if p in seen or not p.dim() or not p.is_floating_point()}
        seen |= own
    return left


def _stand_in(block: nn.Module, left: set[nn.Parameter], device: torch.device) -> nn.Module:
    """Modules like those of ``block``, with its names, with copies of its parameters on ``device`` and with all else it has."""
    modules = {module: copy.copy(module) for module in block.modules()}
    parameters = {
        parameter: nn.Parameter(parameter.detach().to(device, torch.float32), parameter.requires_grad)
        for parameter in block.parameters()
        if parameter not in left
    }
    for module, own in modules.items():
        for name, value in vars(module).items():
            if isinstance(value, dict | set):  # hooks among them
                vars(own)[name] = copy.copy(value)
        own._modules = {name: modules.get(child, child) for name, child in module._modules.items()}  # type: ignore[arg-type]
        own._parameters = {name: parameters.get(p, p) for name, p in module._parameters.items()}  # type: ignore[arg-type]
    return modules[block]


@torch.no_grad()
def average_copies(parameters: Iterable[nn.Parameter], workers: Workers) -> None:
    """Average gradients of what every worker has whole; torch does so for what is shared out."""
    gradients = [p.grad for p in parameters if p.grad is not None and not is_shared(p.grad)]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    workers.add_up([flat])
    parts = flat.div_(workers.size).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], most: float, workers: Workers) -> Tensor:
    """Scale gradients so that their norm, over all parts at all workers, is at most ``most``; returns what it was."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [local(gradient) for gradient in gradients if is_shared(gradient)]
    copies = [gradient for gradient in gradients if not is_shared(gradient)]
    norm = torch.nn.utils.get_total_norm(copies)
    if parts:
        square = torch.nn.utils.get_total_norm(parts).square()
        workers.add_up([square])
        norm = torch.hypot(norm.to(square.device), square.sqrt())
    torch._foreach_mul_([*parts, *copies], (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Keep accelerate and transformers from sharing out in their own way what is shared out here.

    They would load weights in the first process alone, and wrap what is trained once more.
    """
    asked = os.environ.pop(USE_FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[USE_FSDP] = asked
