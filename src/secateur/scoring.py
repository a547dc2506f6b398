"""Scores of one block: of its single weights, of its units, or of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from secateur.checkpoint.matrices import in_own_layout
from secateur.checkpoint.skeleton import Skeleton
from secateur.criteria.base import Criterion, Matrix
from secateur.criteria.units import unit_scores
from secateur.errors import RecipeError
from secateur.recipe import Recipe
from secateur.statistics import BlockStatistics
from secateur.structure import UnitGroup

WEIGHTS = "weights."


def unit_key(group: UnitGroup) -> str:
    """The name under which a group's scores are stored in its block."""
    return f"{group.kind}.{group.module}"


def weight_scores(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a block's scores those of single weights, by parameter name."""
    return {name.removeprefix(WEIGHTS): score for name, score in sorted(scores.items()) if name.startswith(WEIGHTS)}


def block_scores(
    skeleton: Skeleton,
    index: int,
    block: nn.Module,
    statistics: BlockStatistics,
    recipe: Recipe,
    groups: Sequence[UnitGroup],
) -> dict[str, torch.Tensor]:
    """Everything that choosing in this block needs.

    Args:
        block: with its weights in memory.
        groups: the units to score.

    Raises:
        RecipeError: a score is not finite, or units hold nothing that has one.
    """
    criterion = recipe.parsed_criterion()
    scores: dict[str, torch.Tensor] = {}
    matrices, parameters = skeleton.prunable(index), dict(block.named_parameters())
    seen = {
        name: Matrix(
            skeleton.block_prefix(index) + name, kept.of(parameters).detach(), statistics.get(name, {}), recipe.seed
        )
        for name, kept in matrices.items()
    }
    if recipe.masks_weights:
        for name, matrix in seen.items():
            scores[WEIGHTS + name] = criterion.weight_score_OI(matrix)
    if recipe.cut_kinds:
        contributions = in_own_layout(matrices, {name: criterion.score_OI(matrix) for name, matrix in seen.items()})
        for group in groups:
            scores[unit_key(group)] = _of_group(group, contributions, criterion, recipe.reduce)
        if "block" in recipe.cut_kinds:
            scores["block"] = _of_block(contributions, criterion)
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise RecipeError(
                f"{criterion} gives scores that are not finite in block {index} ({name}); choose smaller options"
            )
    return scores


def _of_group(
    group: UnitGroup, contributions: Mapping[str, torch.Tensor], criterion: Criterion, reduce: str
) -> torch.Tensor:
    """Scores of a group's units; of packed matrices (experts) every slice along the unit's dimension is a row."""
    flat: dict[str, torch.Tensor] = {}
    members = []
    for member in group.members:
        contribution = contributions.get(member.parameter)
        if contribution is not None and contribution.dim() > 2:
            name = f"{member.parameter}@{member.dim}"
            flat[name] = contribution.movedim(member.dim, 0).flatten(1)
            member = replace(member, parameter=name, dim=0)
        members.append(member)
    if not any(member.parameter in contributions or member.parameter in flat for member in members):
        raise RecipeError(
            f"the '{group.kind}' units in {group.module} hold no matrix, so there is nothing to score them by"
        )
    return unit_scores(replace(group, members=tuple(members)), {**contributions, **flat}, criterion, reduce)


def _of_block(contributions: Mapping[str, torch.Tensor], criterion: Criterion) -> torch.Tensor:
    """A block is worth what its matrices contribute, ``()`` float64."""
    rows = [criterion.channel_score(part.double().flatten(1), 0).sum() for part in contributions.values()]
    return torch.stack(rows).sum()
