"""Cutting units out of a block's tensors, and the masked dense block a cut must equal.

A removal is a unit group with the units of it that leave. Several removals of one block combine: a head, query
heads of the groups that stay, and channels can leave at once, and every (parameter, dimension) loses the union.
All names are names inside the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from secateur.errors import StructureError
from secateur.structure.units import UnitGroup

T = TypeVar("T")
Removal = tuple[UnitGroup, Sequence[int]]


@dataclass(frozen=True)
class ModelCut:
    """What leaves a whole model.

    Attributes:
        blocks: for every block of the dense model, what leaves it.
        outside: what leaves the parameters outside the blocks (``hidden`` units); names are names inside the model.
        dropped: dense numbers of the blocks that leave as a whole.
    """

    blocks: tuple[Sequence[Removal], ...]
    outside: Sequence[Removal] = ()
    dropped: tuple[int, ...] = ()

    def takes_anything(self) -> bool:
        """Whether any unit leaves at all."""
        return bool(self.dropped) or any(len(units) for part in (*self.blocks, self.outside) for _, units in part)

    def kept(self) -> list[int]:
        """Dense numbers of the blocks that stay; their place in this list is their new number."""
        return [index for index in range(len(self.blocks)) if index not in self.dropped]

    def new_name(self, name: str, blocks_name: str) -> str | None:
        """The name a tensor or module of the dense model has after the cut; None if it leaves with its block."""
        inside = blocks_name + "."
        if not name.startswith(inside):
            return name
        number, _, rest = name.removeprefix(inside).partition(".")
        if int(number) in self.dropped:
            return None
        return f"{inside}{self.kept().index(int(number))}.{rest}".removesuffix(".")  # the block itself has no rest

    def shapes(self, dense: Mapping[str, Sequence[int]], blocks_name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors after the cut by their new names; ``dense`` has all of the dense model's by full name."""
        inside = blocks_name + "."
        own = {name: shape for name, shape in dense.items() if not name.startswith(inside)}
        after = cut_shapes(own, self.outside)
        for new, old in enumerate(self.kept()):
            prefix = f"{inside}{old}."
            block = {name.removeprefix(prefix): shape for name, shape in dense.items() if name.startswith(prefix)}
            after |= {f"{inside}{new}.{name}": shape for name, shape in cut_shapes(block, self.blocks[old]).items()}
        order = [self.new_name(name, blocks_name) for name in dense]
        return {name: after[name] for name in order if name is not None}


def kept_indices(
    removals: Sequence[Removal], shapes: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], torch.LongTensor]:
    """Return the ascending indices that stay, for every (parameter, dim) that a removal touches.

    Raises ``StructureError`` if a unit does not exist, none would stay, or families would be left unequal.
    """
    _check_what_stays(removals)
    removed = _removed_indices(removals)
    kept: dict[tuple[str, int], torch.LongTensor] = {}
    for (name, dim), gone in removed.items():
        stays = np.ones(_of(shapes, name)[dim], dtype=bool)
        stays[gone] = False
        kept[name, dim] = torch.LongTensor(np.flatnonzero(stays))
    return kept


def cut_shapes(shapes: Mapping[str, Sequence[int]], removals: Sequence[Removal]) -> dict[str, tuple[int, ...]]:
    """Return the shapes after the cut, of all tensors in ``shapes``."""
    cut = {name: list(shape) for name, shape in shapes.items()}
    for (name, dim), kept in kept_indices(removals, shapes).items():
        cut[name][dim] = len(kept)
    return {name: tuple(shape) for name, shape in cut.items()}


def cut_tensors(tensors: Mapping[str, Tensor], removals: Sequence[Removal]) -> dict[str, Tensor]:
    """Return all ``tensors`` with the removed units sliced out; untouched ones are passed on as they are."""
    cut = dict(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for (name, dim), kept in kept_indices(removals, shapes).items():
        cut[name] = cut[name].index_select(dim, kept.to(cut[name].device)).contiguous()
    return cut


def mask_tensors(tensors: Mapping[str, Tensor], removals: Sequence[Removal]) -> dict[str, Tensor]:
    """Return all ``tensors`` in their dense shapes with the removed units silenced.

    Only consumers are zeroed: a producer's rows may feed several units (repeated keys and values), and an
    activation of zero input is not always zero.
    """
    masked = dict(tensors)
    _check_what_stays(removals)
    for (name, dim), gone in _removed_indices(removals, consumers_only=True).items():
        index = torch.as_tensor(gone, device=_of(tensors, name).device)
        masked[name] = masked[name].index_fill(dim, index, 0)
    return masked


def _removed_indices(removals: Sequence[Removal], consumers_only: bool = False) -> dict[tuple[str, int], np.ndarray]:
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for group, units in removals:
        outside = [unit for unit in units if not 0 <= unit < group.count]
        if outside:
            raise StructureError(f"{_place(group)} has {group.count} units; there is no unit {outside[0]}")
        for member in group.members:
            if units and (member.role == "consumer" or not consumers_only):
                indices = member.index_UC[np.asarray(sorted(set(units)), dtype=np.int64)]
                gone.setdefault((member.parameter, member.dim), []).append(indices.reshape(-1))
    return {key: np.unique(np.concatenate(parts)) for key, parts in gone.items()}


def _check_what_stays(removals: Sequence[Removal]) -> None:
    removed = _removed_indices(removals)
    for group, _ in removals:
        left = _stays(group, removed).reshape(group.families, -1).sum(axis=1)
        if not left.any():
            raise StructureError(f"no unit of {_place(group)} would stay; keep at least one")
        # A family may leave as a whole, but only together with what it shares (a KV head leaving as a head).
        others = _removed_indices([removal for removal in removals if removal[0] is not group])
        left_by_others = _stays(group, others).reshape(group.families, -1).sum(axis=1)
        if len(set(left[left_by_others > 0].tolist())) > 1:
            raise StructureError(
                f"{_place(group)} would keep {left.tolist()} units in its {group.families} families; "
                "remove the same number from each"
            )


def _stays(group: UnitGroup, removed: Mapping[tuple[str, int], np.ndarray]) -> np.ndarray:
    """Return, as a boolean (U,), which units keep at least one of their indices."""
    stays_U = np.zeros(group.count, dtype=bool)
    for member in group.members:
        gone = removed.get((member.parameter, member.dim), np.empty(0, dtype=np.int64))
        stays_U |= ~np.isin(member.index_UC, gone).all(axis=1)
    return stays_U


def _of(values: Mapping[str, T], name: str) -> T:
    if name not in values:
        raise StructureError(f"the block has no tensor {name}; the units belong to another model")
    return values[name]


def _place(group: UnitGroup) -> str:
    return f"the {group.kind} group of block {group.block}" + (f" ({group.module})" if group.module else "")
