"""What is kept of a matrix, fitted anew so that its outputs come closest to the dense ones.

Each function minimises ``tr(D (H + ridge) D^T)`` over the weights that are kept, D being the change of the matrix: the
ridge holds the weights near their old values, not near zero, so what the inputs do not determine stays as it was, and
where everything is kept nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.removal.curvature import DAMPENING, decompose


@dataclass(frozen=True)
class Refitted:
    """Columns that were fitted.

    Attributes:
        weight_OK: ``(O, K)`` float32.
        dampening: the part of the mean diagonal that was added; more than was asked for where that would not do.
    """

    weight_OK: torch.Tensor
    dampening: float


def refit_columns(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    kept_K: torch.Tensor,
    dampening: float = DAMPENING,
    name: str = "the matrix",
) -> Refitted:
    """The columns that stay when others leave altogether: one decomposition serves all rows.

    Args:
        weight_OI: the dense matrix.
        hessian_II: of its inputs, ``(I, I)``.
        kept_K: indices of the inputs that stay, int64.
        dampening: see ``curvature.ridge``.
        name: the matrix, for errors.

    Raises:
        ModelError: the curvature cannot be decomposed.
    """
    if not len(kept_K):
        return Refitted(weight_OI.new_zeros((len(weight_OI), 0), dtype=torch.float32), dampening)
    cholesky = decompose(hessian_II[kept_K][:, kept_K], dampening, name)
    dtype = cholesky.lower_II.dtype
    product_OK = weight_OI.to(dtype) @ hessian_II[:, kept_K].to(dtype)
    rhs_OK = product_OK + weight_OI[:, kept_K] * cholesky.ridge_I
    weight_OK = torch.cholesky_solve(rhs_OK.to(dtype).T, cholesky.lower_II).T.float().contiguous()
    return Refitted(weight_OK, cholesky.dampening)


def conjugate_gradient_on_support(
    weight_OI: torch.Tensor, rhs_OI: torch.Tensor, hessian_II: torch.Tensor, mask_OI: torch.Tensor, steps: int
) -> torch.Tensor:
    """Some steps towards the best weights on a mask, all rows at once, preconditioned by the diagonal.

    No step raises a row's ``w H w^T / 2 - rhs w^T`` beyond rounding.

    Args:
        weight_OI: where to start; what lies outside the mask is dropped first.
        rhs_OI: what the fitted weights times the dampened curvature shall come to: the dense weights times it.
        hessian_II: ``(I, I)``, already dampened.
        mask_OI: True where a weight is kept.
        steps: at most this many.

    Returns:
        ``(O, I)`` float32, zero outside the mask.
    """
    inverse_I = hessian_II.diagonal().clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    inverse_I = torch.where(hessian_II.diagonal() > 0, inverse_I, 0)
    result_OI = weight_OI.float().masked_fill(~mask_OI, 0)
    residual_OI = (rhs_OI - result_OI @ hessian_II).masked_fill_(~mask_OI, 0)
    direction_OI = residual_OI * inverse_I
    descent_O = (residual_OI * direction_OI).sum(dim=1)
    for _ in range(steps):
        curved_OI = direction_OI @ hessian_II
        length_O = _ratio(descent_O, (direction_OI * curved_OI).sum(dim=1))
        result_OI.addcmul_(direction_OI, length_O[:, None])
        residual_OI.addcmul_(curved_OI.masked_fill_(~mask_OI, 0), length_O[:, None], value=-1)
        before_O, scaled_OI = descent_O, residual_OI * inverse_I
        descent_O = (residual_OI * scaled_OI).sum(dim=1)
        direction_OI = scaled_OI.addcmul_(direction_OI, _ratio(descent_O, before_O)[:, None])
    return result_OI


def _ratio(above_O: torch.Tensor, below_O: torch.Tensor) -> torch.Tensor:
    """Zero where a row has arrived and there is nothing left to divide by."""
    return torch.where(below_O > 0, above_O / below_O, 0)
