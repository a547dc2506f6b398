"""Rounding to a few levels, one grid per output row, together with a pruning update (methods §3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.errors import RecipeError


@dataclass(frozen=True)
class Quantiser:
    """For every output row ``2^bits`` evenly spaced levels from its least to its greatest weight; zero is one of them.

    Attributes:
        scale_O: the distance between levels.
        zero_O: the level that stands for zero, a whole number from 0 to ``levels - 1``.
        levels: how many there are.
    """

    scale_O: torch.Tensor
    zero_O: torch.Tensor
    levels: int

    @classmethod
    def of(cls, weight_OI: torch.Tensor, bits: int) -> Quantiser:
        """The grids of a matrix's original rows, before anything is pruned or updated.

        Raises:
            RecipeError: ``bits`` is not from 2 to 16.
        """
        if not 2 <= bits <= 16:
            raise RecipeError(f"weights are rounded to 2 to 16 bits, not {bits}; choose another number of bits")
        least_O = weight_OI.float().amin(dim=1).clamp(max=0)
        greatest_O = weight_OI.float().amax(dim=1).clamp(min=0)
        scale_O = (greatest_O - least_O) / (2**bits - 1)
        scale_O = torch.where(scale_O > 0, scale_O, 1)  # a row of zeros
        return cls(scale_O, torch.round(-least_O / scale_O), 2**bits)

    def round(self, weight_CO: torch.Tensor) -> torch.Tensor:
        """The nearest level of every weight; outputs are the last dimension."""
        level_CO = (torch.round(weight_CO / self.scale_O) + self.zero_O).clamp(0, self.levels - 1)
        return self.scale_O * (level_CO - self.zero_O)
