"""What training lets go down, and how it is measured on windows kept out.

Shape legend: ``N`` windows, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import ModelError


def next_token_loss(model: Any, ids_NT: Tensor) -> Tensor:
    """Mean next-token cross-entropy of a batch of windows; scalar. The same for every family, whatever its own loss."""
    return cross_entropy(model(input_ids=ids_NT, use_cache=False).logits, ids_NT)


def cross_entropy(logits_NTV: Tensor, ids_NT: Tensor) -> Tensor:
    """Mean next-token cross-entropy, in float32; scalar, in nats."""
    # The last position has no next token. Ignoring it, not slicing it off, spares a copy of the logits.
    next_NT = F.pad(ids_NT[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits_NTV.flatten(0, 1).float(), next_NT.flatten(), ignore_index=-100)


@torch.no_grad()
def mean_loss(loss_of: Callable[[Tensor], Tensor], module: nn.Module, ids_NT: Tensor, micro_batch: int) -> float:
    """The mean of ``loss_of(ids)`` over all windows, with ``module`` in evaluation mode."""
    training, device = module.training, next(module.parameters()).device
    module.eval()
    parts = ids_NT.split(micro_batch)
    loss = sum(loss_of(part_NT.to(device)).item() * len(part_NT) for part_NT in parts) / len(ids_NT)
    module.train(training)
    return loss


def held_out_loss(model: Any, ids_NT: Tensor, micro_batch: int, advice: str) -> float | None:
    """Mean next-token cross-entropy over all windows, in evaluation mode; None without windows.

    Raises:
        ModelError: it is not finite; ``advice`` ends the sentence.
    """
    if not len(ids_NT):
        return None
    loss = mean_loss(lambda part_NT: next_token_loss(model, part_NT), model, ids_NT, micro_batch)
    if not math.isfinite(loss):
        raise ModelError(f"the model's loss on held-out windows is {loss} {advice}")
    return loss
