"""One ranking over the whole model: blocks that matter less give more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from secateur.allocation.pools import Chosen, Key, Pool


class Ranking:
    """All units of several pools by score a parameter, so that heads and channels can be compared.

    (LLM-Pruner's code compares them raw, methods §14.3.)

    Args:
        scores: ``(U,)`` a pool; a unit with an infinite one stays.
        sizes: how many parameters each unit of a pool holds, ``(U,)``.
        standardise: compare by how many standard deviations of its own pool a unit stands above the pool's mean
            (``zscore``) and not by score a parameter.

    Attributes:
        total: parameters of all units that may leave.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        scores: Mapping[Key, torch.Tensor],
        sizes: Mapping[Key, torch.Tensor],
        standardise: bool = False,
    ) -> None:
        self._pools = list(pools)
        may = [torch.tensor(pool.may_leave, dtype=torch.int64) for pool in pools]
        size = [sizes[pool.key][units] for pool, units in zip(pools, may, strict=True)]
        raw = [scores[pool.key].double()[units] for pool, units in zip(pools, may, strict=True)]
        score = [zscore(one) if standardise else one / held for one, held in zip(raw, size, strict=True)]
        owner = [torch.full((len(units),), number) for number, units in enumerate(may)]
        worth = torch.cat(score)
        order = torch.sort(worth, stable=True).indices
        order = order[worth[order] < torch.inf]
        self._entries = [torch.cat(part)[order].tolist() for part in (owner, may, size)]
        self.total = int(torch.cat(size).sum())

    def take(self, budget: int) -> Chosen:
        """The units that leave, lowest first, as long as the parameters gone stay within ``budget``.

        Every pool keeps as many as have to stay.
        """
        taken: list[list[int]] = [[] for _ in self._pools]
        most = [pool.most for pool in self._pools]
        for number, unit, size in zip(*self._entries, strict=True):
            if size <= budget and len(taken[number]) < most[number]:
                budget -= size
                taken[number].append(unit)
        return {pool.key: sorted(units) for pool, units in zip(self._pools, taken, strict=True)}


def zscore(score_U: torch.Tensor) -> torch.Tensor:
    """``(s - mean) / standard deviation`` (of a sample, as FLAP has it; arXiv 2312.11983); 0 where all are equal.

    Infinite scores stay as they are, and the others are standardised without them.
    """
    known_U = score_U.isfinite()
    finite = score_U[known_U]
    if not len(finite) or finite.max() == finite.min():
        return torch.where(known_U, 0, score_U)
    low, high = finite.min(), finite.max()  # squares of scaled scores neither overflow nor vanish
    scaled = (finite - low) / (high - low)
    return score_U.masked_scatter(known_U, (scaled - scaled.mean()) / scaled.std())
