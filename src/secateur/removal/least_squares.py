"""What is kept of a matrix, fitted anew so that its outputs come closest to the dense ones.

Each function minimises ``tr(D (H + ridge) D^T)`` over the weights that are kept, D being the change of the matrix: the
ridge holds the weights near their old values, not near zero, so what the inputs do not determine stays as it was, and
where everything is kept nothing changes. With a target T the outputs to meet are given instead: the dense model's outputs
times the pruned model's inputs, ``T = W (X_dense^T X_pruned)``, beside ``H = X_pruned^T X_pruned`` in the same unit.
"""

from __future__ import annotations

import torch

from secateur.removal.curvature import DAMPENING, decompose, ridge


def refit_columns(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    kept_K: torch.Tensor,
    dampening: float = DAMPENING,
    target_OI: torch.Tensor | None = None,
    name: str = "the matrix",
) -> torch.Tensor:
    """The columns that stay when others leave altogether: one decomposition serves all rows.

    Args:
        weight_OI: the dense matrix.
        hessian_II: of its inputs, ``(I, I)``.
        kept_K: indices of the inputs that stay, int64.
        dampening: see ``curvature.ridge``.
        target_OI: see above; without it the outputs to meet are those of the dense matrix on these inputs.
        name: the matrix, for errors.

    Returns:
        ``(O, K)`` float32.

    Raises:
        ModelError: the curvature cannot be decomposed.
    """
    if not len(kept_K):
        return weight_OI.new_zeros((len(weight_OI), 0), dtype=torch.float32)
    hessian_KK = hessian_II[kept_K][:, kept_K]
    cholesky = decompose(hessian_KK, dampening, name)
    dtype = cholesky.lower_II.dtype
    product_OI = weight_OI.to(dtype) @ hessian_II[:, kept_K].to(dtype) if target_OI is None else target_OI[:, kept_K]
    rhs_OK = product_OI + weight_OI[:, kept_K] * cholesky.ridge_I
    return torch.cholesky_solve(rhs_OK.to(dtype).T, cholesky.lower_II).T.float().contiguous()


def refit_on_support(
    weight_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    mask_OI: torch.Tensor,
    dampening: float = DAMPENING,
    target_OI: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best weights on a mask, each row's system solved by itself in float64: exact and slow, a measure for others.

    Args:
        weight_OI: the dense matrix.
        hessian_II: of its inputs, ``(I, I)``.
        mask_OI: True where a weight is kept.
        dampening: see ``curvature.ridge``.
        target_OI: see above.

    Returns:
        ``(O, I)`` float32, zero where nothing is kept.
    """
    ridge_I = ridge(hessian_II, dampening).double()
    curvature_II = hessian_II.double() + ridge_I.diag()
    rhs_OI = right_hand_side(weight_OI.double(), hessian_II.double(), ridge_I, target_OI)
    result_OI = torch.zeros_like(rhs_OI)
    for row, mask_I in enumerate(mask_OI):
        kept_K = torch.nonzero(mask_I).reshape(-1)
        # A curvature that is singular on the support (no dampening) has many best solutions; this takes the shortest.
        solved = torch.linalg.lstsq(curvature_II[kept_K][:, kept_K], rhs_OI[row, kept_K, None], driver="gelsd")
        result_OI[row, kept_K] = solved.solution[:, 0]
    return result_OI.float()


def right_hand_side(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor, ridge_I: torch.Tensor, target_OI: torch.Tensor | None = None
) -> torch.Tensor:
    """What the fitted weights times the dampened curvature shall come to, ``(O, I)``."""
    product_OI = weight_OI @ hessian_II if target_OI is None else target_OI.to(weight_OI.dtype)
    return product_OI + weight_OI * ridge_I


def conjugate_gradient_on_support(
    weight_OI: torch.Tensor, rhs_OI: torch.Tensor, hessian_II: torch.Tensor, mask_OI: torch.Tensor, steps: int
) -> torch.Tensor:
    """Some steps towards the best weights on a mask, all rows at once, preconditioned by the diagonal.

    No step raises a row's ``w H w^T / 2 - rhs w^T`` beyond rounding.

    Args:
        weight_OI: where to start; what lies outside the mask is dropped first.
        rhs_OI: see ``right_hand_side``.
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
