"""AlphaPruning: matrices whose spectrum has a heavier tail are better trained and give less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field

from secateur.allocation.policy import Policy, SpreadOptions, from_0_to_1
from secateur.allocation.spectrum import Estimator, eigenvalues_K, tail_exponent
from secateur.statistics import Statistic


class AlphaOptions(SpreadOptions):
    metric: Estimator = "peak"
    spread: float = Field(default=0.3, ge=0, le=1)


class Alpha(Policy):
    """Ratios linear in the exponent of each spectrum's tail (arXiv 2410.10912; methods §8).

    The smallest mean exponent of a block wishes for ``1 - spread`` of the ratio, the largest for ``1 + spread``. It
    needs no calibration text. A matrix without a tail (one of rank one, say) has no figure.
    """

    name = "alpha"
    options_type = AlphaOptions
    measured_by = ("metric",)

    def figure(
        self, matrices: Mapping[str, torch.Tensor], statistics: Mapping[str, Mapping[type[Statistic], Statistic]]
    ) -> dict[str, float]:
        found = {
            name: tail_exponent(eigenvalues_K(weight_OI), self.options.metric) for name, weight_OI in matrices.items()
        }
        return {name: alpha for name, alpha in found.items() if alpha is not None}

    def wish_L(self, figure_L: Sequence[float], size_L: Sequence[int], ratio: float) -> list[float]:
        spread = self.options.spread
        return [1 - spread + 2 * spread * place for place in from_0_to_1(figure_L)]
