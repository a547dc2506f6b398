"""The contract of a criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from secateur.options import Named, Options
from secateur.statistics import GradientSource, Statistic
from secateur.structure.units import Member, UnitGroup

Propagation = Literal["dense", "pruned"]
Within = Literal["row", "share", "block", "layer", "global"]
"""Where single weights compete: a row; a matrix, by the share of its row's scores gone with a weight; a run of consecutive
inputs over all rows; a matrix; the model."""
Normalise = Literal["parameter", "zscore"]
"""How scores become comparable over the model: divided by the parameters that a unit holds, or standardised within each
kind of each block."""


@dataclass(frozen=True)
class Matrix:
    """One matrix as a criterion sees it: its float32 weight, its name and the statistics the criterion asked for."""

    name: str
    weight_OI: torch.Tensor
    statistics: Mapping[type[Statistic], Statistic] = field(default_factory=dict)
    seed: int = 0

    def of(self, kind: type[Any]) -> Any:
        """The gathered statistic of this kind."""
        return self.statistics[kind]


class Criterion(Named, ABC):
    """A score for every weight; higher is worth more. Units sum up what their weights are worth.

    Attributes:
        propagation: the default of ``--propagate``, as the method was published.
        keeps_last: whether the last block stays, unless ``--blocks`` names it.
        gradient: the default of ``--gradient``, as the method was published; means nothing where none are needed.
        within: the default of ``--within``, as the method was published.
        removal: the default of ``--removal`` for single weights, as the method was published.
        unit_removal: the same where units are cut.
        allocation: the default of ``--allocation`` where units are cut, as the method was published.
        normalise: the default of ``--normalise``, as the method was published.
        adaptive: its scores change while weights leave, so a removal that updates weights chooses by itself.
    """

    flag = "criterion"
    propagation: ClassVar[Propagation] = "dense"
    gradient: ClassVar[GradientSource] = "exact"
    within: ClassVar[Within] = "row"
    removal: ClassVar[str] = "mask"
    unit_removal: ClassVar[str] = "mask"
    allocation: ClassVar[str] = "uniform"
    normalise: ClassVar[Normalise] = "parameter"
    adaptive: ClassVar[bool] = False
    keeps_last: ClassVar[bool] = False

    def needs(self) -> frozenset[type[Statistic]]:
        """The statistics that ``score_OI`` reads; the sweep gathers exactly these."""
        return frozenset()

    @abstractmethod
    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        """What each weight contributes, ``(O, I)`` float32; shape of the weight."""

    def weight_score_OI(self, matrix: Matrix) -> torch.Tensor:
        """The score of single weights (unit ``weight`` and N:M)."""
        return self.score_OI(matrix)

    def counted(self, group: UnitGroup) -> Sequence[Member]:
        """The members of a group whose weights make up what its units are worth."""
        return group.members

    def channel_score(self, contribution: torch.Tensor, dim: int) -> torch.Tensor:
        """The score of each slice along ``dim``, of a matrix each row or column, from its weights' contributions, float64.

        Contributions lie as the parameter itself does: kept transposed, or packed with a dimension of experts.
        """
        others = [other for other in range(contribution.dim()) if other != dim]
        return contribution.sum(dim=others, dtype=torch.float64)

    def block_score(
        self, gathered: Mapping[type[Statistic], Statistic], contributions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """What has to be known of one block to choose among whole blocks: what its matrices contribute, ``()`` float64.

        Args:
            gathered: the statistics of the block itself.
            contributions: ``score_OI`` by parameter name.
        """
        rows = [self.channel_score(part.flatten(1), 0).sum() for part in contributions.values()]
        return torch.stack(rows).sum()

    def over_blocks(self, known: Mapping[int, torch.Tensor], count: int) -> torch.Tensor:
        """The score of each of ``count`` blocks, ``(U,)`` float64, from their ``block_score``; those not known have 0.

        A criterion of runs gives ``(U, U)``: the score of all blocks from the first index through the second.
        """
        score_U = torch.zeros(count, dtype=torch.float64)
        for block, score in known.items():
            score_U[block] = score
        return score_U


class BlockCriterion(Criterion):
    """A criterion of whole blocks: single weights and the units inside a block have no score.

    The last block stays by default (methods §9.2): what leaves it goes to the head as it is.

    Attributes:
        of_runs: whether consecutive blocks are scored together, and leave as one run.
    """

    keeps_last = True
    of_runs: ClassVar[bool] = False

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        raise TypeError(f"{self.name} scores whole blocks, not {matrix.name}")


__all__ = ["BlockCriterion", "Criterion", "Matrix", "Normalise", "Options", "Propagation", "Within"]
