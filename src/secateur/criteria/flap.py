"""FLAP: an input is worth how much it varies, times the weights that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.criteria.base import Criterion, Matrix
from secateur.statistics import InputMoments, Statistic
from secateur.structure.units import Member, UnitGroup


class FLAP(Criterion):
    """S_ij = Var(x_j) * W_ij^2, the variance over all calibration tokens (arXiv 2312.11983; methods §12).

    Summed over a column it is the weighted input feature variance, Var(x_j) * ||W_:,j||_2^2: what the output loses when the
    input is replaced by its mean, which ``--removal bias`` does. A unit is worth what reads it: a head its columns of the
    output projection, a channel its column of the matrix behind it; the rows that make it count nothing.
    """

    name = "flap"
    allocation = "global"
    normalise = "zscore"
    unit_removal = "bias"

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputMoments})

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        return matrix.weight_OI.float().square() * matrix.of(InputMoments).variance()

    def counted(self, group: UnitGroup) -> Sequence[Member]:
        return [member for member in group.members if member.role == "consumer"]
