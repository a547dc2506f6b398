"""The curvature of a matrix's squared output error: ``H = X^T X`` up to a factor, dampened and decomposed.

Whatever the factor is, masks and updates are the same (SparseGPT takes 2/N, methods §3.2). A dead input, one that no
calibration token ever used, has ``H_jj = 0``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from secateur.errors import ModelError
from secateur.finite import all_finite

DAMPENING = 0.01
"""SparseGPT's (methods §3.4); between 0.001 and 0.1 it hardly matters (methods §3.7)."""
MOST_DAMPENING = 1.0


@dataclass(frozen=True)
class Factor:
    """The inverse of a dampened curvature as a product.

    Attributes:
        upper_II: upper triangular with ``(H + ridge)^-1 = upper^T upper``, float32.
        dampening: what was used, as a part of the mean of the live diagonal; raised where less would not do.
        dead_I: inputs that nothing came through.
    """

    upper_II: torch.Tensor
    dampening: float
    dead_I: torch.Tensor


@dataclass(frozen=True)
class Cholesky:
    """A dampened curvature as ``H + diag(ridge) = lower lower^T``, in float32 or, where that is too coarse, float64."""

    lower_II: torch.Tensor
    ridge_I: torch.Tensor
    dampening: float


def ridge(hessian_II: torch.Tensor, dampening: float) -> torch.Tensor:
    """What dampening adds to the diagonal, ``(I,)``: a part of its mean, and 1 besides for dead inputs.

    The mean is taken over live inputs. The published code takes it over all of them, dead ones as 1 (methods §3.2), which
    drowns small activations as soon as one input is dead; without dead inputs the two are the same.
    """
    diagonal_I = hessian_II.diagonal().float()
    live_I = diagonal_I != 0
    mean = diagonal_I.sum() / live_I.sum().clamp(min=1)
    return dampening * mean + (~live_I).float()


def decompose(hessian_II: torch.Tensor, dampening: float, name: str) -> Cholesky:
    """The Cholesky factor of the dampened curvature.

    Float32 is tried first, then float64, then ten times the dampening, and so on up to 1.

    Args:
        hessian_II: ``(I, I)`` symmetric, left as it is.
        dampening: see ``ridge``.
        name: the matrix, for the error.

    Raises:
        ModelError: the curvature is not finite, or no dampening makes it positive definite.
    """
    if not all_finite(hessian_II):
        raise ModelError(
            f"the inputs of '{name}' are not all finite numbers, so its weights cannot be updated; "
            "open the model in float32, or choose a removal without an update"
        )
    for attempt in _dampenings(dampening):
        ridge_I = ridge(hessian_II, attempt)
        for dtype in (torch.float32, torch.float64):
            lower_II = _lower(hessian_II, ridge_I, dtype)
            if lower_II is not None:
                return Cholesky(lower_II, ridge_I, attempt)
    raise ModelError(
        f"the inputs of '{name}' give no positive definite curvature, even dampened by {MOST_DAMPENING:g}; "
        "give more calibration text, or choose a removal without an update"
    )


def factor(hessian_II: torch.Tensor, dampening: float = DAMPENING, name: str = "the matrix") -> Factor:
    """The factor that SparseGPT walks along (arXiv 2301.00774, section 3.3; methods §3.2 steps 2 and 3).

    Its row j over ``upper_jj`` is the direction of the update when column j is frozen, and ``upper_jj^2`` what the
    optimal brain surgeon divides by. The published code inverts H and decomposes the inverse; decomposing H from its
    last column to its first and inverting the triangle gives the same matrix with less work and less rounding.

    Raises:
        ModelError: as ``decompose``.
    """
    cholesky = decompose(hessian_II.flip(0, 1), dampening, name)
    triangle_II = cholesky.lower_II.flip(0, 1)
    identity_II = torch.eye(len(triangle_II), dtype=triangle_II.dtype, device=triangle_II.device)
    upper_II = torch.linalg.solve_triangular(triangle_II, identity_II, upper=True)
    return Factor(upper_II.float(), cholesky.dampening, hessian_II.diagonal() == 0)


def _dampenings(first: float) -> Iterator[float]:
    yield first
    attempt = first or DAMPENING / 10
    while (attempt := min(attempt * 10, MOST_DAMPENING)) > first:
        yield attempt
        if attempt == MOST_DAMPENING:
            return


def _lower(hessian_II: torch.Tensor, ridge_I: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The lower factor, or nothing where this dtype cannot tell it from a singular matrix's.

    A pivot is what earlier columns leave unexplained of a column; below the rounding of the column's own size it is noise.
    """
    work_II = hessian_II.to(dtype, copy=True)
    work_II.diagonal().add_(ridge_I)
    diagonal_I = work_II.diagonal().clone()
    lower_II, failed = torch.linalg.cholesky_ex(work_II)
    noise = torch.finfo(dtype).eps * len(work_II) ** 0.5
    if failed or not bool((lower_II.diagonal().square() > noise * diagonal_I).all()):
        return None
    return lower_II
