"""Which weights are lowest, by whole counts: the masks of an ``Amount``. True where a weight is kept."""

from __future__ import annotations

import torch

from secateur.removal.amount import Amount, block_counts, row_counts
from secateur.removal.masks import n_of_m_mask, row_chunks, rows_without_lowest, threshold_mask
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
    if amount.within == "share":
        return without_lowest(gone_with_OI(score_OI), amount.leaving)
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
    counts = counts_O.unique().tolist()
    if len(counts) == 1:
        return rows_without_lowest(score_OI, counts[0])
    keep_OI = torch.empty_like(score_OI, dtype=torch.bool)
    for count in counts:
        rows_R = torch.nonzero(counts_O == count).reshape(-1).to(score_OI.device)
        keep_OI[rows_R] = rows_without_lowest(score_OI[rows_R], count)
    return keep_OI


def gone_with_OI(score_OI: torch.Tensor) -> torch.Tensor:
    """The share of its row's scores that is gone once a weight and all lower ones of the row have left, float32.

    Wanda's appendix prunes the weights of every row up to one such share, and searches for the one with which a matrix
    reaches its ratio (methods §2.2). Taking the lowest shares of the matrix is that search's limit, with exact counts; and
    as the last weight of a row has share 1, no row is emptied before all are.
    """
    share_OI = torch.empty_like(score_OI, dtype=torch.float32)
    for rows in row_chunks(score_OI):
        sorted_RI, order_RI = score_OI[rows].sort(dim=1, stable=True)
        gone_RI = sorted_RI.double().cumsum(dim=1)
        whole_R1 = gone_RI[:, -1:]
        gone_RI = torch.where(whole_R1 > 0, gone_RI / whole_R1, 0)
        gone_RI[:, -1] = 1  # a row of zeros too
        share_OI[rows].scatter_(1, order_RI, gone_RI.float())
    return share_OI
