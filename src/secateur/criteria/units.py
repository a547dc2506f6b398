"""From scores of weights to scores of units: one place, for every criterion and every kind of unit."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import torch

from secateur.criteria.base import Criterion
from secateur.structure.units import UnitGroup


def unit_scores(
    group: UnitGroup, contributions: Mapping[str, torch.Tensor], criterion: Criterion, reduce: str = "sum"
) -> torch.Tensor:
    """Score every unit of ``group``, ``(U,)`` float64.

    Each member that the criterion counts gives one score for each channel of the unit (its row, its column, its slice of packed experts); channels that belong together
    (a query head's with its KV head's) are added up, the members are reduced channel by channel, and a unit is the sum
    of its channels (methods §14.2: "a head's score = sum of its head_dim channels'"). Grouped query heads are paired
    with the KV head they read, not with strided ones (methods §14.6).

    Args:
        contributions: ``score_OI`` by parameter name, in the parameter's own layout; members without one (biases, norms,
            routers) carry no score, and where none has one the units are worth nothing here.
        reduce: over the members: sum, mean, max, prod, first (the root) or last (the end of the chain).
    """
    channels_of_members = []
    for member in criterion.counted(group):
        if member.parameter in contributions:
            channels = criterion.channel_score(contributions[member.parameter], member.dim)
            channels_of_members.append(channels[torch.as_tensor(member.index_UC)])
    if not channels_of_members:
        return torch.zeros(group.count, dtype=torch.float64)
    if reduce == "first":
        return channels_of_members[0].sum(dim=1)
    if reduce == "last":
        return channels_of_members[-1].sum(dim=1)
    common = gcd(*(channels.shape[1] for channels in channels_of_members))  # fused projections: 6 and 4 heads' rows
    aligned_MUC = torch.stack([c.reshape(c.shape[0], -1, common).sum(dim=1) for c in channels_of_members])
    match reduce:
        case "sum":
            reduced_UC = aligned_MUC.sum(dim=0)
        case "mean":
            reduced_UC = aligned_MUC.mean(dim=0)
        case "max":
            reduced_UC = aligned_MUC.amax(dim=0)
        case "prod":
            reduced_UC = aligned_MUC.prod(dim=0)
        case _:
            raise ValueError(f"no reduction {reduce}")
    return reduced_UC.sum(dim=1)
