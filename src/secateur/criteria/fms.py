"""MINI-LLM: weight, gradient and activation multiplied."""

from __future__ import annotations

import torch

from secateur.criteria.base import Criterion, Matrix, Options
from secateur.statistics import GradientMean, InputNorm, Statistic


class FMSOptions(Options):
    signed: bool = False


class FMS(Criterion):
    """Feature map sensitivity: |W_ij * g_ij| * ||X_j||_2 / sqrt(N), summed over a unit (after arXiv 2407.11681; methods §4).

    Only what the abstract and summaries of it say is known of the paper: that the score is the product of weight,
    gradient and activation, that the gradient is estimated by forward runs, and that heads and channels leave. Where the
    absolute value stands, that the activation counts as the norm of what flows into the matrix, that g is the gradient
    of the mean loss over all windows, and every number of the estimate are ours (methods §4.2-4.3). sqrt(N) does not
    change the order.

    ``signed``: |sum of W_ij * g_ij * ||X_j||| over a row or column, as Taylor's ``vector``, so that the noise of an estimated gradient may
    cancel within it (methods §4.4).
    """

    name = "fms"
    gradient = "forward"
    options_type = FMSOptions

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({GradientMean, InputNorm})

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        first_OI = matrix.weight_OI.float() * matrix.of(GradientMean).mean() * matrix.of(InputNorm).norm_I()
        return first_OI if self.options.signed else first_OI.abs()

    def weight_score_OI(self, matrix: Matrix) -> torch.Tensor:
        return self.score_OI(matrix).abs()

    def channel_score(self, contribution: torch.Tensor, dim: int) -> torch.Tensor:
        summed = super().channel_score(contribution, dim)
        return summed.abs() if self.options.signed else summed
