"""Gradients of the loss by forward runs and gradients of blocks' own outputs, written plainly, whole model in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F

from secateur.sweep import Queries
from secateur.sweep.noise import row_chunks


def whole_noise(queries: Queries, query: int, name: str, shape_OI: Any) -> torch.Tensor:
    """What a query draws for one matrix."""
    chunks = enumerate(row_chunks(tuple(shape_OI)))
    return torch.cat([queries.noise_RI(query, name, number, (len(rows), shape_OI[1])) for number, rows in chunks])


@torch.no_grad()
def plain_quotients(model: Any, names: Iterable[str], ids_NT: torch.Tensor, queries: Queries) -> torch.Tensor:
    """``c (Q, N)``: one query after the other, all matrices in ``names`` (kept as (O, I)) moved at once."""
    weights = {name: model.get_parameter(name) for name in names}
    before = {name: weight.clone() for name, weight in weights.items()}
    rows = []
    for query in range(queries.count):
        ways = []
        for step in (queries.perturbation, -queries.perturbation):
            for name, weight in weights.items():
                weight.copy_(before[name] + step * whole_noise(queries, query, name, weight.shape))
            ways.append(_window_losses(model, ids_NT))
        rows.append((ways[0] - ways[1]) / (2 * queries.perturbation))
    for name, weight in weights.items():
        weight.copy_(before[name])
    return torch.stack(rows)


def _window_losses(model: Any, ids_NT: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids_NT, use_cache=False).logits.double()
    return torch.stack([F.cross_entropy(logits[n, :-1], ids_NT[n, 1:]) for n in range(len(ids_NT))])


def own_output_gradients(model: Any, blocks: Any, ids_NT: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Gradients ``(N, ...)`` of ``||block(x)||_2`` by autograd, each window and each block alone, by (block, name)."""
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    model.requires_grad_(True)
    for ids_T in ids_NT:
        for index, (args, kwargs) in _calls(model, blocks, ids_T).items():
            out = blocks[index](*args, **kwargs)
            model.zero_grad(set_to_none=True)
            (out[0] if isinstance(out, tuple) else out).square().sum().sqrt().backward()
            for name, parameter in blocks[index].named_parameters():
                if parameter.grad is not None:
                    found.setdefault((index, name), []).append(parameter.grad.clone())
    model.zero_grad(set_to_none=True)
    return {key: torch.stack(gradients) for key, gradients in found.items()}


@torch.no_grad()
def _calls(model: Any, blocks: Any, ids_T: torch.Tensor) -> dict[int, Any]:
    """With what the model calls each block."""
    calls: dict[int, Any] = {}
    for index, block in enumerate(blocks):

        def remember(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            calls[index] = (args, kwargs)

        block.register_forward_pre_hook(remember, with_kwargs=True)
    model(input_ids=ids_T[None], use_cache=False)
    for block in blocks:
        block._forward_pre_hooks.clear()
        block._forward_pre_hooks_with_kwargs.clear()
    return calls
