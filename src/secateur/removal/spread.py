"""How scores lie, of what stays and of what leaves: a histogram small enough to stand in a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field

BINS_AN_OCTAVE = 4
"""Bins are equally wide on a logarithmic scale: so many for each doubling of the score."""

SAMPLE = 2**18
"""Scores of one matrix that are looked at: of a larger one every so-many-th row."""

LARGEST = 1100 * BINS_AN_OCTAVE
"""No float64 lies beyond this bin."""


class ScoreSpread(BaseModel):
    """A histogram of scores over equal steps of their logarithm.

    Bin ``b`` holds scores from ``2 ** ((first + b) / bins_an_octave)`` up to the next one's.

    Attributes:
        first: the number of the lowest bin.
        kept: how many of each bin stay.
        gone: how many of each bin leave.
        nothing: how many scores that are zero or less stay, and how many leave.
        lowest_kept: the lowest score above zero that stays.
        highest_gone: the highest that leaves.
        of: how many scores there are; of more than ``SAMPLE`` a part is counted.
    """

    model_config = ConfigDict(extra="forbid")
    bins_an_octave: int = Field(default=BINS_AN_OCTAVE, ge=1)
    first: int = 0
    kept: list[int] = []
    gone: list[int] = []
    nothing: tuple[int, int] = (0, 0)
    lowest_kept: float | None = None
    highest_gone: float | None = None
    of: int = Field(ge=0)


def spread_of_weights(score_OI: torch.Tensor, keep_OI: torch.Tensor) -> ScoreSpread:
    """Of one matrix's single weights."""
    every = max(1, -(-score_OI.numel() // SAMPLE))
    return _spread(score_OI[::every].reshape(-1), keep_OI[::every].reshape(-1).to(score_OI.device), score_OI.numel())


def spread_of_units(score_U: torch.Tensor, gone: Collection[int]) -> ScoreSpread:
    """Of the units of one group."""
    keep_U = torch.ones(len(score_U), dtype=torch.bool)
    keep_U[list(gone)] = False
    return _spread(score_U.cpu(), keep_U, len(score_U))


def joined(spreads: Sequence[ScoreSpread]) -> ScoreSpread:
    """One histogram of several."""
    filled = [spread for spread in spreads if spread.kept]
    first = min((spread.first for spread in filled), default=0)
    length = max((spread.first + len(spread.kept) for spread in filled), default=first) - first
    counts = [[0] * length, [0] * length]
    for spread in filled:
        for total, part in zip(counts, (spread.kept, spread.gone), strict=True):
            for place, count in enumerate(part, spread.first - first):
                total[place] += count
    return ScoreSpread(
        first=first,
        kept=counts[0],
        gone=counts[1],
        nothing=(sum(spread.nothing[0] for spread in spreads), sum(spread.nothing[1] for spread in spreads)),
        lowest_kept=min((s.lowest_kept for s in spreads if s.lowest_kept is not None), default=None),
        highest_gone=max((s.highest_gone for s in spreads if s.highest_gone is not None), default=None),
        of=sum(spread.of for spread in spreads),
    )


def _spread(score_N: torch.Tensor, keep_N: torch.Tensor, of: int) -> ScoreSpread:
    # What the criterion holds beyond price (infinite) has no place on the axis.
    there_N = torch.isfinite(score_N) & (score_N > 0)
    nothing_N = score_N <= 0
    nothing = (int((nothing_N & keep_N).sum()), int((nothing_N & ~keep_N).sum()))
    if not there_N.any():
        return ScoreSpread(nothing=nothing, of=of)
    score_N, keep_N = score_N[there_N].double(), keep_N[there_N]
    bin_N = (score_N.log2() * BINS_AN_OCTAVE).floor().long().clamp(-LARGEST, LARGEST)
    first = int(bin_N.min())
    length = int(bin_N.max()) - first + 1
    kept, gone = (torch.bincount(bin_N[chosen] - first, minlength=length).tolist() for chosen in (keep_N, ~keep_N))
    return ScoreSpread(
        first=first,
        kept=kept,
        gone=gone,
        nothing=nothing,
        lowest_kept=float(score_N[keep_N].min()) if keep_N.any() else None,
        highest_gone=float(score_N[~keep_N].max()) if not keep_N.all() else None,
        of=of,
    )
