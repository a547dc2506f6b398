"""How much leaves from where, one file a policy."""

from secateur.allocation.across_blocks import global_units
from secateur.allocation.threshold import exact_threshold
from secateur.allocation.uniform import uniform_units

__all__ = ["exact_threshold", "global_units", "uniform_units"]
