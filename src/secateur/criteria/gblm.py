"""GBLM-Pruner: activations and normalised gradients of the dense model, joined."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from secateur.criteria.base import Criterion, Matrix, Options
from secateur.statistics import GradientAbs, GradientSquare, InputNorm, Statistic


class GBLMOptions(Options):
    norm: Literal["l1", "l2"] = "l1"
    alpha: float = Field(default=100.0, ge=0, allow_inf_nan=False)
    gradient_only: bool = False


class GBLM(Criterion):
    """S_ij = |W_ij| * (||X_j||_2 / sqrt(N) + alpha * ||G_ij||_p), p over the N windows (arXiv 2311.04902; methods §1).

    ``alpha`` means what the published code means: its activation term carries 1/sqrt(N) and its gradient norm does not
    (methods §1.5). With the means over windows that our statistics keep, that is ``alpha * N * mean|g|`` for l1 and
    ``alpha * sqrt(N) * sqrt(mean g^2)`` for l2. In the paper's printed formula the same score has
    ``alpha_paper = alpha * sqrt(N)``; so for the paper's convention give ``alpha_paper / sqrt(N)``.
    """

    name = "gblm"
    propagation = "pruned"
    options_type = GBLMOptions

    def needs(self) -> frozenset[type[Statistic]]:
        gradient: type[Statistic] = GradientAbs if self.options.norm == "l1" else GradientSquare
        return frozenset({gradient}) if self.options.gradient_only else frozenset({gradient, InputNorm})

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        weight_OI = matrix.weight_OI.float().abs()
        if self.options.gradient_only:
            return weight_OI * self._gradient_norm_OI(matrix)
        return weight_OI * matrix.of(InputNorm).norm_I() + weight_OI * (
            self.options.alpha * self._gradient_norm_OI(matrix)
        )

    def _gradient_norm_OI(self, matrix: Matrix) -> torch.Tensor:
        if self.options.norm == "l1":
            return matrix.of(GradientAbs).mean() * matrix.of(GradientAbs).windows
        squares = matrix.of(GradientSquare)
        return squares.mean().sqrt() * math.sqrt(squares.windows)
