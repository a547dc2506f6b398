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

HIDDEN = (USE_FSDP, "ACCELERATE_MIXED_PRECISION")
HIDDEN_PREFIX = "ACCELERATE_DYNAMO_"


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
            blocks[index].register_forward_pre_hook(_fill_gradients, with_kwargs=True)
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


class _Fill(torch.autograd.Function):
    """Nothing on the way forward. On the way back, when the block is through, zeros for what has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        for parameter in ctx.block.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return gradients[0], None


def _fill_gradients(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Of parts that only some windows reach (experts that are modules), some workers would have gradients and some not.

    torch adds up what each worker has, one after the other: gradients of different parameters.
    """
    if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in block.parameters()):
        return None
    place = next((i for i, given in enumerate(arguments) if _is_states(given)), None)
    if place is None:
        name = next(name for name, given in named.items() if _is_states(given))
        return arguments, named | {name: _filling(named[name], block)}
    return (*arguments[:place], _filling(arguments[place], block), *arguments[place + 1 :]), named


def _is_states(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point()


def _filling(x: Tensor, block: nn.Module) -> Tensor:
    # Embeddings are not trained, so what enters the first block has no gradient of its own.
    filled: Tensor = _Fill.apply(x if x.requires_grad else x.detach().requires_grad_(), block)
    return filled


@torch.no_grad()
def average_copies(parameters: Iterable[nn.Parameter], workers: Workers) -> None:
    """Average gradients of what every worker has whole; torch does so for what is shared out.

    A worker whose windows did not reach a parameter counts as zero; where no worker's did, there is no gradient.
    """
    copies = [parameter for parameter in parameters if not is_shared(parameter)]
    reached = torch.tensor([float(parameter.grad is not None) for parameter in copies])
    workers.add_up([reached])
    for parameter, count in zip(copies, reached.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in copies if parameter.grad is not None]
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
    """Keep accelerate and transformers from doing in their own way what is decided here.

    They would load weights in the first process alone, wrap what is trained once more, compute in other numbers than the run
    is known by, or compile what was put into the model for a while.
    """
    asked = {name: value for name, value in os.environ.items() if name in HIDDEN or name.startswith(HIDDEN_PREFIX)}
    for name in asked:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(asked)
