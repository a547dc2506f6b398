"""The walk over the decoder blocks, one block in memory: forward, and backward for exact gradients."""

from secateur.statistics import BlockStatistics
from secateur.sweep.noise import Queries
from secateur.sweep.sweep import Sweep, require_causal
from secateur.sweep.walk import Fit, Passage, SweepSettings, Visit

__all__ = ["BlockStatistics", "Fit", "Passage", "Queries", "Sweep", "SweepSettings", "Visit", "require_causal"]
