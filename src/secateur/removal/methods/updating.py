"""What removals share that update weights by the second moment of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from secateur.options import Options
from secateur.removal.least_squares import refit_columns
from secateur.removal.methods.base import Removal, Removed
from secateur.statistics import InputSecondMoment, Statistic


class UpdatingOptions(Options):
    dampening: float = Field(default=0.01, gt=0, le=1)
    noise: float = Field(default=0.0, ge=0, le=100)


class Updating(Removal):
    """min ||W X - W' X||_F^2 over the weights that stay. Inputs that a cut leaves are fitted by least squares.

    Against overfitting to few tokens, ``dampening`` adds the same to every input's second moment, a part of their mean;
    ``noise`` adds to each a part of its own, as if inputs came with independent noise of that part of their power. Where a few
    inputs are much larger than the others, the mean is theirs, and no dampening suits both.
    """

    updates = True
    options_type = UpdatingOptions

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputSecondMoment})

    def refit(
        self, name: str, weight_OI: torch.Tensor, kept_K: torch.Tensor, statistics: Mapping[type[Statistic], Any]
    ) -> Removed:
        hessian_II = self.hessian_II(statistics[InputSecondMoment])
        found = refit_columns(weight_OI, hessian_II, kept_K, self.options.dampening, name)
        stays_OK = torch.ones_like(found.weight_OK, dtype=torch.bool)
        return Removed(stays_OK, found.weight_OK, self.raised(found.dampening))

    def hessian_II(self, moment: InputSecondMoment) -> torch.Tensor:
        """The second moment as ``noise`` leaves it, the caller's to change."""
        hessian_II = moment.hessian_II()
        hessian_II.diagonal().mul_(1 + self.options.noise)
        return hessian_II

    def raised(self, dampening: float) -> dict[str, float]:
        """The dampening, where it had to be more than was asked for."""
        return {"dampening": dampening} if dampening > self.options.dampening else {}
