"""What leaves one block, and the two ways to carry it out: physically, or as zeros in the dense shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from secateur.structure import UnitGroup, cut_tensors, mask_tensors

Removals = list[tuple[UnitGroup, list[int]]]


@dataclass(frozen=True)
class BlockDecision:
    """The choice for one block.

    Attributes:
        removals: for each group of structured units, the units that leave.
        masks: by parameter name, what stays of the matrix *after* the cut, ``(O', I')`` boolean.
    """

    removals: Removals = field(default_factory=list)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)

    def carry_out(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's tensors as they will be written: cut, then masked; dtypes stay."""
        result = cut_tensors(dict(tensors), self.removals)
        for name, mask_OI in self.masks.items():
            result[name] = result[name].masked_fill(~mask_OI, 0)
        return result

    def in_dense_shapes(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's tensors in their old shapes with the same function: what is cut is zeroed where it is read."""
        result = mask_tensors(dict(tensors), self.removals)
        for name, mask_OI in self.masks.items():
            weight_OI = result[name].clone()
            rows, columns = self.survivors(name, weight_OI.shape)
            weight_OI[rows[:, None], columns] = weight_OI[rows[:, None], columns].masked_fill(~mask_OI, 0)
            result[name] = weight_OI
        return result

    def survivors(self, name: str, shape: torch.Size | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the matrix ``name`` (of the dense ``shape``) that are left after the cut."""
        stays = [torch.ones(size, dtype=torch.bool) for size in shape]
        for group, units in self.removals:
            for member in group.members:
                if member.parameter == name and units:
                    stays[member.dim][torch.as_tensor(member.index_UC[units].reshape(-1))] = False
        rows, columns = (torch.nonzero(dim).reshape(-1) for dim in stays)
        return rows, columns
