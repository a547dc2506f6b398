"""SparseGPT's saliency: what taking a weight would cost when the others make good what they can."""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.criteria.base import Criterion, Matrix, Options
from secateur.removal.curvature import factor
from secateur.statistics import InputSecondMoment, Statistic


class SparseGPTOptions(Options):
    dampening: float = Field(default=0.01, gt=0, le=1)


class SparseGPT(Criterion):
    """S_ij = W_ij^2 / [H^-1]_jj with H = 2/N sum X X^T + dampening (arXiv 2301.00774, equation 3; methods §3.2).

    The scores of a whole matrix at once, for units and for removals that refine a mask. ``--removal sparsegpt``, the
    default, chooses on the way instead, with weights that have been compensated and the inverse that is left.
    """

    name = "sparsegpt"
    propagation = "pruned"
    within = "block"
    removal = "sparsegpt"
    adaptive = True
    options_type = SparseGPTOptions

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputSecondMoment})

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        found = factor(matrix.of(InputSecondMoment).hessian_II(), self.options.dampening, matrix.name)
        inverse_diagonal_I = found.upper_II.square().sum(dim=0)
        return matrix.weight_OI.float().square().masked_fill(found.dead_I, 0) / inverse_diagonal_I
