"""The walk over the decoder blocks, one block in memory: forward, and backward for exact gradients."""

from secateur.sweep.forward_only import Queries
from secateur.sweep.walk import BlockStatistics, Sweep, SweepSettings, require_causal

__all__ = ["BlockStatistics", "Queries", "Sweep", "SweepSettings", "require_causal"]
