"""Which single weights leave, of those that the cut leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from secateur.recipe import Recipe
from secateur.removal.decision import BlockDecision
from secateur.removal.masks import layer_mask, n_of_m_mask, row_mask, threshold_mask
from secateur.removal.threshold import exact_threshold

Scores = Iterable[tuple[str, torch.Tensor]]
"""Of one block's matrices, with their names; each may be made when it is asked for."""


class WeightChooser:
    """Chooses masks, block by block in order: the ties at a global threshold are used up on the way.

    Args:
        all_scores: gives the scores of every block anew each time; for a threshold over the whole model.
    """

    def __init__(self, recipe: Recipe, all_scores: Callable[[], Iterable[torch.Tensor]]) -> None:
        self.recipe = recipe
        self._threshold: tuple[float, int] | None = None
        if recipe.masks_weights and recipe.within == "global":
            leaving = int(sum(chunk.numel() for chunk in all_scores()) * recipe.mask_ratio)
            self._threshold = exact_threshold(all_scores, leaving) if leaving else None

    def mask(self, decision: BlockDecision, scores: Scores, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Add masks to a block's decision.

        Args:
            tensors: the block's, for their shapes.
            prefix: stands before the block's names in messages.
        """
        for name, score_OI in scores:
            rows, columns = decision.survivors(name, tensors)
            if len(rows):  # else the expert leaves as a whole
                decision.masks[name] = self._mask(_surviving(score_OI, rows, columns), prefix + name)

    def _mask(self, score_OI: torch.Tensor, name: str) -> torch.Tensor:
        pattern = self.recipe.n_of_m
        if pattern:
            return n_of_m_mask(score_OI, pattern.keep, pattern.group, name)
        if self.recipe.within == "row":
            return row_mask(score_OI, self.recipe.mask_ratio)
        if self.recipe.within == "layer":
            return layer_mask(score_OI, self.recipe.mask_ratio)
        if self._threshold is None:
            return torch.ones_like(score_OI, dtype=torch.bool)
        mask_OI, ties = threshold_mask(score_OI, *self._threshold)
        self._threshold = self._threshold[0], ties
        return mask_OI


def _surviving(score_OI: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The scores of what the cut leaves; copied only where it takes something."""
    if len(rows) < score_OI.shape[0]:
        score_OI = score_OI.index_select(0, rows)
    return score_OI.index_select(1, columns) if len(columns) < score_OI.shape[1] else score_OI
