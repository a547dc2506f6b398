"""The contract of a removal: how what was chosen leaves a matrix, and what becomes of the weights that stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from secateur.options import Named, Options
from secateur.removal.amount import Amount
from secateur.statistics import Statistic


@dataclass(frozen=True)
class Task:
    """One matrix out of which single weights leave, as far as a cut has left it.

    Attributes:
        name: of the matrix in the model, for messages.
        weight_OI: its numbers, float32, the task's own to change.
        statistics: what the removal asked for, of the inputs that are left.
        amount: how much leaves; None where a threshold over the whole model decides.
        choose: gives the mask ``(O, I)`` that the criterion's scores ask for.
        adaptive: whether the criterion's scores mean anything only at the moment of removal, so that a removal that
            changes weights chooses by itself.
    """

    name: str
    weight_OI: torch.Tensor
    statistics: Mapping[type[Statistic], Statistic]
    amount: Amount | None
    choose: Callable[[], torch.Tensor]
    adaptive: bool = False

    def of(self, kind: type[Any]) -> Any:
        """The gathered statistic of this kind."""
        return self.statistics[kind]


@dataclass(frozen=True)
class Removed:
    """What has become of a matrix.

    Attributes:
        mask_OI: what stays, True.
        weight_OI: new numbers, zero where the mask is False; None where those that stay are as they were.
        notes: figures worth telling, by name.
        shift_O: what is added to the bias, ``(O,)``; None where it stays as it is.
    """

    mask_OI: torch.Tensor
    weight_OI: torch.Tensor | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    shift_O: torch.Tensor | None = None


class Removal(Named, ABC):
    """How weights leave.

    Attributes:
        updates: whether weights or biases that stay get new numbers.
        writes_biases: whether it is biases that do, and weights stay.
        propagation: the default of ``--propagate`` where it reads statistics.
    """

    flag = "removal"
    updates: ClassVar[bool] = False
    writes_biases: ClassVar[bool] = False
    propagation: ClassVar[Literal["dense", "pruned"]] = "pruned"
    options_type: ClassVar[type[Options]] = Options

    def needs(self) -> frozenset[type[Statistic]]:
        """The statistics that it reads, of the inputs that a matrix has when weights leave it."""
        return frozenset()

    @abstractmethod
    def remove(self, task: Task) -> Removed:
        """Take what leaves out of one matrix.

        Raises:
            RecipeError: the matrix cannot give what is asked of it.
            ModelError: its inputs allow no solution.
        """

    def refit(
        self, name: str, weight_OI: torch.Tensor, kept_K: torch.Tensor, statistics: Mapping[type[Statistic], Any]
    ) -> Removed:
        """New numbers ``(O, K)`` of the inputs that stay, where a cut takes the others from the matrix ``name``.

        Only removals that update are asked.

        Raises:
            ModelError: its inputs allow no solution.
        """
        raise NotImplementedError(f"{self.name} does not update weights")

    def scratch_bytes(self, outputs: int, inputs: int) -> int:
        """Memory that taking weights out of a matrix needs beside its numbers and statistics."""
        return 0

    def operations(self, outputs: int, inputs: int) -> float:
        """Floating-point operations of taking weights out of a matrix, in those of a matrix product that take as long.

        For the forecast of a run's time; 0 where choosing and masking is all, which is measured apart.
        """
        return 0.0
