"""ALPS: mask and weights together, by the alternating direction method of multipliers (arXiv 2406.07831; methods §12).

The weights are pulled to and fro between a dense matrix that meets the outputs and its sparse projection, ever harder,
until the projection's support stands still; then conjugate gradients fit the weights on it. It takes many times as
long as SparseGPT and pays from about 60 % on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.removal.amount import Amount
from secateur.removal.curvature import DAMPENING, decompose
from secateur.removal.least_squares import conjugate_gradient_on_support
from secateur.removal.selection import lowest_mask
from secateur.removal.sparsegpt import Updated


@dataclass(frozen=True)
class AlpsOptions:
    """How long and how hard to pull (methods §12).

    Attributes:
        rho: the first penalty on the distance between the two matrices; the curvature has ones on its diagonal.
        steps: iterations at most.
        check_every: after so many iterations the penalty is looked at.
        fit_steps: steps of conjugate gradients at the end.
    """

    rho: float = 0.1
    steps: int = 300
    check_every: int = 3
    fit_steps: int = 10


GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Where more than this part of the support changed, the penalty grows by that factor."""
LEAST_RHO = 1e-3
SETTLED = 3e-4
SETTLED_AFTER = 30
"""After so many iterations a support that changes by less than ``SETTLED`` stands still enough."""


def alps(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    amount: Amount,
    *,
    dampening: float = DAMPENING,
    options: AlpsOptions | None = None,
    name: str = "the matrix",
) -> Updated:
    """Choose what leaves and fit what stays, for the least change of the outputs.

    The support that it starts from, the largest weights times their inputs' norms, is fitted too and taken where it does
    better: with inputs that are hardly related the pulling can only lose.

    Under "row" and "layer" counts are exact in every row and in the matrix; "block" counts are those of 128 columns. The
    columns of dead inputs become zero and leave first, as in ``sparsegpt``; where nothing is to leave, nothing changes.

    Args:
        weight_OI: ``(O, I)``.
        hessian_II: ``X^T X`` up to a factor, left as it is.
        amount: how much leaves.
        dampening: see ``curvature.ridge``.
        options: the published ones if left out.
        name: the matrix, for errors.

    Raises:
        RecipeError: the pattern does not divide the width.
        ModelError: the curvature cannot be decomposed.
    """
    if not (amount.leaving or amount.group):
        return Updated(weight_OI.float().clone(), torch.ones_like(weight_OI, dtype=torch.bool), 0.0, dampening)
    options = options or AlpsOptions()
    cholesky = decompose(hessian_II, dampening, name)
    scale_I = (hessian_II.diagonal().float() + cholesky.ridge_I).sqrt()
    scaled_II = hessian_II.float() + cholesky.ridge_I.diag()
    scaled_II /= scale_I
    scaled_II /= scale_I[:, None]
    dense_OI = (weight_OI.float() * scale_I).masked_fill_(hessian_II.diagonal() == 0, 0)

    def fitted(start_OI: torch.Tensor, mask_OI: torch.Tensor) -> Updated:
        fitted_OI = conjugate_gradient_on_support(start_OI, pull.rhs_OI, scaled_II, mask_OI, options.fit_steps)
        change_OI = fitted_OI - dense_OI
        loss = float(((change_OI @ scaled_II) * change_OI).sum(dtype=torch.float64)) / 2
        return Updated(fitted_OI / scale_I, mask_OI, loss, cholesky.dampening)

    pull = _Pull(dense_OI, scaled_II, amount, name)
    first = fitted(dense_OI, pull.mask_OI)
    pull.run(options)
    return min(first, fitted(pull.dense_OI, pull.mask_OI), key=lambda updated: updated.loss)


class _Pull:
    """The two matrices, what holds them together, and the penalty."""

    def __init__(self, weight_OI: torch.Tensor, hessian_II: torch.Tensor, amount: Amount, name: str) -> None:
        self.amount, self.name = amount, name
        self.rhs_OI = weight_OI @ hessian_II
        values_I, self.vectors_II = torch.linalg.eigh(hessian_II)
        self.values_I = values_I.clamp(min=0)  # rounding can take the least ones below zero
        self.dense_OI = weight_OI
        self.mask_OI = lowest_mask(weight_OI.square(), amount, name)
        self.sparse_OI = weight_OI.masked_fill(~self.mask_OI, 0)
        self.dual_OI = torch.zeros_like(weight_OI)

    def run(self, options: AlpsOptions) -> None:
        """Iterate until the support stands still.

        A penalty under which the first support never moves holds it too hard and is lowered, down to ``LEAST_RHO``.
        """
        rho, moved, before_OI = options.rho, False, self.mask_OI
        inverse_II = self._inverse(rho)
        for step in range(1, options.steps + 1):
            self._iterate(inverse_II, rho)
            if step % options.check_every:
                continue
            changed = int((self.mask_OI != before_OI).sum()) / max(1, int(self.mask_OI.sum()))
            before_OI = self.mask_OI
            stands = changed == 0 or (step > SETTLED_AFTER and changed < SETTLED)
            if stands and (moved or rho < LEAST_RHO):
                return
            if changed:
                moved = True
                rho *= next(factor for least, factor in GROWTH if changed > least)
            else:
                rho /= 5
            inverse_II = self._inverse(rho)

    def _inverse(self, rho: float) -> torch.Tensor:
        return (self.vectors_II / (self.values_I + rho)) @ self.vectors_II.T

    def _iterate(self, inverse_II: torch.Tensor, rho: float) -> None:
        self.dense_OI = (self.rhs_OI - self.dual_OI).add_(self.sparse_OI, alpha=rho) @ inverse_II
        projected_OI = self.dense_OI + self.dual_OI / rho
        self.mask_OI = lowest_mask(projected_OI.square(), self.amount, self.name)
        self.sparse_OI = projected_OI.masked_fill_(~self.mask_OI, 0)
        self.dual_OI.add_(self.dense_OI - self.sparse_OI, alpha=rho)
