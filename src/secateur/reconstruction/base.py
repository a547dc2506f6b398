"""The contract of a reconstruction: how the weights that stay in a block make good what left it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from secateur.options import Named
from secateur.reconstruction.fitted import FittedBlock
from secateur.sweep import Passage


class Reconstruction(Named, ABC):
    """Fits the weights that are left of one block, after the removal; what left stays zero."""

    flag = "reconstruct"

    @abstractmethod
    def fit(self, fitted: FittedBlock, passage: Passage, seed: int) -> Mapping[str, float]:
        """Change ``fitted``'s weights in place; returns figures worth telling, by name.

        Args:
            passage: what enters the block, and what the dense model gives there.
            seed: of the order of windows.
        """

    @property
    @abstractmethod
    def forwards(self) -> float:
        """About what it costs, in plain runs of the block over all windows: a run back counts as two."""
