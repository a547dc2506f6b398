"""Several cuts, one after the other, as one cut in the dense model's own numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from secateur.removal.decision import Removals, model_cut
from secateur.structure import OUTSIDE, Structure, UnitGroup


def compose(structure: Structure, first: Mapping[int, Removals], second: Mapping[int, Removals]) -> dict[int, Removals]:
    """What leaves altogether.

    Args:
        structure: the dense model's units.
        first: what left the dense model, by block.
        second: what then left the cut model, in its own numbers of blocks and units.
    """
    blocks = next(group.count for group in structure.units if group.kind == "block")
    kept = model_cut(first, blocks).kept()
    together: dict[int, Removals] = {OUTSIDE: list(first.get(OUTSIDE, []))} | {i: list(first.get(i, [])) for i in kept}
    for number, removals in second.items():
        block = number if number == OUTSIDE else kept[number]
        together[block] = _compose_block(structure.of_block(block), first.get(block, []), removals)
    dropped = model_cut(together, blocks).dropped
    return {block: removals for block, removals in together.items() if removals and block not in dropped}


def _compose_block(groups: list[UnitGroup], first: Removals, second: Removals) -> Removals:
    dense = {(group.kind, group.module): group for group in groups}
    removed = {(group.kind, group.module): set(units) for group, units in first}
    for group, units in second:
        key = group.kind, group.module
        left = _left(dense[key], first)
        removed.setdefault(key, set()).update(left[unit] for unit in units)
    return [(dense[key], _evened(dense[key], units, first)) for key, units in removed.items()]


def _left(group: UnitGroup, removals: Removals) -> list[int]:
    """The units of ``group`` that the cut model still has, in its order: its unit i is the i-th of them.

    Others take some along: query heads leave with their KV head.
    """
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for other, units in removals:
        if other.kind == group.kind and other.module == group.module and not group.members:
            return [unit for unit in range(group.count) if unit not in units]  # whole blocks
        for member in other.members:
            gone.setdefault((member.parameter, member.dim), []).append(member.index_UC[list(units)].reshape(-1))
    alive_U = np.full(group.count, not group.members)
    for member in group.members:
        indices = np.concatenate([np.empty(0, dtype=np.int64), *gone.get((member.parameter, member.dim), [])])
        alive_U |= ~np.isin(member.index_UC, indices).all(axis=1)
    return np.flatnonzero(alive_U).tolist()


def _evened(group: UnitGroup, units: set[int], first: Removals) -> list[int]:
    """Of families that left as a whole name as many units as of the others: a plan takes equal numbers from each."""
    size = group.count // group.families
    families = [range(family * size, (family + 1) * size) for family in range(group.families)]
    most = max(len(units & set(family)) for family in families)
    alive = set(_left(group, [removal for removal in first if removal[0].kind != group.kind]))
    result = set(units)
    for family in families:
        if not alive & set(family):
            spare = [unit for unit in family if unit not in units]
            result.update(spare[: most - len(units & set(family))])
    return sorted(result)
