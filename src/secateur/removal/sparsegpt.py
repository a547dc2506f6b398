"""SparseGPT: columns are frozen from left to right, and what each loses the columns to its right make good.

arXiv 2301.00774, algorithm 1; methods §3. The weight is held transposed, ``(I, O)``, so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from secateur.removal.amount import Amount, row_counts
from secateur.removal.curvature import DAMPENING, Factor, factor
from secateur.removal.quantise import Quantiser
from secateur.removal.selection import BLOCK, ByBlocks, lowest_mask, without_lowest_of_rows

SUB_BLOCK = 32
"""Columns that are frozen one by one; their errors reach the rest of the block, and it the rest, as matrix products."""


@dataclass(frozen=True)
class Updated:
    """A matrix of which something left while the rest was updated.

    Attributes:
        weight_OI: float32; zero wherever the mask is False.
        mask_OI: True where a weight is kept.
        loss: half the squared output error, ``tr(D (H + ridge) D^T) / 2`` for the change D, in the unit of H.
        dampening: the part of the mean diagonal that was added; more than was asked for where that would not do.
    """

    weight_OI: torch.Tensor
    mask_OI: torch.Tensor
    loss: float
    dampening: float


def sparsegpt(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor | Factor,
    amount: Amount,
    *,
    mask_OI: torch.Tensor | None = None,
    block_size: int = BLOCK,
    dampening: float = DAMPENING,
    quantiser: Quantiser | None = None,
    name: str = "the matrix",
) -> Updated:
    """Prune a matrix and update what stays so that its outputs change least (methods §3.2).

    A weight's score is ``w^2 / upper_jj^2``. Without a mask it is taken of the weights as updated so far: within a block
    over all rows of it, within a row for each row's part of a block, under N:M for each group when it is reached. Within
    the layer, or a row's share, it is taken once, of the original weights, as all columns have to be compared before the first is frozen.
    Counts are exact, unlike the published code's.

    The columns of dead inputs become zero, so they score lowest and leave first; where one is kept by the mask it is zero
    all the same. Where nothing at all is to leave, or to be rounded, the weights come back as they are.

    Args:
        weight_OI: ``(O, I)``.
        hessian_II: ``X^T X`` up to a factor, left as it is; or its factor, for matrices with the same inputs.
        amount: how much leaves; not read if there is a mask.
        mask_OI: what is kept, already chosen; only the update is left to do.
        block_size: columns chosen together; made a multiple of M under N:M.
        dampening: see ``curvature.ridge``; not read if a factor is given.
        quantiser: rounds the weights that are kept, and lets the error spread.
        name: the matrix, for errors.

    Raises:
        RecipeError: the pattern does not divide the width.
        ModelError: the curvature cannot be decomposed.
    """
    if mask_OI is None and amount.group and weight_OI.shape[1] % amount.group:
        lowest_mask(weight_OI, amount, name)  # says what is wrong
    nothing_leaves = not (amount.group or amount.leaving) if mask_OI is None else bool(mask_OI.all())
    if nothing_leaves and quantiser is None:
        everything_OI = torch.ones_like(weight_OI, dtype=torch.bool)
        return Updated(weight_OI.float().clone(), everything_OI, 0.0, dampening)
    curvature = hessian_II if isinstance(hessian_II, Factor) else factor(hessian_II, dampening, name)
    walk = _Walk(weight_OI, curvature, amount, mask_OI, quantiser, name)
    group = amount.group or 1
    loss = walk.freeze_all(-(-block_size // group) * group)
    return Updated(walk.weight_IO.T.contiguous(), walk.keep_IO.T.contiguous(), loss, curvature.dampening)


class _Walk:
    """The state of one matrix while its columns are frozen."""

    def __init__(
        self,
        weight_OI: torch.Tensor,
        curvature: Factor,
        amount: Amount,
        mask_OI: torch.Tensor | None,
        quantiser: Quantiser | None,
        name: str,
    ) -> None:
        self.weight_IO = weight_OI.float().T.clone(memory_format=torch.contiguous_format)
        self.weight_IO[curvature.dead_I] = 0
        self.upper_II = curvature.upper_II
        self.diagonal_I1 = curvature.upper_II.diagonal()[:, None]
        self.amount, self.quantiser, self.name = amount, quantiser, name
        self.shape_OI = (weight_OI.shape[0], weight_OI.shape[1])
        self.given = mask_OI is not None or (amount.within in ("layer", "share") and not amount.group)
        self.by_group = not self.given and amount.group > 0
        if mask_OI is None and self.given:
            mask_OI = lowest_mask(self._score_OC(slice(None)), amount, name)
        self.keep_IO = torch.ones_like(self.weight_IO, dtype=torch.bool) if mask_OI is None else mask_OI.T.clone()

    def freeze_all(self, block_size: int) -> float:
        """Go through all columns; returns the loss."""
        loss = 0.0
        inputs = len(self.weight_IO)
        chosen = self._chosen_by_block(block_size)
        for start in range(0, inputs, block_size):
            block = slice(start, min(start + block_size, inputs))
            if not self.given and not self.by_group:
                self.keep_IO[block] = next(chosen).T
            error_BO = self._freeze_block(block)
            self.weight_IO[block.stop :].addmm_(self.upper_II[block, block.stop :].T, error_BO, alpha=-1)
            loss += float(error_BO.double().square().sum()) / 2
        return loss

    def _chosen_by_block(self, block_size: int) -> Iterator[torch.Tensor]:
        """Each block's mask ``(O, B)``, taken of its weights at the moment when it is asked for."""
        inputs = self.shape_OI[1]
        blocks = [slice(start, min(start + block_size, inputs)) for start in range(0, inputs, block_size)]
        if self.amount.within == "row":
            counts_O = row_counts(self.amount, self.shape_OI, self._score_OC(slice(None)))
            for block in blocks:
                part_O = counts_O * block.stop // inputs - counts_O * block.start // inputs
                yield without_lowest_of_rows(self._score_OC(block), part_O)
        else:
            by_blocks = ByBlocks(self.amount, self.shape_OI, block_size)
            for block in blocks:
                yield by_blocks.next(self._score_OC(block))

    def _score_OC(self, columns: slice) -> torch.Tensor:
        return (self.weight_IO[columns] / self.diagonal_I1[columns]).square().T.contiguous()

    def _freeze_block(self, block: slice) -> torch.Tensor:
        """Freeze the columns of a block; returns their errors ``(B, O)``, still to be spread to the right of it."""
        weight_BO, upper_BB = self.weight_IO[block], self.upper_II[block, block]
        error_BO = torch.empty_like(weight_BO)
        step = self.amount.group if self.by_group else SUB_BLOCK
        for start in range(0, len(weight_BO), step):
            part = slice(start, min(start + step, len(weight_BO)))
            columns = slice(block.start + part.start, block.start + part.stop)
            weight_BO[part].addmm_(upper_BB[: part.start, part].T, error_BO[: part.start], alpha=-1)
            if self.by_group:
                score_OC = self._score_OC(columns)
                self.keep_IO[columns] = lowest_mask(score_OC, self.amount, self.name).T
            self._freeze_columns(columns, upper_BB[part, part], error_BO[part])
        return error_BO

    def _freeze_columns(self, columns: slice, upper_CC: torch.Tensor, error_CO: torch.Tensor) -> None:
        """Freeze columns one by one, each first made to answer for the errors of those before it."""
        weight_CO, leaves_CO = self.weight_IO[columns], ~self.keep_IO[columns]
        share_CO = leaves_CO / upper_CC.diagonal()[:, None]
        for column, weight_O in enumerate(weight_CO):
            if column:
                weight_O.addmv_(error_CO[:column].T, upper_CC[:column, column], alpha=-1)
            if self.quantiser is None:
                torch.mul(weight_O, share_CO[column], out=error_CO[column])
            else:
                rounded_O = self.quantiser.round(weight_O).masked_fill(leaves_CO[column], 0)
                error_CO[column] = (weight_O - rounded_O) / upper_CC[column, column]
                weight_O.copy_(rounded_O)
        weight_CO.masked_fill_(leaves_CO, 0)
