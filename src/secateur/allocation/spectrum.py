"""How heavy the tail of a matrix's spectrum is: the exponent of the power law that its largest eigenvalues follow.

Eigenvalues are those of W^T W, the squared singular values of W, ``K`` of them in ascending order (methods §8.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch

BINS = 100
"""Bins of the histogram whose fullest says where the tail may begin."""

THREADS_FROM = 1024
"""Width of a Gram matrix below which one thread finds its eigenvalues: several wait for each other longer than they work."""

ROUNDING = 1e-5
"""A spectrum whose largest value is above its smallest by no more than this share is of equal values: float32 rounds so."""

Estimator = Literal["peak", "peak-fixed", "mid"]


def eigenvalues_K(weight_OI: torch.Tensor) -> torch.Tensor:
    """The squared singular values of a matrix that are not zero, ascending, float64.

    Those of the smaller of the two Gram matrices, in float64: singular values themselves take several times as long, and
    float64 holds the square of any that float32 weights leave above rounding. What is rounding is left out.
    """
    weight = weight_OI.double()
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    with _one_thread() if len(gram) < THREADS_FROM else nullcontext():
        value_K = torch.linalg.eigvalsh(gram).cpu()
    rounding = value_K[-1] * max(weight.shape) * torch.finfo(torch.float64).eps
    return value_K[value_K > rounding.clamp(min=0)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """While the context lasts torch computes with one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tail_exponent(value_K: torch.Tensor, estimator: Estimator = "peak") -> float | None:
    """Alpha of the tail of a spectrum by Hill's estimator; lower is a heavier tail (AlphaPruning, methods §8.1).

    ``mid`` takes the upper half of the spectrum as its tail. ``peak`` tries the eigenvalues around the fullest bin of a
    histogram of their logarithms as the tail's beginning, and keeps the one from which a power law fits best
    (Kolmogorov-Smirnov distance). The published code compares eigenvalues with the logarithm of the lower bound, so that
    it tries far more of them, and how many depends on the scale of the weights; ``peak`` does as it does, and
    ``peak-fixed`` keeps to the bound that is meant.

    Args:
        value_K: positive, ascending.

    Returns:
        None where there is no tail: fewer than two different eigenvalues.
    """
    value_K = value_K.double()
    if len(value_K) < 2 or value_K[-1] <= value_K[0] * (1 + ROUNDING):
        return None
    alpha_K = _hill_K(value_K)
    if estimator != "mid":
        tried = _near_the_peak(value_K, estimator)
        best = _best_fit(value_K, alpha_K, tried)
        if best is not None:
            return best
    middle = float(alpha_K[len(value_K) // 2])
    return middle if math.isfinite(middle) else None


def _hill_K(value_K: torch.Tensor) -> torch.Tensor:
    """Alpha for every place where the tail may begin, itself in it; infinite where all of the tail is equal."""
    log_K = value_K.log()
    count_K = torch.arange(len(value_K), 0, -1, dtype=torch.float64)
    above_K = log_K.flip(0).cumsum(0).flip(0) - count_K * log_K
    # A tail of equal values differs from zero by rounding only.
    return torch.where(above_K > count_K * 1e-14, 1 + count_K / above_K, torch.inf)


def _near_the_peak(value_K: torch.Tensor, estimator: Estimator) -> list[int]:
    """The eigenvalues where the tail may begin; never the largest."""
    log_K = value_K.log10()
    low, high = float(log_K[0]), float(log_K[-1])
    fullest = int(torch.histc(log_K, BINS, min=low, max=high).argmax())
    peak = 10 ** (low + fullest * (high - low) / BINS)
    lower = 0.95 * peak if estimator == "peak-fixed" else math.log10(0.95 * peak)
    inside_K = (value_K >= lower) & (value_K <= 1.5 * peak)
    return torch.nonzero(inside_K[:-1]).reshape(-1).tolist()


def _best_fit(value_K: torch.Tensor, alpha_K: torch.Tensor, tried: list[int]) -> float | None:
    """Alpha of the beginning from which the values are nearest to a power law; of equal ones the first."""
    best, nearest = None, 1.0
    for begin in tried:
        alpha = float(alpha_K[begin])
        if not 1 < alpha < math.inf:
            continue
        distance = _distance(value_K[begin:], alpha)
        if distance < nearest:
            best, nearest = alpha, distance
    return best


def _distance(tail_K: torch.Tensor, alpha: float) -> float:
    """The largest distance between the share of values below each and what a power law says of it."""
    share_K = torch.arange(len(tail_K), dtype=torch.float64) / len(tail_K)
    return float((1 - (tail_K / tail_K[0]) ** (1 - alpha) - share_K).abs().max())
