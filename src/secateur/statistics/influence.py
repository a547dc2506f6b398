"""What a block does to the residual stream: how far it turns the hidden states that pass through it.

What leaves the last block is taken as the block gives it, before the model's final norm; transformers' own list of
hidden states ends with the normed ones (methods §9.2). Calibration windows have no padding, so every token counts.
"""

from __future__ import annotations

import torch

from secateur.statistics.base import BlockStatistic


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The cosine between vectors ``(..., D)``, ``(...)`` float64, from products in float32.

    Two zero vectors count as alike (1): a block that hands on a zero has changed nothing. A zero vector and another count
    as unrelated (0).
    """
    x, y = x.float(), y.float()
    product, x_square, y_square = ((a * b).sum(dim=-1, dtype=torch.float64) for a, b in ((x, y), (x, x), (y, y)))
    both_are_zero = (x_square == 0) & (y_square == 0)
    # The root of the product, not the product of roots: a vector and itself then give 1 to the last bit.
    found = product / (x_square * y_square).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(both_are_zero, 1.0, found).clamp(-1, 1)


class BlockCosine(BlockStatistic):
    """Mean over windows of the mean over tokens of the cosine between what enters a block and what leaves it, ``()``.

    One minus it is the block's influence (ShortGPT, arXiv 2403.03853, equation 1; methods §9.1).
    """

    name = "block_cosine"

    def row(self, x_TD: torch.Tensor, out_TD: torch.Tensor) -> torch.Tensor:
        return cosine(x_TD, out_TD).mean()


class LastToken(BlockStatistic):
    """The last token's hidden state of each window as it enters and as it leaves, rows ``(2, D)`` float32 (methods §9.1)."""

    name = "last_token"

    def row(self, x_TD: torch.Tensor, out_TD: torch.Tensor) -> torch.Tensor:
        return torch.stack([x_TD[-1], out_TD[-1]]).float()
