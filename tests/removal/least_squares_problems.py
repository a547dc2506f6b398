"""Matrices with the curvature of random inputs, and what a change of them costs, written plainly."""

from __future__ import annotations

import torch

from secateur.removal.curvature import DAMPENING, ridge


def problem(outputs: int, inputs: int, seed: int = 0, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight ``(O, I)`` and ``X^T X / T`` of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * inputs
    mix_II = torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x_TI = torch.randn(tokens, inputs, generator=generator) @ mix_II * (torch.rand(inputs, generator=generator) + 0.2)
    return torch.randn(outputs, inputs, generator=generator), x_TI.T @ x_TI / tokens


def with_dead(hessian_II: torch.Tensor, dead: list[int]) -> torch.Tensor:
    """The same curvature with nothing coming through some inputs."""
    hessian_II = hessian_II.clone()
    hessian_II[dead] = 0
    hessian_II[:, dead] = 0
    return hessian_II


def refit_on_support(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor, mask_OI: torch.Tensor, dampening: float = DAMPENING
) -> torch.Tensor:
    """The best weights on a mask ``(O, I)``, each row's system solved by itself in float64; zero where nothing is kept."""
    curvature_II = hessian_II.double() + ridge(hessian_II, dampening).double().diag()
    rhs_OI = weight_OI.double() @ curvature_II
    result_OI = torch.zeros_like(rhs_OI)
    for row, mask_I in enumerate(mask_OI):
        kept_K = torch.nonzero(mask_I).reshape(-1)
        # A curvature that is singular on the support (no dampening) has many best solutions; this takes the shortest.
        solved = torch.linalg.lstsq(curvature_II[kept_K][:, kept_K], rhs_OI[row, kept_K, None], driver="gelsd")
        result_OI[row, kept_K] = solved.solution[:, 0]
    return result_OI.float()


def cost(new_OI: torch.Tensor, old_OI: torch.Tensor, hessian_II: torch.Tensor, dampening: float = 0.01) -> float:
    """``tr(D (H + ridge) D^T) / 2`` in float64."""
    change_OI = (new_OI - old_OI).double()
    curvature_II = hessian_II.double() + ridge(hessian_II, dampening).double().diag()
    return float(((change_OI @ curvature_II) * change_OI).sum() / 2)


def close(one: float, other: float, relative: float = 1e-4) -> bool:
    return abs(one - other) <= relative * max(abs(one), abs(other), 1e-30)
