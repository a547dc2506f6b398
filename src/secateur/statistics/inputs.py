"""Statistics of a matrix's inputs."""

from __future__ import annotations

from typing import Self

import torch

from secateur.statistics.base import InputStatistic
from secateur.workers import Workers


class InputVector(InputStatistic):
    """A vector from each window, ``(I,)``.

    They are small, so several workers keep them apart and fold them in the order of the windows, to the bits of one worker:
    under pruned propagation a near-tie that rounds otherwise moves the masks of all later blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[torch.Tensor] | None = None

    def remember(self) -> None:
        self.terms = []

    def join(self, workers: Workers, windows: int) -> None:
        if not self.terms:
            super().join(workers, windows)
            return
        device, parts = self.terms[0].device, workers.all(torch.stack(self.terms).cpu())
        self.total, self.windows, self.terms = None, 0, None
        for part in parts:
            for term in part:
                self.fold(term.to(device))

    def fold(self, term: torch.Tensor, windows: int = 1) -> None:
        if self.terms is not None:
            self.terms.append(term)
        self._fold(term)

    def _fold(self, term: torch.Tensor) -> None:
        self._add(term.clone() if self.total is None else term)  # the first becomes the sum


class InputNorm(InputVector):
    """Mean over windows of the sum over tokens of x_j squared, ``(I,)``, float32.

    Its root is Wanda's ``||X_j||_2 / sqrt(N)`` (methods §0.2; Wanda, arXiv 2306.11695, equation 1). The mean runs along
    with the windows, in float32 and in the published code's order of operations (float64 sums moved 0.15 % of Wanda's
    places).
    """

    name = "input_norm"

    def term(self, x_TI: torch.Tensor) -> torch.Tensor:
        return torch.norm(x_TI.float().T, p=2, dim=1) ** 2

    def _fold(self, term: torch.Tensor) -> None:
        if self.total is None:
            self.total = torch.zeros_like(term)
        seen = self.windows
        self.total *= seen / (seen + 1)
        self.total += term / (seen + 1)
        self.windows = seen + 1

    def as_sum(self) -> torch.Tensor:
        return super().as_sum() * self.windows

    def set_sum(self, summed: torch.Tensor, windows: int) -> None:
        super().set_sum(summed / windows, windows)

    def mean(self) -> torch.Tensor:
        """The running mean itself."""
        return self.known().float()

    def norm_I(self) -> torch.Tensor:
        """``sqrt(mean over windows of sum over tokens of x_j^2)``, float32."""
        return self.mean().sqrt()


class InputSecondMoment(InputStatistic):
    """Mean over windows of the sum over tokens of x x^T, ``(I, I)``, float32 (methods §3.2)."""

    name = "input_second_moment"
    per_window = False

    def term(self, x_TI: torch.Tensor) -> torch.Tensor:
        x_TI = x_TI.float()
        return x_TI.T @ x_TI

    def fold(self, term: torch.Tensor, windows: int = 1) -> None:
        self._add(term.clone() if self.total is None else term, windows)  # the first becomes the sum

    def select(self, columns: torch.Tensor) -> Self:
        """The same of some of the inputs."""
        return self._with(self.known()[columns][:, columns])

    def hessian_II(self) -> torch.Tensor:
        """SparseGPT's Hessian of a row's squared output error, twice the mean, ``(I, I)`` float32, the caller's to change."""
        return self.known() * (2 / self.windows)


class InputMean(InputVector):
    """Mean over windows of the sum over tokens of x, ``(I,)``, float32: DSnoT's expectation (methods §7.1)."""

    name = "input_mean"

    def term(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI.float().sum(dim=0)


class InputVariance(InputVector):
    """Mean over windows of the variance of x over the window's tokens, ``(I,)``, float32.

    DSnoT weighs windows by their tokens; ours have equally many. What differs between windows is not in it (methods §7.1).
    """

    name = "input_variance"

    def term(self, x_TI: torch.Tensor) -> torch.Tensor:
        if not len(x_TI):  # an expert to which no token of the window went
            return torch.zeros(x_TI.shape[1], device=x_TI.device)
        return x_TI.float().var(dim=0, correction=0)


class InputMoments(InputVector):
    """Mean and variance of x over all tokens of all windows, ``(I,)`` each; what differs between windows is in it.

    Kept are how many tokens there were, their mean and the sum of squared deviations from it, ``(3, I)`` float64. Windows are
    joined by the formula for the moments of a union, so nothing is lost to cancellation. Tokens are looked at from the
    window's first one, so that the variance of a constant is zero exactly. (FLAP's running variance subtracts the new mean
    twice, its old one being the same tensor; methods §12.)
    """

    name = "input_moments"

    def term(self, x_TI: torch.Tensor) -> torch.Tensor:
        term_3I = torch.zeros(3, x_TI.shape[1], dtype=torch.float64, device=x_TI.device)
        if len(x_TI):  # else an expert to which no token of the window went
            first_I = x_TI[0].float()
            variance_I, mean_I = torch.var_mean(x_TI.float() - first_I, dim=0, correction=0)
            term_3I[0], term_3I[1], term_3I[2] = len(x_TI), first_I.double() + mean_I, variance_I.double() * len(x_TI)
        return term_3I

    def _fold(self, term: torch.Tensor) -> None:
        self.windows += 1
        if self.total is None:
            self.total = term.clone()
            return
        (seen_I, mean_I, squares_I), (count_I, other_I, more_I) = self.total, term
        part_I, apart_I = count_I / (seen_I + count_I).clamp(min=1), other_I - mean_I
        squares_I += more_I + apart_I.square() * seen_I * part_I
        mean_I += apart_I * part_I
        seen_I += count_I

    def as_sum(self) -> torch.Tensor:
        """Number, sum and sum of squares, which add up where deviations do not."""
        count_I, mean_I, squares_I = self.known()
        return torch.stack([count_I, count_I * mean_I, squares_I + count_I * mean_I.square()])

    def set_sum(self, summed: torch.Tensor, windows: int) -> None:
        count_I, sum_I, squares_I = summed
        mean_I = sum_I / count_I.clamp(min=1)
        deviations_I = (squares_I - count_I * mean_I.square()).clamp(min=0)
        super().set_sum(torch.stack([count_I, mean_I, deviations_I]), windows)

    def select(self, columns: torch.Tensor) -> Self:
        return self._with(self.known()[:, columns])

    def mean(self) -> torch.Tensor:
        """The mean over tokens, ``(I,)`` float32; zero where there were none."""
        return self.known()[1].float()

    def variance(self) -> torch.Tensor:
        """The variance over tokens (of the population, not of a sample), ``(I,)`` float32."""
        count_I, _, squares_I = self.known()
        return (squares_I / count_I.clamp(min=1)).float()
