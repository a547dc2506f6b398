"""What leaves one block, and the two ways to carry it out: physically, or as zeros in the dense shapes."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from secateur.checkpoint.matrices import BlockMatrices
from secateur.removal.spread import ScoreSpread
from secateur.structure import OUTSIDE, ModelCut, UnitGroup, cut_tensors, mask_tensors
from secateur.structure.cutting import Removal

Removals = list[tuple[UnitGroup, list[int]]]
"""For each group of structured units in one block, or outside of them, the units that leave."""


def model_cut(everywhere: Mapping[int, Sequence[Removal]], blocks: int) -> ModelCut:
    """What leaves a model of so many blocks, from what leaves each of them and (``OUTSIDE``) the rest."""
    outside = everywhere.get(OUTSIDE, [])
    return ModelCut(
        blocks=tuple(everywhere.get(index, []) for index in range(blocks)),
        outside=tuple(removal for removal in outside if removal[0].kind != "block"),
        dropped=tuple(sorted(unit for group, units in outside if group.kind == "block" for unit in units)),
    )


def within(group: UnitGroup, names: Container[str]) -> UnitGroup:
    """The group as far as it is in these tensors: of tied ones only one is stored."""
    return replace(group, members=tuple(member for member in group.members if member.parameter in names))


@dataclass(frozen=True)
class BlockDecision:
    """The choice for one block.

    Attributes:
        removals: for each group of structured units, the units that leave.
        masks: by the matrix's name, what stays of it *after* the cut, ``(O', I')`` boolean.
        matrices: how the block keeps the matrices that ``masks`` and ``numbers`` name.
        numbers: by the matrix's name, the new numbers of what stays after the cut, ``(O', I')`` in the stored dtype; by a
            bias's own name its new numbers, ``(O',)``.
        notes: figures of the removal that are worth telling, the largest of the block.
        scores: by kind of unit, or by the matrix's name, how the scores lie that were chosen by.
    """

    removals: Sequence[Removal] = ()
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    matrices: BlockMatrices = field(default_factory=dict)
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    scores: dict[str, ScoreSpread] = field(default_factory=dict)

    def carry_out(self, tensors: Mapping[str, torch.Tensor], in_place: bool = False) -> dict[str, torch.Tensor]:
        """The block's tensors as they will be written: cut, then given their new numbers, then masked; dtypes stay.

        ``in_place``: ``tensors`` are the caller's to lose, so that masking needs no second copy of them.
        """
        result = cut_tensors(tensors, self.removals)
        for name in dict.fromkeys([*self.numbers, *self.masks]):
            if name not in self.matrices:
                result[name] = self.numbers[name].to(result[name])
                continue
            matrix = self.matrices[name]
            if not in_place and result[matrix.parameter] is tensors[matrix.parameter]:
                result[matrix.parameter] = result[matrix.parameter].clone()
            if matrix.expert is not None:
                experts = self._stays(matrix.parameter, 0, len(tensors[matrix.parameter]))
                matrix = replace(matrix, expert=int(experts[: matrix.expert].sum()))
            if name in self.numbers:
                matrix.of(result).copy_(self.numbers[name])
            if name in self.masks:
                matrix.of(result).masked_fill_(~self.masks[name], 0)
        return result

    def in_dense_shapes(self, tensors: Mapping[str, torch.Tensor], in_place: bool = False) -> dict[str, torch.Tensor]:
        """The block's tensors in their old shapes with the same function: what is cut is zeroed where it is read.

        What a mask takes is multiplied by zero, which may leave the zero a sign.

        ``in_place``: ``tensors`` are the caller's to lose, so that masking needs no second copy of them.
        """
        given = self._with_numbers(tensors, in_place)
        result = mask_tensors(given, self.removals)
        for name, mask_OI in self.masks.items():
            matrix = self.matrices[name]
            stays_OI = self._in_dense_shape(name, mask_OI, tensors)
            if in_place or matrix.expert is not None:
                if not in_place and result[matrix.parameter] is tensors[matrix.parameter]:
                    result[matrix.parameter] = result[matrix.parameter].clone()
                matrix.of(result).mul_(stays_OI)
            else:
                # Not a copy filled in place: numbers that are mapped from a file would be copied page by page.
                result[matrix.parameter] = result[matrix.parameter] * (stays_OI.mT if matrix.transposed else stays_OI)
        return result

    def _with_numbers(self, tensors: Mapping[str, torch.Tensor], in_place: bool) -> Mapping[str, torch.Tensor]:
        """The tensors, dense, with the new numbers where what stays stood."""
        if not self.numbers:
            return tensors
        result = dict(tensors)
        for name, numbers_OI in self.numbers.items():
            if name not in self.matrices:
                stays_O = self._stays(name, 0, len(tensors[name])).to(tensors[name].device)
                result[name] = tensors[name].masked_scatter(stays_O, numbers_OI.to(tensors[name]))
                continue
            matrix = self.matrices[name]
            if not in_place and result[matrix.parameter] is tensors[matrix.parameter]:
                result[matrix.parameter] = result[matrix.parameter].clone()
            dense_OI = matrix.of(result)
            if dense_OI.shape == numbers_OI.shape:
                dense_OI.copy_(numbers_OI)
            else:
                rows, columns = self.survivors(name, tensors)
                dense_OI[rows[:, None], columns] = numbers_OI.to(dense_OI)
        return result

    def _in_dense_shape(self, name: str, mask_OI: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A mask over the dense matrix, from one over what the cut leaves of it."""
        whole = self.matrices[name].shape({key: tensor.shape for key, tensor in tensors.items()})
        if tuple(mask_OI.shape) == tuple(whole):
            return mask_OI
        rows, columns = self.survivors(name, tensors)
        stays_OI = torch.ones(whole, dtype=torch.bool, device=mask_OI.device)
        stays_OI[rows[:, None], columns] = mask_OI
        return stays_OI

    def survivors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the matrix ``name`` that are left after the cut; none of an expert that leaves."""
        matrix = self.matrices[name]
        shape = tensors[matrix.parameter].shape
        first, second = (self._stays(matrix.parameter, dim, shape[dim]) for dim in (len(shape) - 2, len(shape) - 1))
        if matrix.expert is not None and not self._stays(matrix.parameter, 0, shape[0])[matrix.expert]:
            first, second = torch.zeros_like(first), torch.zeros_like(second)
        rows, columns = (second, first) if matrix.transposed else (first, second)
        return torch.nonzero(rows).reshape(-1), torch.nonzero(columns).reshape(-1)

    def _stays(self, parameter: str, dim: int, size: int) -> torch.Tensor:
        stays = torch.ones(size, dtype=torch.bool)
        for group, units in self.removals:
            for member in group.members:
                if (member.parameter, member.dim) == (parameter, dim) and len(units):
                    stays[torch.as_tensor(member.index_UC[list(units)].reshape(-1))] = False
        return stays
