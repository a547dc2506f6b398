"""How far what a block gives is from what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from secateur.reconstruction.fitted import FittedBlock
from secateur.sweep import Passage

Error = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def relative_error(out_BTD: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of ``||out - target||^2 / ||target||^2``, float32."""
    target_BTD = target_BTD.float()
    error_BT = (out_BTD.float() - target_BTD).square().sum(dim=-1)
    size_BT = target_BTD.square().sum(dim=-1)
    return (error_BT / size_BT.clamp(min=torch.finfo(torch.float32).tiny)).mean()


def squared_error(out_BTD: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
    """The mean squared difference, float32."""
    return (out_BTD.float() - target_BTD.float()).square().mean()


@torch.no_grad()
def mean_error(fitted: FittedBlock, passage: Passage, batches: Sequence[int], error: Error) -> float:
    """The mean over the windows of these micro-batches."""
    total = 0.0
    with fitted.running():
        for batch, x_BTD, target_BTD in passage.pairs(batches):
            total += float(error(passage.run(batch, x_BTD), target_BTD)) * len(x_BTD)
    return total / sum(passage.windows[batch] for batch in batches)
