"""Measured sensitivity: blocks whose loss hurts the model more give less. This policy is our own, of no paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from secateur.allocation.policy import Figures, Policy, from_0_to_1
from secateur.options import Options

DENSE, MASKED, DIVERGENCE = "dense_loss", "masked_loss", "divergence"
"""What a block's figures are called: two mean next-token cross-entropies and a mean Kullback-Leibler divergence, in nats."""

FLOOR = 1e-3
"""Of the largest rise: a smaller one, or a loss that falls, counts as this much. Its logarithm is noise."""


class SensitivityOptions(Options):
    metric: Literal["loss", "divergence"] = "divergence"
    windows: int = Field(default=8, ge=1, le=1_000_000)
    spread: float = Field(default=0.3, ge=0, le=1)


class Sensitivity(Policy):
    """Ratios that fall linearly with the logarithm of how much the model loses when a block alone is masked.

    Each block in turn has the asked ratio of its weights masked by Wanda, row by row, in the otherwise dense model; the
    first ``windows`` calibration windows say what that costs: how far the predictions move (Kullback-Leibler) or, with
    ``metric=loss``, by how much the loss rises, which on little text may also fall. The costs of blocks lie orders of magnitude apart, so their logarithm decides: the
    most sensitive block wishes for ``1 - spread`` of the ratio, the least for ``1 + spread``.
    """

    name = "sensitivity"
    measured = True
    options_type = SensitivityOptions

    def of_block(self, figures: Figures) -> float | None:
        """What the block's mask costs, in nats a token; None where it was not measured."""
        if not figures:
            return None
        return figures[DIVERGENCE] if self.options.metric == "divergence" else figures[MASKED] - figures[DENSE]

    def wish_L(self, figure_L: Sequence[float], size_L: Sequence[int], ratio: float) -> list[float]:
        largest = max(figure_L)
        if largest <= 0:  # masking helped everywhere: nothing to tell blocks apart by
            return [1.0] * len(figure_L)
        spread = self.options.spread
        logarithm_L = [math.log(max(figure / largest, FLOOR)) for figure in figure_L]
        return [1 + spread - 2 * spread * place for place in from_0_to_1(logarithm_L)]
