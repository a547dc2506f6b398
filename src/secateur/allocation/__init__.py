"""How much leaves from where, one file a policy."""

from secateur.allocation.across_blocks import Ranking
from secateur.allocation.budget import CostModel
from secateur.allocation.pools import Pool, leave_everywhere, pools_of
from secateur.allocation.runs import lowest_run
from secateur.allocation.two_tier import two_tier_amounts
from secateur.allocation.uniform import lowest_units, uniform_amounts
from secateur.removal.threshold import exact_threshold

__all__ = [
    "CostModel",
    "Pool",
    "Ranking",
    "exact_threshold",
    "leave_everywhere",
    "lowest_run",
    "lowest_units",
    "pools_of",
    "two_tier_amounts",
    "uniform_amounts",
]
