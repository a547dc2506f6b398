"""One ranking over the whole model: blocks that matter less give more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.structure.units import UnitGroup


def global_units(
    groups: Sequence[UnitGroup], scores: Sequence[torch.Tensor], parameters: Sequence[int], ratio: float
) -> list[list[int]]:
    """Choose over all groups at once the units whose loss costs least a parameter.

    Scores are divided by the parameters a unit holds, so that heads and channels can be compared (the published code
    compares them raw, methods §14.3). Units leave, lowest first, as long as the parameters gone stay within ``ratio`` of
    all parameters that the groups hold. Every group keeps at least one unit.

    Args:
        scores: ``(U,)`` a group.
        parameters: how many parameters one unit of each group holds.

    Returns:
        for each group the units that leave, ascending.
    """
    budget = int(ratio * sum(group.count * each for group, each in zip(groups, parameters, strict=True)))
    score = torch.cat([s.double() / each for s, each in zip(scores, parameters, strict=True)])
    owner = torch.cat([torch.full((group.count,), number) for number, group in enumerate(groups)])
    unit = torch.cat([torch.arange(group.count) for group in groups])
    removed: list[list[int]] = [[] for _ in groups]
    for position in torch.sort(score, stable=True).indices.tolist():
        number = int(owner[position])
        if parameters[number] > budget or len(removed[number]) + 1 >= groups[number].count:
            continue
        budget -= parameters[number]
        removed[number].append(int(unit[position]))
    return [sorted(units) for units in removed]
