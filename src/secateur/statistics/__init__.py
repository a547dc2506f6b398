"""What a sweep measures, one file a kind of statistic.

A statistic belongs to one matrix of one block, seen as ``(O, I)`` however the block keeps it, or to the block itself. It is fed one calibration window at a time, adds up with
another worker's part, and gives its state as named tensors to store and resume. Every statistic is a mean over windows
("sequences" in methods §0.2), so that figures do not depend on how many there were.
"""

from secateur.statistics.base import (
    BlockStatistic,
    GradientSource,
    GradientStatistic,
    InputStatistic,
    Statistic,
    gradient_kinds,
)
from secateur.statistics.gradient import GradientAbs, GradientMean, GradientSquare
from secateur.statistics.influence import BlockCosine, LastToken
from secateur.statistics.inputs import InputMean, InputMoments, InputNorm, InputSecondMoment, InputVariance
from secateur.statistics.states import BLOCK, BlockStatistics, add_states, as_states

__all__ = [
    "BLOCK",
    "BlockCosine",
    "BlockStatistic",
    "BlockStatistics",
    "GradientAbs",
    "GradientMean",
    "GradientSource",
    "GradientSquare",
    "GradientStatistic",
    "InputMean",
    "InputMoments",
    "InputNorm",
    "InputSecondMoment",
    "InputStatistic",
    "InputVariance",
    "LastToken",
    "Statistic",
    "add_states",
    "as_states",
    "gradient_kinds",
]
