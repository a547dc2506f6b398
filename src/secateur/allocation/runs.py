"""Choosing consecutive blocks by a score of the run they make."""

from __future__ import annotations

import torch

from secateur.allocation.pools import Pool


def lowest_run(pool: Pool, score_UU: torch.Tensor, count: int) -> list[int]:
    """The ``count`` consecutive blocks that leave with the lowest score; of equal scores the earlier run.

    Args:
        score_UU: of the blocks from the first index through the second.
    """
    if count == 0:
        return []
    may_leave = set(pool.may_leave)
    runs = [list(range(first, first + count)) for first in pool.may_leave]
    whole = [run for run in runs if may_leave.issuperset(run)]
    return min(whole, key=lambda run: float(score_UU[run[0], run[-1]]))
