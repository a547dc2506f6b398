"""One exact threshold over more scores than fit in memory, in two passes over them and without a sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

BINS = 1 << 16
CHUNK = 1 << 20
"""Scores counted at once: their keys and bins are several times as large as they are."""


def exact_threshold(chunks: Callable[[], Iterable[torch.Tensor]], leaving: int) -> tuple[float, int]:
    """The score at rank ``leaving`` (from the lowest, 1-based), and how many of the scores equal to it leave.

    Radix selection on the bits of float32, sixteen at a time: below and at the threshold exactly ``leaving`` are counted.

    Args:
        chunks: gives the scores anew each time it is called, float32 of any shapes.
        leaving: how many leave, at least 1 and at most as many as there are.
    """
    high, before = _bin_of_rank(chunks, leaving, lambda key: key >> 16)
    low, ties_before = _bin_of_rank(
        chunks, leaving - before, lambda key: torch.where(key >> 16 == high, key & 0xFFFF, -1)
    )
    key = (high << 16 | low) - (1 << 31)
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    threshold = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    return float(threshold), leaving - before - ties_before


def _bin_of_rank(
    chunks: Callable[[], Iterable[torch.Tensor]], rank: int, bin_of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[int, int]:
    """The bin that holds the score of this rank, and how many lie in lower bins; bin -1 is not counted."""
    counts = torch.zeros(BINS, dtype=torch.int64)
    for chunk in chunks():
        for part in chunk.reshape(-1).split(CHUNK):
            bins = bin_of(_ordered_key(part))
            counts += torch.bincount(bins[bins >= 0], minlength=BINS).cpu()
    cumulative = counts.cumsum(0)
    index = int(torch.searchsorted(cumulative, rank))
    return index, int(cumulative[index] - counts[index])


def _ordered_key(score: torch.Tensor) -> torch.Tensor:
    """Float32 as non-negative int64 in the same order; adding zero makes one zero of the two."""
    bits = (score.float().reshape(-1) + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31)
