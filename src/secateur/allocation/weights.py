"""Which single weights leave, of those that the cut leaves, by their scores alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import torch

from secateur.recipe import Recipe
from secateur.removal.amount import Amount
from secateur.removal.masks import threshold_mask
from secateur.removal.selection import lowest_mask, with_best_beyond_price
from secateur.removal.threshold import exact_threshold


class WeightChooser:
    """Chooses masks, block by block in order: the ties at a global threshold are used up on the way.

    Every row keeps its highest weight, so that no threshold over the model empties a matrix of small weights.

    Args:
        all_scores: gives the scores of every block anew each time; for a threshold over the whole model.
    """

    def __init__(self, recipe: Recipe, all_scores: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._threshold: tuple[float, int] | None = None
        if recipe.masks_weights and recipe.within == "global":
            sizes = [tuple(score_OI.shape) for score_OI in all_scores()]
            most = sum(outputs * max(0, inputs - 1) for outputs, inputs in sizes)
            leaving = min(int(sum(map(prod, sizes)) * recipe.mask_ratio), most)
            self._threshold = (
                exact_threshold(lambda: map(with_best_beyond_price, all_scores()), leaving) if leaving else None
            )

    def mask(self, score_OI: torch.Tensor, amount: Amount | None, name: str) -> torch.Tensor:
        """What stays of one matrix.

        Args:
            amount: None leaves it to the threshold over the model.
            name: of the matrix, for messages.
        """
        if amount is not None:
            return lowest_mask(score_OI, amount, name)
        if self._threshold is None:
            return torch.ones_like(score_OI, dtype=torch.bool)
        mask_OI, ties = threshold_mask(with_best_beyond_price(score_OI), *self._threshold)
        self._threshold = self._threshold[0], ties
        return mask_OI


def surviving(values_OI: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What the cut leaves of a matrix; copied only where it takes something."""
    if len(rows) < values_OI.shape[0]:
        values_OI = values_OI.index_select(0, rows.to(values_OI.device))
    return values_OI.index_select(1, columns.to(values_OI.device)) if len(columns) < values_OI.shape[1] else values_OI
