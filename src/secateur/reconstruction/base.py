"""The contract of a reconstruction: how the weights that stay in a block make good what left it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from secateur.options import Named
from secateur.reconstruction.fitted import FittedBlock
from secateur.removal.decision import BlockDecision
from secateur.sweep import Passage

FIT_ERRORS = ("error_before", "error_after")
"""What a fit tells of a block: how far it was from its target before and after, as the method counts it."""

ChooseAgain = Callable[[], BlockDecision]
"""Chooses the block's masks once more, by the weights that are in the block when it is called."""


class Reconstruction(Named, ABC):
    """Fits the weights that are left of one block, after the removal; what left stays zero.

    Attributes:
        follows_dense: whether it fits to what the dense model gives after this block; otherwise to what the dense block
            gives for the inputs that pruned blocks before it give.
        dense_inputs: whether it reads what enters the block in the dense model; for those that follow it.
        rechooses: whether it has masks chosen anew on the way.
    """

    flag = "reconstruct"
    follows_dense: ClassVar[bool] = True
    rechooses: ClassVar[bool] = False

    @property
    def dense_inputs(self) -> bool:
        return False

    @abstractmethod
    def fit(
        self, fitted: FittedBlock, passage: Passage, seed: int, choose_again: ChooseAgain | None = None
    ) -> Mapping[str, float]:
        """Change ``fitted``'s weights in place; returns ``FIT_ERRORS``, or nothing where nothing could be fitted.

        Args:
            passage: what enters the block, and what it is fitted to.
            seed: of the order of windows.
            choose_again: given to those that ``rechooses``, where single weights left.
        """

    @property
    @abstractmethod
    def forwards(self) -> float:
        """About what it costs, in plain runs of the block over all windows: a run back counts as two."""
