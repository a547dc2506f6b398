"""LLM-Pruner's Taylor importance: how much the loss would change if a weight left."""

from __future__ import annotations

from typing import Literal

import torch

from secateur.criteria.base import Criterion, Matrix, Options
from secateur.statistics import GradientMean, GradientSquare, Statistic


class TaylorOptions(Options):
    order: Literal["vector", "first", "second", "mixed"] = "first"


class Taylor(Criterion):
    """First-, second-order or mixed Taylor terms (arXiv 2305.11627; methods §14.2).

    With g the gradient of the mean loss over all windows and F the mean over windows of squared gradients:

    * ``vector``: |sum of w g| over a row or column, so contributions may cancel within it;
    * ``first``: sum of |w g|;
    * ``second``: sum of w^2 F (the published code has no 1/2);
    * ``mixed``: sum of |w g - w^2 F / 2|.
    """

    name = "taylor"
    options_type = TaylorOptions

    def needs(self) -> frozenset[type[Statistic]]:
        kinds: dict[str, set[type[Statistic]]] = {
            "vector": {GradientMean},
            "first": {GradientMean},
            "second": {GradientSquare},
            "mixed": {GradientMean, GradientSquare},
        }
        return frozenset(kinds[self.options.order])

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        weight_OI, order = matrix.weight_OI.float(), self.options.order
        if order == "second":
            return weight_OI.square() * matrix.of(GradientSquare).mean()
        first_OI = weight_OI * matrix.of(GradientMean).mean()
        if order == "vector":
            return first_OI
        if order == "first":
            return first_OI.abs()
        return (first_OI - weight_OI.square() * matrix.of(GradientSquare).mean() / 2).abs()

    def weight_score_OI(self, matrix: Matrix) -> torch.Tensor:
        return self.score_OI(matrix).abs()

    def channel_score(self, contribution: torch.Tensor, dim: int) -> torch.Tensor:
        summed = super().channel_score(contribution, dim)
        return summed.abs() if self.options.order == "vector" else summed
