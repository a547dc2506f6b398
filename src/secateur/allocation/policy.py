"""The contract of a policy: from a figure of every matrix to the ratio that leaves each of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch

from secateur.allocation.shares import balance
from secateur.options import Named, Options
from secateur.statistics import Statistic

MOST = 0.99
"""The largest ratio of one block, or halfway from the asked ratio to one where that is more."""

Figures = Mapping[str, float]
"""What was measured of one block: by matrix, or by what it is called where it is of the block as a whole."""

Sizes = Mapping[str, int]
"""How many weights each matrix of one block holds."""


class SpreadOptions(Options):
    """Options of a policy whose figures may be of blocks or of single matrices."""

    by: Literal["block", "matrix"] = "block"


class Policy(Named, ABC):
    """A ratio for every matrix out of what was measured of the dense model.

    Attributes:
        measured: whether its figures are losses of the model with one block masked; otherwise ``figure`` makes them.
        measured_by: those of the options on which figures depend; the others matter afterwards.
    """

    flag = "allocation"
    measured: ClassVar[bool] = False
    measured_by: ClassVar[tuple[str, ...]] = ()

    def needs(self) -> frozenset[type[Statistic]]:
        """The statistics of the dense model that ``figure`` reads."""
        return frozenset()

    def figure(
        self, matrices: Mapping[str, torch.Tensor], statistics: Mapping[str, Mapping[type[Statistic], Statistic]]
    ) -> dict[str, float]:
        """One number for each matrix of a block; one that has none is left out.

        Args:
            matrices: by name the weights ``(O, I)``, in any dtype and on any device.
            statistics: by the same names what ``needs`` asks for.
        """
        raise NotImplementedError(f"{self.name} is measured, not made of weights")

    @abstractmethod
    def wish_L(self, figure_L: Sequence[float], size_L: Sequence[int], ratio: float) -> list[float]:
        """How much each block, or each matrix, should give, as ``balance`` understands it; not all figures are equal."""

    def of_block(self, figures: Figures) -> float | None:
        """One number for a block out of its figures: their mean; None where it has none."""
        return math.fsum(figures.values()) / len(figures) if figures else None

    def shares(
        self, figures_by_block: Sequence[Figures], sizes: Sequence[Sizes], ratio: float
    ) -> list[dict[str, float]]:
        """The ratio that leaves every matrix of every block.

        The mean over all matrices, weighted by their sizes, is ``ratio``; each is in [0, 1). What has no figure is
        treated as the mean of the others; where nothing has one, or all are equal, all give ``ratio``.

        Args:
            figures_by_block: as ``figure`` or the measurement gives them.
            sizes: the weights of every matrix that may give.
            ratio: in [0, 1).
        """
        if getattr(self.options, "by", "block") == "block":
            ratio_L = self.spread(
                [self.of_block(figures) for figures in figures_by_block], [sum(own.values()) for own in sizes], ratio
            )
            return [dict.fromkeys(own, share) for own, share in zip(sizes, ratio_L, strict=True)]
        figures = [own.get(name) for own, there in zip(figures_by_block, sizes, strict=True) for name in there]
        each = iter(self.spread(figures, [size for own in sizes for size in own.values()], ratio))
        return [{name: next(each) for name in own} for own in sizes]

    def spread(self, figures: Sequence[float | None], size_L: Sequence[int], ratio: float) -> list[float]:
        """The ratio of every part (a block, a matrix) out of its one figure; as ``shares`` where some or all have none."""
        known = [figure for figure in figures if figure is not None]
        if not known or max(known) == min(known) or not sum(size_L):
            return [ratio] * len(figures)
        mean = math.fsum(known) / len(known)
        figure_L = [mean if figure is None else figure for figure in figures]
        most = max(MOST, (1 + ratio) / 2)
        return balance(self.wish_L(figure_L, size_L, ratio), size_L, ratio, [most] * len(size_L))


def from_0_to_1(value_L: Sequence[float]) -> list[float]:
    """Values moved and scaled so that the smallest is 0 and the largest 1; they are not all equal."""
    low, high = min(value_L), max(value_L)
    return [(value - low) / (high - low) for value in value_L]
