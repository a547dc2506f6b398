"""The contract of a criterion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from secateur.options import Named, Options
from secateur.statistics import GradientSource, Statistic

Propagation = Literal["dense", "pruned"]
Within = Literal["row", "block", "layer", "global"]
"""Where single weights compete: a row; a run of consecutive inputs over all rows; a matrix; the model."""


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
        gradient: the default of ``--gradient``, as the method was published; means nothing where none are needed.
        within: the default of ``--within``, as the method was published.
        removal: the default of ``--removal``, as the method was published.
        adaptive: its scores change while weights leave, so a removal that updates weights chooses by itself.
    """

    flag = "criterion"
    propagation: ClassVar[Propagation] = "dense"
    gradient: ClassVar[GradientSource] = "exact"
    within: ClassVar[Within] = "row"
    removal: ClassVar[str] = "mask"
    adaptive: ClassVar[bool] = False

    def needs(self) -> frozenset[type[Statistic]]:
        """The statistics that ``score_OI`` reads; the sweep gathers exactly these."""
        return frozenset()

    @abstractmethod
    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        """What each weight contributes, ``(O, I)`` float32; shape of the weight."""

    def weight_score_OI(self, matrix: Matrix) -> torch.Tensor:
        """The score of single weights (unit ``weight`` and N:M)."""
        return self.score_OI(matrix)

    def channel_score(self, contribution: torch.Tensor, dim: int) -> torch.Tensor:
        """The score of each slice along ``dim``, of a matrix each row or column, from its weights' contributions, float64.

        Contributions lie as the parameter itself does: kept transposed, or packed with a dimension of experts.
        """
        others = [other for other in range(contribution.dim()) if other != dim]
        return contribution.sum(dim=others, dtype=torch.float64)


__all__ = ["Criterion", "Matrix", "Options", "Propagation", "Within"]
