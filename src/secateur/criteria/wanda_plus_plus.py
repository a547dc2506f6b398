"""Wanda++'s regional score: activations joined with the gradient of the block's own output."""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.criteria.base import Criterion, Matrix, Options
from secateur.statistics import GradientSquare, InputNorm, Statistic


class WandaPlusPlusOptions(Options):
    alpha: float = Field(default=100.0, ge=0, allow_inf_nan=False)


class WandaPlusPlus(Criterion):
    """S_ij = |W_ij| * (||X_j||_2 / sqrt(N) + alpha * sqrt(mean over windows of g_ij^2)), g of ``||block(X)||_2``
    (regional gradient score, arXiv 2503.04992; methods §12).

    Its second half, some rounds of optimisation of each block, is not part of the score.
    """

    name = "wanda++"
    propagation = "pruned"
    gradient = "block"
    options_type = WandaPlusPlusOptions

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({GradientSquare, InputNorm})

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        gradient_OI = matrix.of(GradientSquare).mean().sqrt()
        return matrix.weight_OI.float().abs() * (matrix.of(InputNorm).norm_I() + self.options.alpha * gradient_OI)
