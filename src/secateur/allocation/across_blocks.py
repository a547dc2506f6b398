"""One ranking over the whole model: blocks that matter less give more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from secateur.allocation.pools import Chosen, Key, Pool


class Ranking:
    """All units of several pools by score a parameter, so that heads and channels can be compared.

    (The published code compares them raw, methods §14.3.)

    Args:
        scores: ``(U,)`` a pool; a unit with an infinite one stays.
        sizes: how many parameters each unit of a pool holds, ``(U,)``.

    Attributes:
        total: parameters of all units that may leave.
    """

    def __init__(
        self, pools: Sequence[Pool], scores: Mapping[Key, torch.Tensor], sizes: Mapping[Key, torch.Tensor]
    ) -> None:
        self._pools = list(pools)
        may = [torch.tensor(pool.may_leave, dtype=torch.int64) for pool in pools]
        size = [sizes[pool.key][units] for pool, units in zip(pools, may, strict=True)]
        score = [scores[pool.key].double()[units] / s for pool, units, s in zip(pools, may, size, strict=True)]
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
