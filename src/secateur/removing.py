"""Taking out of one block what was chosen: masks, and new numbers where the removal gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.allocation.mask_amounts import MaskAmounts
from secateur.allocation.weights import WeightChooser, surviving
from secateur.checkpoint.biases import bias_of
from secateur.checkpoint.reader import Checkpoint
from secateur.console import log
from secateur.errors import ModelError
from secateur.finite import all_finite
from secateur.recipe import Recipe
from secateur.reconstruction import ChooseAgain, FittedBlock
from secateur.removal.decision import BlockDecision, Removals
from secateur.removal.methods import Removed, Task
from secateur.removal.spread import ScoreSpread, spread_of_weights
from secateur.scoring import BlockScorer
from secateur.statistics import InputStatistic, Statistic
from secateur.sweep import Passage
from secateur.workers import Workers


class Remover:
    """Decides what becomes of the matrices of one block after another.

    Args:
        weights: chooses by scores.
        amounts: how much leaves each matrix.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, weights: WeightChooser, amounts: MaskAmounts) -> None:
        self._checkpoint, self._recipe, self._weights, self._amounts = checkpoint, recipe, weights, amounts
        self._removal, self._criterion = recipe.parsed_removal(), recipe.parsed_criterion()

    def by_scores(self, index: int, removals: Removals, scores: Iterable[tuple[str, torch.Tensor]]) -> BlockDecision:
        """The decision for a block whose scores were kept: its weights are not here, so all is zeroed or cut."""
        decision = self._begin(index, removals)
        tensors = self._shapes(index)
        for name, score_OI in scores:
            rows, columns = decision.survivors(name, tensors)
            if len(rows):  # else the expert leaves as a whole
                amount = self._amounts.of(index, name, (len(rows), len(columns)))
                left_OI = surviving(score_OI, rows, columns)
                decision.masks[name] = self._weights.mask(left_OI, amount, self._full(index, name))
                decision.scores[name] = spread_of_weights(left_OI, decision.masks[name])
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
            removed = self._of_matrix(index, name, (rows, columns), scorer, kept_scores, decision.scores)
            if removed is None:
                continue
            if self._recipe.masks_weights:
                decision.masks[name] = removed.mask_OI
            if removed.weight_OI is not None:
                parameter = decision.matrices[name].parameter
                decision.numbers[name] = _stored(
                    self._checkpoint, index, name, parameter, removed.weight_OI, self._removal.name
                )
            if removed.shift_O is not None:
                bias, bias_O = self._shifted(index, decision, name, rows, removed.shift_O)
                decision.numbers[bias] = _stored(self._checkpoint, index, name, bias, bias_O, self._removal.name)
            for key, value in removed.notes.items():
                log.info("%s: %s %g.", self._full(index, name), key, value)
            decision.notes.update(_larger(decision.notes, removed.notes))
            scorer.forget(name)  # its statistics are as large as itself
        return decision

    def _begin(self, index: int, removals: Removals) -> BlockDecision:
        matrices = self._checkpoint.skeleton.prunable(index)
        return BlockDecision(removals, matrices=matrices if self._touches_weights else {})

    @property
    def _touches_weights(self) -> bool:
        return self._recipe.masks_weights or self._recipe.updates

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
        spreads: dict[str, ScoreSpread],
    ) -> Removed | None:
        """None where nothing changes but that rows and columns go."""
        matrix, (rows, columns) = scorer.matrix(name), survivors
        full = self._full(index, name)
        weight_OI = surviving(matrix.weight_OI, rows, torch.arange(matrix.weight_OI.shape[1])).float()
        fitted = None
        if self._removal.updates and len(columns) < weight_OI.shape[1]:
            fitted = self._removal.refit(full, weight_OI.clone(), columns.to(weight_OI.device), matrix.statistics)
        if not self._recipe.masks_weights:
            return fitted
        if fitted is not None and fitted.weight_OI is not None:
            weight_OI = fitted.weight_OI
        else:
            weight_OI = surviving(weight_OI, torch.arange(len(weight_OI)), columns)
            weight_OI = weight_OI.clone() if self._removal.updates else weight_OI
        amount = self._amounts.of(index, name, (len(rows), len(columns)))

        def choose() -> torch.Tensor:
            score_OI = scorer.weight_score(name) if kept_scores is None else kept_scores[name].to(weight_OI.device)
            left_OI = surviving(score_OI, rows, columns)
            mask_OI = self._weights.mask(left_OI, amount, full)
            spreads[name] = spread_of_weights(left_OI, mask_OI)
            return mask_OI

        task = Task(
            full,
            weight_OI,
            _selected(matrix.statistics, columns, matrix.weight_OI.shape[1]),
            amount,
            choose,
            self._criterion.adaptive and kept_scores is None,
        )
        removed = self._removal.remove(task)
        return removed if fitted is None else _after_cut(removed, fitted)

    def _shifted(
        self, index: int, decision: BlockDecision, name: str, rows: torch.Tensor, shift_O: torch.Tensor
    ) -> tuple[str, torch.Tensor]:
        """The bias of a matrix, its name and what it becomes: as stored, as far as the cut leaves it, and moved."""
        bias = bias_of(self._checkpoint.skeleton.blocks[index], decision.matrices[name])
        assert bias is not None  # the model was opened with every bias that may be written
        full = self._full(index, bias)
        return bias, self._checkpoint.read([full])[full][rows].double() + shift_O.cpu()


def _after_cut(removed: Removed, fitted: Removed) -> Removed:
    """What has become of a matrix that was cut, and then masked: shifts add up."""
    shift_O = removed.shift_O
    if shift_O is not None and fitted.shift_O is not None:
        shift_O = shift_O + fitted.shift_O
    return replace(removed, shift_O=shift_O, notes=_larger(removed.notes, fitted.notes))


def _larger(known: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Figures put together; of one that is told twice the larger stays."""
    return {**known, **{key: max(value, known.get(key, value)) for key, value in more.items()}}


def reconstruct(
    checkpoint: Checkpoint,
    recipe: Recipe,
    index: int,
    block: nn.Module,
    decision: BlockDecision,
    passage: Passage,
    choose_again: ChooseAgain | None,
) -> tuple[BlockDecision, dict[str, torch.Tensor]]:
    """Fit what ``decision`` leaves of a block.

    Args:
        block: dense, in memory.

    Returns:
        the decision with its new numbers, and the block's tensors in dense shapes, as later blocks see them.
    """
    method = recipe.parsed_reconstruction()
    assert method is not None
    fitted = FittedBlock(block, decision)
    notes = method.fit(fitted, passage, recipe.seed + index, choose_again)
    decision = fitted.decision
    if not notes:  # nothing was fitted
        return decision, fitted.finished()
    for name, weight_OI in fitted.numbers():
        parameter = decision.matrices[name].parameter
        decision.numbers[name] = _stored(checkpoint, index, name, parameter, weight_OI, method.name)
    for key, value in notes.items():
        decision.notes[key] = value
    return decision, fitted.finished()


def _stored(checkpoint: Checkpoint, index: int, name: str, parameter: str, new: torch.Tensor, by: str) -> torch.Tensor:
    """New numbers in the dtype that the checkpoint has, which is what the next block sees."""
    prefix = checkpoint.skeleton.block_prefix(index)
    stored = new.to(checkpoint.tensors[prefix + parameter].dtype)
    if not all_finite(stored):
        raise ModelError(
            f"{by} gives new numbers for '{prefix}{name}' that are not finite in {stored.dtype}; "
            "give more --windows, or other options of it"
        )
    return stored


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


def share_among(
    workers: Workers, checkpoint: Checkpoint, decision: BlockDecision, index: int, names: Sequence[str]
) -> None:
    """Each worker has decided over some of the matrices ``names``; all get all masks, new numbers and notes."""
    if workers.size == 1 or not names:
        return
    prefix = checkpoint.skeleton.block_prefix(index)
    device = next(iter(checkpoint.skeleton.blocks[index].state_dict().values())).device
    masks, numbers = dict(decision.masks), dict(decision.numbers)
    biases = [bias_of(checkpoint.skeleton.blocks[index], decision.matrices[name]) for name in names]
    owners = {name: place % workers.size for place, name in enumerate(names)}
    owners |= {bias: place % workers.size for place, bias in enumerate(biases) if bias}
    made = workers.all(
        {n: (n in masks, n in numbers, tuple((masks.get(n, numbers.get(n, NOTHING))).shape)) for n in owners}
    )
    for name, owner in owners.items():
        has_mask, has_numbers, shape = made[owner][name]
        if has_mask:
            bits = masks[name].to("cpu", torch.uint8) if name in masks else torch.zeros(shape, dtype=torch.uint8)
            workers.hand_round(bits, owner)
            masks[name] = bits.bool().to(device)
        if has_numbers:
            matrix = decision.matrices.get(name)
            stored = checkpoint.tensors[prefix + (matrix.parameter if matrix else name)].dtype
            whole = numbers[name].float().cpu() if name in numbers else torch.zeros(shape)
            workers.hand_round(whole, owner)  # float32 holds every stored number exactly
            numbers[name] = whole.to(stored).to(device)
    for target, found in ((decision.masks, masks), (decision.numbers, numbers)):
        target.clear()
        target.update((name, found[name]) for name in owners if name in found)
    for notes in workers.all(dict(decision.notes)):
        decision.notes.update(_larger(decision.notes, notes))
    for scores in workers.all(dict(decision.scores)):
        decision.scores.update(scores)


NOTHING = torch.zeros(0)
"""Stands for what a worker does not have."""
