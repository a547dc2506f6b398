"""Which weights are lowest, by whole counts: the masks of an ``Amount``. True where a weight is kept.

Where rows compete, each keeps at least its highest weight as long as the count allows it, so that no output is left without
an input. The published codes empty such rows; where none would be empty the masks are theirs.
"""

from __future__ import annotations

import torch

from secateur.removal.amount import Amount, block_counts, row_counts
from secateur.removal.masks import CHUNK, n_of_m_mask, row_chunks, rows_without_lowest, threshold_mask
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
        return without_emptied_rows(score_OI, amount.leaving)
    if amount.within == "share":
        return without_lowest(gone_with_OI(score_OI), amount.leaving)
    outputs, inputs = score_OI.shape
    if amount.within == "row":
        return without_lowest_of_rows(score_OI, row_counts(amount, (outputs, inputs), score_OI))
    by_blocks = ByBlocks(amount, (outputs, inputs), block_size)
    return torch.cat([by_blocks.next(score_OB.contiguous()) for score_OB in score_OI.split(block_size, dim=1)], dim=1)


class ByBlocks:
    """The masks of one block of columns after the other, each taken when its scores are known.

    A row that has kept nothing so far is looked after once the blocks that follow keep too few weights to do so.
    """

    def __init__(self, amount: Amount, shape_OI: tuple[int, int], block_size: int) -> None:
        outputs, inputs = shape_OI
        self._counts = block_counts(amount, inputs, outputs, block_size)
        self._kept_later = outputs * inputs - amount.leaving
        self._bare_O = torch.ones(outputs, dtype=torch.bool)

    def next(self, score_OB: torch.Tensor) -> torch.Tensor:
        """The mask of the next block by its scores."""
        leaving = self._counts.pop(0)
        room = score_OB.numel() - leaving
        self._kept_later -= room
        keep_OB = without_lowest(score_OB, leaving)
        bare_O = self._bare_O & ~keep_OB.any(dim=1).cpu()
        if int(bare_O.sum()) > self._kept_later:
            rows_R = torch.nonzero(self._bare_O).reshape(-1).to(score_OB.device)
            by_best = score_OB[rows_R].amax(dim=1).sort(stable=True, descending=True).indices
            keep_OB = without_lowest(with_best_beyond_price(score_OB, rows_R[by_best[:room]]), leaving)
            bare_O = self._bare_O & ~keep_OB.any(dim=1).cpu()
        self._bare_O = bare_O
        return keep_OB


def without_emptied_rows(score_OI: torch.Tensor, leaving: int) -> torch.Tensor:
    """As ``without_lowest``, but that every row keeps its highest, if so many may stay."""
    keep_OI = without_lowest(score_OI, leaving)
    if bool(keep_OI.any(dim=1).all()):
        return keep_OI
    return without_lowest(with_best_beyond_price(score_OI), leaving)


def with_best_beyond_price(score_OI: torch.Tensor, rows_R: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of the scores in which the highest of every row, or of some, is infinite; of equal ones the last, which leaves last."""
    result_OI = score_OI.clone()
    rows_R = torch.arange(len(score_OI), device=score_OI.device) if rows_R is None else rows_R
    for part_R in rows_R.split(max(1, CHUNK // max(1, score_OI.shape[1]))):
        best_R = score_OI.shape[1] - 1 - score_OI[part_R].flip(1).argmax(dim=1)
        result_OI[part_R, best_R] = torch.inf
    return result_OI


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
