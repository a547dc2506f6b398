"""Block-local gradients: of the norm of each block's own output, found in the forward walk (Wanda++, methods §12).

What a block gives is taken for what matters about it. That needs neither the head nor a walk backwards, and memory for
one block; and since a block is judged by its own inputs alone, it works on inputs that pruned blocks give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from secateur.checkpoint.matrices import BlockMatrices
from secateur.statistics import GradientStatistic
from secateur.sweep.taps import run_with_graph


def run_with_own_gradients(
    block: nn.Module,
    run: Callable[[torch.Tensor], torch.Tensor],
    x_BTD: torch.Tensor,
    matrices: BlockMatrices,
    statistics: Mapping[str, Iterable[GradientStatistic]],
) -> torch.Tensor:
    """Run ``block`` on a micro-batch and fold the gradients of each window's ``||block(x_TD)||_2`` into ``statistics``.

    Args:
        run: from hidden states to what the block gives for them, ``(B, T, D)`` both; the block's residual is part of it.

    Returns:
        what the block gives, without a graph.
    """
    kept = run_with_graph(block, run, x_BTD, matrices)
    out_BTD = kept.out_BTD.detach()
    kept.out_BTD.backward(gradient_of_norm(out_BTD))
    kept.taps.fold(statistics)
    return out_BTD


def gradient_of_norm(out_BTD: torch.Tensor) -> torch.Tensor:
    """The gradient of each window's ``||out_TD||_2`` with respect to it: the window over its norm, zero where it is zero."""
    norm_B11 = out_BTD.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm_B11 > 0, out_BTD / norm_B11, torch.zeros_like(out_BTD))
