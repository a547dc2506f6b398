"""Taking out of one block what was chosen: masks, and new numbers where the removal gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from secateur.allocation.mask_amounts import MaskAmounts
from secateur.allocation.weights import WeightChooser, surviving
from secateur.checkpoint.reader import Checkpoint
from secateur.console import log
from secateur.errors import ModelError
from secateur.finite import all_finite
from secateur.recipe import Recipe
from secateur.removal.decision import BlockDecision, Removals
from secateur.removal.methods import Removed, Task
from secateur.scoring import BlockScorer
from secateur.statistics import InputStatistic, Statistic


class Remover:
    """Decides what becomes of the matrices of one block after another.

    Args:
        weights: chooses by scores.
        amounts: how much leaves each matrix.

    Attributes:
        notes: figures that removals gave, the largest of each over the whole model.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, weights: WeightChooser, amounts: MaskAmounts) -> None:
        self._checkpoint, self._recipe, self._weights, self._amounts = checkpoint, recipe, weights, amounts
        self._removal, self._criterion = recipe.parsed_removal(), recipe.parsed_criterion()
        self.notes: dict[str, float] = {}

    def by_scores(self, index: int, removals: Removals, scores: Iterable[tuple[str, torch.Tensor]]) -> BlockDecision:
        """The decision for a block whose scores were kept: its weights are not here, so all is zeroed or cut."""
        decision = self._begin(index, removals)
        tensors = self._shapes(index)
        for name, score_OI in scores:
            rows, columns = decision.survivors(name, tensors)
            if len(rows):  # else the expert leaves as a whole
                amount = self._amounts.of(index, name, (len(rows), len(columns)))
                decision.masks[name] = self._weights.mask(
                    surviving(score_OI, rows, columns), amount, self._full(index, name)
                )
        return decision

    def in_block(
        self,
        index: int,
        removals: Removals,
        scorer: BlockScorer,
        names: Iterable[str],
        kept_scores: Mapping[str, torch.Tensor] | None = None,
    ) -> BlockDecision:
        """The decision for a block whose weights and statistics are here, one matrix of ``names`` after the other.

        Args:
            kept_scores: of the block, where they were made before.
        """
        decision = self._begin(index, removals)
        tensors = self._shapes(index)
        for name in names:
            rows, columns = decision.survivors(name, tensors)
            if not len(rows):
                continue
            removed = self._of_matrix(index, name, (rows, columns), scorer, kept_scores)
            if removed is None:
                continue
            if self._recipe.masks_weights:
                decision.masks[name] = removed.mask_OI
            if removed.weight_OI is not None:
                decision.numbers[name] = self._stored(index, name, removed.weight_OI)
            for key, value in removed.notes.items():
                self._note(key, value, self._full(index, name))
            scorer.forget(name)  # its statistics are as large as itself
        return decision

    def _begin(self, index: int, removals: Removals) -> BlockDecision:
        matrices = self._checkpoint.skeleton.prunable(index)
        return BlockDecision(removals, matrices=matrices if self._touches_weights else {})

    @property
    def _touches_weights(self) -> bool:
        return self._recipe.masks_weights or self._removal.updates

    def _shapes(self, index: int) -> Mapping[str, torch.Tensor]:
        return self._checkpoint.skeleton.blocks[index].state_dict()

    def _full(self, index: int, name: str) -> str:
        return self._checkpoint.skeleton.block_prefix(index) + name

    def _of_matrix(
        self,
        index: int,
        name: str,
        survivors: tuple[torch.Tensor, torch.Tensor],
        scorer: BlockScorer,
        kept_scores: Mapping[str, torch.Tensor] | None,
    ) -> Removed | None:
        """None where nothing changes but that rows and columns go."""
        matrix, (rows, columns) = scorer.matrix(name), survivors
        weight_OI = surviving(matrix.weight_OI, rows, torch.arange(matrix.weight_OI.shape[1])).float()
        fitted = None
        if self._removal.updates and len(columns) < weight_OI.shape[1]:
            fitted = self._removal.refit(weight_OI.clone(), columns.to(weight_OI.device), matrix.statistics)
        if not self._recipe.masks_weights:
            return fitted
        if fitted is not None and fitted.weight_OI is not None:
            weight_OI = fitted.weight_OI
        else:
            weight_OI = surviving(weight_OI, torch.arange(len(weight_OI)), columns)
            weight_OI = weight_OI.clone() if self._removal.updates else weight_OI
        full, amount = self._full(index, name), self._amounts.of(index, name, (len(rows), len(columns)))

        def choose() -> torch.Tensor:
            score_OI = scorer.weight_score(name) if kept_scores is None else kept_scores[name].to(weight_OI.device)
            return self._weights.mask(surviving(score_OI, rows, columns), amount, full)

        task = Task(
            full,
            weight_OI,
            _selected(matrix.statistics, columns, matrix.weight_OI.shape[1]),
            amount,
            choose,
            self._criterion.adaptive and kept_scores is None,
        )
        return self._removal.remove(task)

    def _stored(self, index: int, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """New numbers in the dtype that the checkpoint has, which is what the next block sees."""
        parameter = self._checkpoint.skeleton.prunable(index)[name].parameter
        stored = weight_OI.to(self._checkpoint.tensors[self._full(index, parameter)].dtype)
        if not all_finite(stored):
            raise ModelError(
                f"{self._removal.name} gives new weights of '{self._full(index, name)}' that are not finite in {stored.dtype}; "
                "give more --windows, or a larger dampening"
            )
        return stored

    def _note(self, key: str, value: float, name: str) -> None:
        if value > self.notes.get(key, float("-inf")):
            log.info("%s: %s %g.", name, key, value)
            self.notes[key] = value


def _selected(
    statistics: Mapping[type[Statistic], Any], columns: torch.Tensor, inputs: int
) -> dict[type[Statistic], Statistic]:
    """Statistics of the inputs that are left."""
    if len(columns) == inputs:
        return dict(statistics)
    return {
        kind: found.select(columns.to(found.known().device)) if isinstance(found, InputStatistic) else found
        for kind, found in statistics.items()
    }
