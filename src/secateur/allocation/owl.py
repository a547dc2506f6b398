"""OWL: blocks with more outlying Wanda scores give less."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from pydantic import Field

from secateur.allocation.policy import Policy, SpreadOptions, from_0_to_1
from secateur.statistics import InputNorm, Statistic


class OWLOptions(SpreadOptions):
    outlier: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    spread: float = Field(default=0.08, ge=0, le=1)


class OWL(Policy):
    """Kept shares linear in the share of weights whose ``|W_ij| * ||X_j||_2`` is above ``outlier`` times the mean
    (arXiv 2310.05175; methods §12).

    The kept shares lie in a range of ``2 * spread`` whose mean is what has to stay. As in the published code the mean
    and the count run over all matrices of a block together; with ``by=matrix`` each is compared with its own mean. The
    published code averages blocks; here they count by their sizes, so that the ratio is met exactly.
    """

    name = "owl"
    options_type = OWLOptions
    measured_by = ("by", "outlier")

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputNorm})

    def figure(
        self, matrices: Mapping[str, torch.Tensor], statistics: Mapping[str, Mapping[type[Statistic], Statistic]]
    ) -> dict[str, float]:
        def scores(names: Iterable[str]) -> Iterator[torch.Tensor]:
            """Wanda's, one matrix at a time: those of all would be as large as the block in float32."""
            for name in names:
                norm = statistics[name][InputNorm]
                assert isinstance(norm, InputNorm)
                yield matrices[name].float().abs() * norm.norm_I().to(matrices[name].device)

        groups = [[name] for name in matrices] if self.options.by == "matrix" else [list(matrices)]
        figures: dict[str, float] = {}
        for names in groups:
            share = outlier_share(partial(scores, names), self.options.outlier)
            figures |= dict.fromkeys(names, share)
        return figures

    def wish_L(self, figure_L: Sequence[float], size_L: Sequence[int], ratio: float) -> list[float]:
        more_L = [2 * self.options.spread * place for place in from_0_to_1(figure_L)]
        mean = math.fsum(more * size for more, size in zip(more_L, size_L, strict=True)) / math.fsum(size_L)
        return [ratio - (more - mean) for more in more_L]


def outlier_share(scores: Callable[[], Iterable[torch.Tensor]], outlier: float) -> float:
    """The share of scores above ``outlier`` times the mean of all.

    Args:
        scores: gives them anew each time, in pieces.
    """
    total, count = 0.0, 0
    for score in scores():
        total += score.sum(dtype=torch.float64).item()
        count += score.numel()
    bound = outlier * total / max(1, count)
    return sum(int((score > bound).sum()) for score in scores()) / max(1, count)
