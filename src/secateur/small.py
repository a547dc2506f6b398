"""A small instance of the very config at hand: as many heads and experts, narrower, one block of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from secateur.checkpoint.depth import block_signature, fields_without_blocks
from secateur.checkpoint.fields import Family, built_family
from secateur.checkpoint.shapes import plain_fields
from secateur.checkpoint.skeleton import Skeleton
from secateur.errors import StructureError
from secateur.structure import ModelCut, Structure, UnitGroup, find_all_units

HEAD_WIDTH = 8
VOCABULARY = 96
NARROW = 32
"""Fields below this are left alone: they are cheap, and are often counts or settings."""
MOST_PARAMETERS = 200_000_000


@dataclass(frozen=True)
class SmallModel:
    """A model of the same family with random weights in memory.

    Attributes:
        skeleton: the small model; its parameters are real and hold random numbers.
        structure: its units.
        stands_for: for each of its blocks, the number of the large model's block that it stands for.
    """

    skeleton: Skeleton
    structure: Structure
    stands_for: tuple[int, ...]


def small_model(skeleton: Skeleton, structure: Structure) -> SmallModel:
    """Build a small instance of ``skeleton``'s config.

    Raises:
        StructureError: none could be made whose units are those of the large model.
    """
    kept = _one_of_each(skeleton)
    fields = _shallow_fields(skeleton, kept)
    fields = fields | _small_vocabulary(fields)
    for factor in _factors(structure):
        narrow = fields | _narrow(fields, factor, _counts(structure) | {len(kept), len(skeleton.blocks)})
        found = _built(skeleton, narrow)
        if found is None:
            continue
        try:
            units = find_all_units(found.model, found.blocks_name)
        except StructureError:
            continue
        if _outline(units, range(len(kept))) == _outline(structure, kept) or factor == 1:
            _check_size(found)
            _fill(found)
            return SmallModel(found, units, tuple(kept))
    raise StructureError(
        f"no small instance of {type(skeleton.config).__name__} has the units of the large one, so they cannot be proved"
    )


def _one_of_each(skeleton: Skeleton) -> list[int]:
    """The first block of each kind, and one more where there is but one kind: units of two blocks must not mix."""
    shapes = [tuple(sorted(skeleton.block_shapes(index).items())) for index in range(len(skeleton.blocks))]
    kinds = [(block_signature(block), shape) for block, shape in zip(skeleton.blocks, shapes, strict=True)]
    first = [index for index, kind in enumerate(kinds) if kinds.index(kind) == index]
    others = [index for index in range(len(kinds)) if index not in first]
    return sorted(first + others[: max(0, 3 - len(first))])[:MOST_KINDS]


MOST_KINDS = 8
"""An uneven model may have as many kinds of blocks as blocks; a small instance is built in the family's own sizes anyway."""


def _shallow_fields(skeleton: Skeleton, kept: Sequence[int]) -> dict[str, Any]:
    count = len(skeleton.blocks)
    cut = ModelCut(((),) * count, dropped=tuple(index for index in range(count) if index not in kept))
    return fields_without_blocks(skeleton, cut, plain_fields(skeleton.config))


def _small_vocabulary(fields: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {"vocab_size": VOCABULARY} if "vocab_size" in fields else {}
    for name, value in fields.items():
        if (name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY) or (
            name.endswith("token_id") and isinstance(value, list)
        ):
            small[name] = VOCABULARY - 1
    return small


def _counts(structure: Structure) -> set[int]:
    """Numbers of heads, groups and experts: a small instance keeps them."""
    counted = [group for group in structure.units if group.kind in ("head", "query", "expert")]
    return {group.count for group in counted} | {group.families for group in counted}


def _factors(structure: Structure) -> list[int]:
    """By how much widths may shrink, strongest first: until a head is ``HEAD_WIDTH`` wide."""
    widths = [
        min(member.index_UC.shape[1] for member in group.members)
        for group in structure.units
        if group.kind in ("head", "query")
    ]
    strongest = max(1, min(widths, default=HEAD_WIDTH * 8) // HEAD_WIDTH)
    return [factor for factor in range(strongest, 0, -1) if strongest % factor == 0]


def _narrow(fields: dict[str, Any], factor: int, counts: set[int]) -> dict[str, Any]:
    return {
        name: max(1, value // factor)
        for name, value in fields.items()
        if type(value) is int and value >= NARROW and value not in counts and not name.endswith("token_id")
        and name != "vocab_size"
    }  # fmt: skip


def _built(skeleton: Skeleton, fields: dict[str, Any]) -> Skeleton | None:
    architecture = (skeleton.config.architectures or [type(skeleton.model).__name__])[0]
    return built_family(Family("small", type(skeleton.config), architecture, fields), {})


def _outline(structure: Structure, blocks: Sequence[int]) -> list[Any]:
    """The units of some blocks, without the sizes in which the small instance differs."""
    return [[_kind(group) for group in structure.of_block(block)] for block in blocks]


def _kind(group: UnitGroup) -> tuple[Any, ...]:
    count = group.count if group.kind in ("head", "query", "expert") else 0
    return group.kind, group.module, count, group.families, group.minimum


def _check_size(skeleton: Skeleton) -> None:
    parameters = sum(shape.numel() for shape in skeleton.shapes().values())
    if parameters > MOST_PARAMETERS:
        raise StructureError(
            f"the smallest instance of {type(skeleton.config).__name__} that has its units holds {parameters:,} "
            "parameters, which is too many to prove them on"
        )


def _fill(skeleton: Skeleton) -> None:
    """Random numbers in every tensor that is stored: no norm of ones, no bias of zeros, so that a mistake shows."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in skeleton.model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        state[name] = 0.3 * noise + 0.7 if tensor.dim() <= 1 else noise * min(0.25, 2 * tensor.shape[-1] ** -0.5)
    skeleton.model.load_state_dict(state, strict=False, assign=True)
    skeleton.model.tie_weights()
    skeleton.model.requires_grad_(False)
