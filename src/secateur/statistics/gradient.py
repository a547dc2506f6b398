"""Moments over windows of per-window gradients, wherever these come from. float32 throughout: fp16 sums lose what is small (methods §1.6)."""

from __future__ import annotations

import torch

from secateur.statistics.base import GradientStatistic


class GradientMean(GradientStatistic):
    """Mean of g: the gradient of the mean loss over all windows, ``(O, I)`` (LLM-Pruner's first-order Taylor)."""

    name = "gradient_mean"
    per_window = False

    def update(self, gradient_OI: torch.Tensor, windows: int = 1) -> None:
        own_OI = gradient_OI.clone() if self.total is None else gradient_OI  # the first becomes the sum
        self._add(own_OI.float(), windows)


class GradientAbs(GradientStatistic):
    """Mean of |g|, ``(O, I)`` (GBLM-Pruner's l1 norm over samples is N times this, methods §1.5)."""

    name = "gradient_abs"

    def update(self, gradient_OI: torch.Tensor, windows: int = 1) -> None:
        self._add(gradient_OI.float().abs())


class GradientSquare(GradientStatistic):
    """Mean of g squared, ``(O, I)``: the Fisher diagonal (LLM-Pruner's second order; GBLM's l2 is sqrt(N) its root)."""

    name = "gradient_square"

    def update(self, gradient_OI: torch.Tensor, windows: int = 1) -> None:
        self._add(gradient_OI.float().square())
