"""The even plan nearest to an uneven one: advice for people whose tools cannot load blocks of different sizes."""

from __future__ import annotations

import math

import torch

from secateur.allocation.pools import Pool, ShapesOf, leave_everywhere, pools_of
from secateur.allocation.uniform import leaving, lowest_units
from secateur.removal.decision import model_cut
from secateur.structure import ModelCut, Structure, parameters_per_unit

SPANNING = ("hidden", "block")
"""Kinds that leave the model as a whole, evenly whatever the plan."""


def nearest_even_cut(
    structure: Structure, cut: ModelCut, shapes_of: ShapesOf
) -> tuple[list[str], float, ModelCut] | None:
    """The share of every block that takes as many parameters as ``cut``, and at least one unit of each kind.

    Returns:
        the kinds, the ratio, and a cut of that ratio (which units leave is left open); None where ``cut`` takes nothing that
        could leave every block.
    """
    removals = [removal for block in cut.blocks for removal in block if removal[1] and removal[0].kind not in SPANNING]
    kinds = list(dict.fromkeys(group.kind for group, _ in removals))
    pools = [pool for kind in kinds for pool in pools_of(structure, kind, range(len(cut.blocks)))]
    if not pools:
        return None

    def parameters(units: list[tuple]) -> int:
        return sum(number * parameters_per_unit(group, shapes_of(group.block)) for group, number in units)

    gone = parameters([(group, len(units)) for group, units in removals])
    there = parameters([(pool.groups[0], pool.groups[0].count) for pool in pools])
    ratio = math.ceil(1000 * max(gone / there, max(1 / pool.size for pool in pools))) / 1000
    return kinds, ratio, _even_cut(pools, ratio, len(cut.blocks))


def _even_cut(pools: list[Pool], ratio: float, blocks: int) -> ModelCut:
    equal = {pool.key: torch.zeros(pool.groups[0].count) for pool in pools}
    chosen = {pool.key: lowest_units(pool, equal[pool.key], leaving(pool, ratio)) for pool in pools}
    return model_cut(leave_everywhere(pools, chosen), blocks)
