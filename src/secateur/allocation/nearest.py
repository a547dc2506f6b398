"""The even plan nearest to an uneven one: advice for people whose tools cannot load blocks of different sizes."""

from __future__ import annotations

import math

import torch

from secateur.allocation.pools import ShapesOf, leave_everywhere, pools_of
from secateur.allocation.uniform import lowest_units, uniform_amounts
from secateur.recipe import SPANNING
from secateur.removal.decision import model_cut
from secateur.structure import ModelCut, Structure, UnitGroup, parameters_per_unit


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

    def parameters(group: UnitGroup, units: int) -> int:
        return units * parameters_per_unit(group, shapes_of(group.block))

    gone = sum(parameters(group, len(units)) for group, units in removals)
    there = sum(parameters(group, group.count) for pool in pools for group in pool.groups)
    ratio = math.ceil(1000 * max(gone / there, max(1 / pool.size for pool in pools))) / 1000
    amounts = uniform_amounts(pools, ratio)
    chosen = {pool.key: lowest_units(pool, torch.zeros(pool.groups[0].count), amounts[pool.key]) for pool in pools}
    return kinds, ratio, model_cut(leave_everywhere(pools, chosen), len(cut.blocks))
