"""Configs of a model with fewer blocks: the field that counts them and the lists that have an entry for each."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from secateur.checkpoint.skeleton import Skeleton, build_skeleton
from secateur.errors import ModelError, StructureError
from secateur.structure.cutting import ModelCut


def block_signature(block: nn.Module) -> Any:
    """How a block behaves beside its weights: its modules and every switch and word in them (no numbers)."""
    found = []
    for name, part in block.named_modules():
        switches = sorted(
            (key, value) for key, value in vars(part).items() if isinstance(value, bool | str) and key != "training"
        )
        found.append((name, type(part).__name__, tuple(switches)))
    return tuple(found)


def fields_without_blocks(skeleton: Skeleton, cut: ModelCut, fields: dict[str, Any]) -> dict[str, Any]:
    """The config fields for the blocks that ``cut`` keeps.

    Raises:
        StructureError: the family decides by their numbers what its blocks do, and cannot say it for those that stay.
    """
    kept, count = cut.kept(), len(cut.blocks)
    if len(kept) == count:
        return fields
    wanted = [block_signature(skeleton.blocks[index]) for index in kept]
    for counter in _counters(fields, count):
        for shorter in _ways(fields, counter, kept, count):
            config = type(skeleton.config)(**copy.deepcopy(shorter))
            config.architectures = list(skeleton.config.architectures or [type(skeleton.model).__name__])
            try:
                built = build_skeleton(config)
            except (ModelError, StructureError):
                continue
            if [block_signature(block) for block in built.blocks] == wanted:
                return shorter
    raise StructureError(
        f"{type(skeleton.config).__name__} decides by their numbers what its blocks do and cannot say it for those that "
        "this plan keeps; let other blocks leave"
    )


def _counters(fields: dict[str, Any], count: int) -> list[str]:
    """Fields that may count the blocks."""
    return [name for name, value in fields.items() if type(value) is int and value == count]


def _ways(fields: dict[str, Any], counter: str, kept: list[int], count: int) -> list[dict[str, Any]]:
    """The fields with fewer blocks: lists with an entry for each follow; so may lists and counts of block numbers."""
    shorter = {**fields, counter: len(kept)}
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == count:
            shorter[name] = [value[index] for index in kept]
    ways = [shorter]
    numbers = {
        name: [kept.index(index) for index in value if index in kept]
        for name, value in fields.items()
        if isinstance(value, list)
        and len(value) != count
        and value
        and all(type(v) is int and 0 <= v < count for v in value)
    }
    if numbers:
        ways.append(shorter | numbers)
    for name, value in fields.items():  # "the first k blocks are of another kind"
        if type(value) is int and 0 < value < count and name != counter:
            ways.append(shorter | {name: sum(index < value for index in kept)})
    return ways
