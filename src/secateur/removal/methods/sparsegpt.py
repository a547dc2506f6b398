"""SparseGPT: column by column, each removal's error made good by the columns that follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from secateur.options import Options
from secateur.removal.amount import Amount
from secateur.removal.least_squares import refit_columns
from secateur.removal.methods.base import Removal, Removed, Task
from secateur.removal.quantise import Quantiser
from secateur.removal.sparsegpt import sparsegpt
from secateur.statistics import InputSecondMoment, Statistic


class SparseGPTOptions(Options):
    block_size: int = Field(default=128, ge=1, le=1 << 16)
    dampening: float = Field(default=0.01, gt=0, le=1)
    bits: int = Field(default=16, ge=2, le=16)


class SparseGPT(Removal):
    """min ||W X - W' X||_F^2 over the weights that stay, approximately (arXiv 2301.00774; methods §3).

    With its own criterion the mask is chosen on the way, block of columns by block of columns; with any other the mask is
    that criterion's, and only the update is SparseGPT's. ``bits`` below 16 also rounds what stays to so many bits a weight
    within the same loop; the checkpoint keeps its dtype. Inputs that a cut leaves are fitted by least squares.
    """

    name = "sparsegpt"
    updates = True
    options_type = SparseGPTOptions

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputSecondMoment})

    def remove(self, task: Task) -> Removed:
        options = self.options
        own = task.adaptive and task.amount is not None
        found = sparsegpt(
            task.weight_OI,
            task.of(InputSecondMoment).hessian_II(),
            task.amount or Amount(0, "row"),
            mask_OI=None if own else task.choose(),
            block_size=options.block_size,
            dampening=options.dampening,
            quantiser=Quantiser.of(task.weight_OI, options.bits) if options.bits < 16 else None,
            name=task.name,
        )
        notes = {"dampening": found.dampening} if found.dampening > options.dampening else {}
        return Removed(found.mask_OI, found.weight_OI, notes)

    def refit(
        self, weight_OI: torch.Tensor, kept_K: torch.Tensor, statistics: Mapping[type[Statistic], Any]
    ) -> Removed:
        hessian_II = statistics[InputSecondMoment].hessian_II()
        weight_OK = refit_columns(weight_OI, hessian_II, kept_K, self.options.dampening)
        return Removed(torch.ones_like(weight_OK, dtype=torch.bool), weight_OK)

    def scratch_bytes(self, outputs: int, inputs: int) -> int:
        return 4 * (
            4 * inputs * inputs + 3 * outputs * inputs
        )  # the Hessian damped, inverted and factored; weights twice, errors
