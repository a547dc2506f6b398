"""The same share from every block: what every family's own config can say."""

from __future__ import annotations

import torch

from secateur.structure.units import UnitGroup


def uniform_units(group: UnitGroup, score_U: torch.Tensor, ratio: float) -> list[int]:
    """The ``int(count * ratio)`` lowest units of one group, ascending; rounded down as published codes do.

    Units that come in families (query heads of a KV group) leave every family in equal number, each its own lowest.
    Of equal scores the lower index leaves first.
    """
    size = group.count // group.families
    leaving = int(size * ratio)
    order_FS = torch.sort(score_U.reshape(group.families, size), dim=1, stable=True).indices
    first_F1 = torch.arange(group.families)[:, None] * size
    return sorted((order_FS[:, :leaving] + first_F1).reshape(-1).tolist())
