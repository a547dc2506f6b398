"""The run of blocks between whose ends the hidden states turn least."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from secateur.criteria.base import BlockCriterion
from secateur.statistics import LastToken, Statistic
from secateur.statistics.influence import cosine


class Angular(BlockCriterion):
    """arccos(cos(what enters block i, what leaves block j)) / pi at each window's last token, mean over windows.

    Of as many consecutive blocks as leave, the run with the smallest distance goes (Gromov et al., arXiv 2403.17887;
    methods §9.1).
    """

    name = "angular"
    of_runs = True

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({LastToken})

    def block_score(
        self, gathered: Mapping[type[Statistic], Statistic], contributions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The hidden states themselves, ``(N, 2, D)``: how far a run turns them is not a sum over its blocks."""
        last_token = gathered[LastToken]
        assert isinstance(last_token, LastToken)
        return last_token.each()

    def over_blocks(self, known: Mapping[int, torch.Tensor], count: int) -> torch.Tensor:
        """The distance of every run, ``(U, U)`` by its first and last block; infinite where it holds unknown blocks."""
        distance_UU = torch.full((count, count), math.inf, dtype=torch.float64)
        for first in known:
            last = first
            while last in known:
                angle_N = cosine(known[first][:, 0], known[last][:, 1]).arccos()
                distance_UU[first, last] = angle_N.mean() / math.pi
                last += 1
        return distance_UU
