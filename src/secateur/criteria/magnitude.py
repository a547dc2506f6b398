"""Magnitude: a weight is worth its size (methods §11)."""

from __future__ import annotations

from typing import Literal

import torch

from secateur.criteria.base import Criterion, Matrix, Options


class MagnitudeOptions(Options):
    norm: Literal["l1", "l2"] = "l1"


class Magnitude(Criterion):
    """|w| (l1) or w squared (l2); the two order single weights alike and units differently (methods §11, §14.2)."""

    name = "magnitude"
    options_type = MagnitudeOptions

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        weight_OI = matrix.weight_OI.float()
        return weight_OI.abs() if self.options.norm == "l1" else weight_OI.square()
