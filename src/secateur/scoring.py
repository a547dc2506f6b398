"""Scores of one block: of its single weights, of its units, or of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from secateur.checkpoint.matrices import BlockMatrices, in_own_layout
from secateur.checkpoint.skeleton import Skeleton
from secateur.criteria.base import Criterion, Matrix
from secateur.criteria.units import unit_scores
from secateur.errors import RecipeError
from secateur.finite import all_finite
from secateur.recipe import Recipe
from secateur.statistics import BLOCK, BlockStatistics
from secateur.structure import UnitGroup

WEIGHTS = "weights."


def unit_key(group: UnitGroup) -> str:
    """The name under which a group's scores are stored in its block."""
    return f"{group.kind}.{group.module}"


def weight_scores(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a block's scores those of single weights, by parameter name."""
    return {name.removeprefix(WEIGHTS): score for name, score in sorted(scores.items()) if name.startswith(WEIGHTS)}


class BlockScorer:
    """What one block's weights and units are worth, each matrix's score made when it is asked for.

    A score is as large as its matrix in float32, so at most one or two exist at once.

    Args:
        block: with its weights in memory; statistics are brought to where they are.

    Raises:
        RecipeError: a score is not finite, or units hold nothing that has one.
    """

    def __init__(
        self, skeleton: Skeleton, index: int, block: nn.Module, statistics: BlockStatistics, recipe: Recipe
    ) -> None:
        self.matrices, self._index, self._recipe = skeleton.prunable(index), index, recipe
        self._criterion, self._statistics = recipe.parsed_criterion(), statistics
        self._parameters, self._prefix = dict(block.named_parameters()), skeleton.block_prefix(index)

    def of_weights(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The scores ``(O, I)`` of single weights, matrix by matrix: all, or those of ``names``."""
        for name in self.matrices if names is None else names:
            yield name, self.weight_score(name)

    def weight_score(self, name: str) -> torch.Tensor:
        """The score ``(O, I)`` of one matrix's single weights."""
        return self._checked(name, self._criterion.weight_score_OI(self.matrix(name)))

    def forget(self, name: str) -> None:
        """Let go of what was gathered on a matrix that nobody asks about any more."""
        self._statistics.pop(name, None)

    def of_units(self, groups: Sequence[UnitGroup]) -> dict[str, torch.Tensor]:
        """The scores ``(U,)`` of each group's units, and of the block as a whole where blocks may leave."""
        contributions = _Contributions(self.matrices, lambda name: self._criterion.score_OI(self.matrix(name)))
        scores = {
            unit_key(group): _of_group(group, contributions, self._criterion, self._recipe.reduce) for group in groups
        }
        if "block" in self._recipe.cut_kinds:
            scores["block"] = self._criterion.block_score(self._statistics.get(BLOCK, {}), contributions)
        return {name: self._checked(name, score.cpu()) for name, score in scores.items()}

    def everything(self, groups: Sequence[UnitGroup]) -> dict[str, torch.Tensor]:
        """All that choosing in this block may need, to be kept."""
        units = self.of_units(groups) if self._recipe.cut_kinds else {}
        weights = self.of_weights() if self._recipe.masks_weights else ()
        return {WEIGHTS + name: score.cpu() for name, score in weights} | units

    def matrix(self, name: str) -> Matrix:
        """A matrix with what was gathered on it."""
        weight_OI = self.matrices[name].of(self._parameters).detach()
        gathered = {kind: found.to(weight_OI.device) for kind, found in self._statistics.get(name, {}).items()}
        return Matrix(self._prefix + name, weight_OI, gathered, self._recipe.seed)

    def _checked(self, name: str, score: torch.Tensor) -> torch.Tensor:
        if not all_finite(score):
            raise RecipeError(
                f"{self._criterion} gives scores that are not finite in block {self._index} ({name}); "
                "choose smaller options, or another criterion: the model's numbers may overflow"
            )
        return score


class _Contributions(Mapping[str, torch.Tensor]):
    """By parameter, in its own layout, what its weights contribute: made when asked for, and only the last one kept."""

    def __init__(self, matrices: BlockMatrices, score: Callable[[str], torch.Tensor]) -> None:
        self._matrices, self._score = matrices, score
        self._names = dict.fromkeys(matrix.parameter for matrix in matrices.values())
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, parameter: str) -> torch.Tensor:
        if parameter not in self._names:
            raise KeyError(parameter)
        if self._last is None or self._last[0] != parameter:
            self._last = None
            own = {name: matrix for name, matrix in self._matrices.items() if matrix.parameter == parameter}
            self._last = parameter, in_own_layout(own, {name: self._score(name) for name in own})[parameter]
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._names


def _of_group(
    group: UnitGroup, contributions: Mapping[str, torch.Tensor], criterion: Criterion, reduce: str
) -> torch.Tensor:
    """Scores of a group's units."""
    if not any(member.parameter in contributions for member in criterion.counted(group)):
        raise RecipeError(
            f"the '{group.kind}' units in {group.module} hold no matrix, so there is nothing to score them by"
        )
    return unit_scores(group, contributions, criterion, reduce)
