"""Which weights are lowest, by whole counts: the masks of an ``Amount``. True where a weight is kept."""

from __future__ import annotations

import torch

from secateur.removal.amount import Amount, block_counts, row_counts
from secateur.removal.masks import n_of_m_mask, rows_without_lowest, threshold_mask
from secateur.removal.threshold import exact_threshold

BLOCK = 128
"""Columns that are chosen together within a block (SparseGPT's, methods §3.4)."""


def lowest_mask(score_OI: torch.Tensor, amount: Amount, name: str, block_size: int = BLOCK) -> torch.Tensor:
    """The mask that takes ``amount`` by these scores, at once.

    Args:
        score_OI: what each weight is worth, float32.
        amount: how much leaves.
        name: the matrix, for the error.
        block_size: columns that are compared within a block.

    Raises:
        RecipeError: the pattern does not divide the width.
    """
    if amount.group:
        return n_of_m_mask(score_OI, amount.keep, amount.group, name)
    if amount.within == "layer":
        return without_lowest(score_OI, amount.leaving)
    outputs, inputs = score_OI.shape
    if amount.within == "row":
        return without_lowest_of_rows(score_OI, row_counts(amount, (outputs, inputs), score_OI))
    counts = block_counts(amount, inputs, outputs, block_size)
    blocks = score_OI.split(block_size, dim=1)
    return torch.cat(
        [without_lowest(score_OB.contiguous(), count) for score_OB, count in zip(blocks, counts, strict=True)], dim=1
    )


def without_lowest(score_OI: torch.Tensor, leaving: int) -> torch.Tensor:
    """Of the whole matrix the ``leaving`` lowest leave, of equal ones the first."""
    if not leaving:
        return torch.ones_like(score_OI, dtype=torch.bool)
    return threshold_mask(score_OI, *exact_threshold(lambda: [score_OI], leaving))[0]


def without_lowest_of_rows(score_OI: torch.Tensor, counts_O: torch.Tensor) -> torch.Tensor:
    """Of each row as many of the lowest leave as ``counts_O`` says, of equal ones the first."""
    keep_OI = torch.empty_like(score_OI, dtype=torch.bool)
    for count in counts_O.unique().tolist():
        rows_R = torch.nonzero(counts_O == count).reshape(-1).to(score_OI.device)
        keep_OI[rows_R] = rows_without_lowest(score_OI[rows_R], count)
    return keep_OI
