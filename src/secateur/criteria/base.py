"""The contract of a criterion, and how its options ride on its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.errors import RecipeError, suggest
from secateur.statistics import GradientSource, Statistic

Propagation = Literal["dense", "pruned"]


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


class Options(BaseModel):
    """Base of every criterion's options: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Criterion(ABC):
    """A score for every weight; higher is worth more. Units sum up what their weights are worth.

    Attributes:
        name: how users call it.
        propagation: the default of ``--propagate``, as the method was published.
        keeps_last: whether the last block stays, unless ``--blocks`` names it.
        gradient: the default of ``--gradient``, as the method was published; means nothing where none are needed.
        options_type: the options that ride on the name.
    """

    name: ClassVar[str]
    propagation: ClassVar[Propagation] = "dense"
    gradient: ClassVar[GradientSource] = "exact"
    options_type: ClassVar[type[Options]] = Options
    keeps_last: ClassVar[bool] = False

    def __init__(self, options: Options | None = None) -> None:
        self.options: Any = options if options is not None else self.options_type()

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

    def __str__(self) -> str:
        chosen = ",".join(f"{key}={_text(value)}" for key, value in self.options.model_dump().items())
        return f"{self.name}:{chosen}" if chosen else self.name


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


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def parse_criterion(text: str, known: Mapping[str, type[Criterion]]) -> Criterion:
    """Read ``"name:option=value,option=value"``.

    Raises:
        RecipeError: unknown name, option or value.
    """
    name, _, rest = text.strip().partition(":")
    if name not in known:
        raise RecipeError(f"there is no criterion '{name}'{suggest(name, known)}")
    kind = known[name]
    given: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise RecipeError(f"'{part}' in --criterion {text} is not of the form option=value")
        if key not in kind.options_type.model_fields:
            fields = kind.options_type.model_fields
            there = suggest(key, fields) if fields else " (it has none)"
            raise RecipeError(f"the criterion {name} has no option '{key}'{there}")
        if key in given:
            raise RecipeError(f"--criterion {text} gives the option '{key}' twice")
        given[key] = value
    try:
        return kind(kind.options_type(**given))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"the option {name}:{'.'.join(map(str, first['loc']))} cannot be '{first['input']}': {first['msg'].lower()}"
        ) from error
