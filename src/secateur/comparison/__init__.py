"""The comparison of several recipes on one model: what is compared, how each is planned, what is kept of it."""

from secateur.comparison.comparing import compare
from secateur.comparison.result import Comparison

__all__ = ["Comparison", "compare"]
