"""Statistics of a matrix's inputs."""

from __future__ import annotations

import torch

from secateur.statistics.base import InputStatistic


class InputNorm(InputStatistic):
    """Mean over windows of the sum over tokens of x_j squared, ``(I,)``; sums in float64.

    Its root is Wanda's ``||X_j||_2 / sqrt(N)`` (methods §0.2; Wanda, arXiv 2306.11695, equation 1).
    """

    name = "input_norm"

    def update(self, x_TI: torch.Tensor) -> None:
        self._add(x_TI.double().square_().sum(dim=0))

    def norm_I(self) -> torch.Tensor:
        """``sqrt(mean over windows of sum over tokens of x_j^2)``, float32."""
        if self.total is None:
            raise ValueError("input_norm has seen no window")
        return (self.total / self.windows).sqrt().float()


class InputSecondMoment(InputStatistic):
    """Mean over windows of the sum over tokens of x x^T, ``(I, I)``: SparseGPT's Hessian is twice this (methods §3.2)."""

    name = "input_second_moment"

    def update(self, x_TI: torch.Tensor) -> None:
        x_TI = x_TI.float()
        self._add(x_TI.T @ x_TI)
