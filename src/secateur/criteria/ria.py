"""RIA: a weight's size beside the others of its row and of its column."""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.criteria.base import Criterion, Matrix, Options
from secateur.statistics import InputNorm, Statistic


class RIAOptions(Options):
    power: float = Field(default=0.5, ge=0, le=16)


class RIA(Criterion):
    """S_ij = (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^power (relative importance and
    activations; methods §12).

    A row or column of zeros adds nothing. The channel permutation that the method has for N:M is not done.
    """

    name = "ria"
    propagation = "pruned"
    options_type = RIAOptions

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputNorm})

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        weight_OI = matrix.weight_OI.float().abs()
        of_row_O1, of_column_I = weight_OI.sum(dim=1, keepdim=True), weight_OI.sum(dim=0)
        relative_OI = _share(weight_OI, of_column_I) + _share(weight_OI, of_row_O1)
        return relative_OI * matrix.of(InputNorm).norm_I().pow(self.options.power)


def _share(weight_OI: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return weight_OI / torch.where(whole > 0, whole, 1)
