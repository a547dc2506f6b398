"""Wanda: a weight is worth its size times the norm of what flows into it."""

from __future__ import annotations

import torch

from secateur.criteria.base import Criterion, Matrix
from secateur.statistics import InputNorm, Statistic


class Wanda(Criterion):
    """S_ij = |W_ij| * ||X_j||_2 / sqrt(N) (arXiv 2306.11695, equation 1; methods §2.1; sqrt(N) does not change the order)."""

    name = "wanda"
    propagation = "pruned"

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputNorm})

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        return matrix.weight_OI.float().abs() * matrix.of(InputNorm).norm_I()
