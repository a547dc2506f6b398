"""ShortGPT: a block is worth how far it turns what passes through it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from secateur.criteria.base import BlockCriterion
from secateur.statistics import BlockCosine, Statistic


class Influence(BlockCriterion):
    """BI_i = 1 - E[cos(what enters block i, what leaves it)], from 0 to 2 (arXiv 2403.03853, equation 1; methods §9.1)."""

    name = "influence"

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({BlockCosine})

    def block_score(
        self, gathered: Mapping[type[Statistic], Statistic], contributions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        return 1 - gathered[BlockCosine].mean()
