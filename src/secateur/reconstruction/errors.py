"""How far what a block gives is from what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from secateur.reconstruction.fitted import FittedBlock
from secateur.sweep import Passage

Error = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


SMALLEST_SHARE = 0.05
"""Of the even share ``1 / D``: channels below it count as if they had this much, so that nearly silent ones do not rule."""


class ByChannel:
    """The mean over tokens of ``||out - target||^2 / ||target||^2``, a channel's part of it over its mean share of a token's size.

    A few channels of a residual stream may hold most of its size in every token, whatever the token; an error that counts
    all channels alike is theirs alone.

    Args:
        targets: ``(B, T, D)`` each, of which the shares are the mean.

    Attributes:
        weight_D: what a channel's error counts; 1 for all where all channels are of one size.
    """

    def __init__(self, targets: Iterable[torch.Tensor]) -> None:
        total_D, tokens = torch.tensor(0.0), 0
        for target_BTD in targets:
            share_BTD = target_BTD.float().square() / _size_BT(target_BTD)[..., None]
            total_D = share_BTD.sum(dim=(0, 1)) + total_D.to(share_BTD.device)
            tokens += share_BTD.shape[0] * share_BTD.shape[1]
        self.weight_D = 1 / (total_D * (len(total_D) / tokens)).clamp(min=SMALLEST_SHARE)

    def __call__(self, out_BTD: torch.Tensor, target_BTD: torch.Tensor) -> torch.Tensor:
        error_BTD = (out_BTD.float() - target_BTD.float()).square() * self.weight_D
        return (error_BTD.sum(dim=-1) / _size_BT(target_BTD)).mean()


def _size_BT(target_BTD: torch.Tensor) -> torch.Tensor:
    """Each token's squared size, at least the smallest number that may divide."""
    return target_BTD.float().square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)


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
