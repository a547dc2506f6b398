"""ALPS: mask and weights found together."""

from __future__ import annotations

from pydantic import Field

from secateur.removal.alps import AlpsOptions, alps
from secateur.removal.curvature import decompose
from secateur.removal.least_squares import conjugate_gradient_on_support
from secateur.removal.methods.base import Removed, Task
from secateur.removal.methods.updating import Updating, UpdatingOptions
from secateur.statistics import InputSecondMoment

SETTLES_AFTER = 40
"""Iterations after which the support has stood still in every matrix that was looked at (SmolLM2's, methods §12's defaults)."""

SPECTRUM = 12
"""Operations of a symmetric matrix's spectrum, in cubes of its size, by the time that it takes beside a product."""


class ALPSOptions(UpdatingOptions):
    rho: float = Field(default=0.1, ge=1e-6, le=1e6)  # beside ones on the diagonal; far off float32 ends
    steps: int = Field(default=300, ge=1, le=100_000)
    fit_steps: int = Field(default=10, ge=0, le=100_000)


class ALPS(Updating):
    """min ||W X - W' X||_F^2 by the alternating direction method of multipliers (arXiv 2406.07831; methods §12).

    With a criterion whose scores change as weights do (``sparsegpt``) the mask is found too, starting from magnitudes;
    with any other it is that criterion's, and conjugate gradients fit what stays.
    """

    name = "alps"
    options_type = ALPSOptions

    def remove(self, task: Task) -> Removed:
        if not task.adaptive or task.amount is None:
            return self._fitted(task)
        chosen = self.options
        options = AlpsOptions(rho=chosen.rho, steps=chosen.steps, fit_steps=chosen.fit_steps)
        hessian_II = self.hessian_II(task.of(InputSecondMoment))
        found = alps(
            task.weight_OI, hessian_II, task.amount, dampening=chosen.dampening, options=options, name=task.name
        )
        return Removed(found.mask_OI, found.weight_OI, self.raised(found.dampening))

    def _fitted(self, task: Task) -> Removed:
        """The criterion's mask, and the weights on it fitted."""
        mask_OI, hessian_II = task.choose(), self.hessian_II(task.of(InputSecondMoment))
        found = decompose(hessian_II, self.options.dampening, task.name)
        hessian_II.diagonal().add_(found.ridge_I)
        start_OI = task.weight_OI.masked_fill(~mask_OI, 0)
        weight_OI = conjugate_gradient_on_support(
            start_OI, task.weight_OI @ hessian_II, hessian_II, mask_OI, self.options.fit_steps
        )
        return Removed(mask_OI, weight_OI, self.raised(found.dampening))

    def scratch_bytes(self, outputs: int, inputs: int) -> int:
        return 4 * (
            5 * inputs * inputs + 8 * outputs * inputs
        )  # spectrum, inverse; the two matrices, dual, right-hand side

    def operations(self, outputs: int, inputs: int) -> float:
        # A product a step, and two fits with their errors; the spectrum, and an inverse where the penalty changes.
        steps = min(self.options.steps, SETTLES_AFTER)
        products = steps + 2 * (self.options.fit_steps + 2)
        inverses = steps // AlpsOptions.check_every + 1
        return 2.0 * products * outputs * inputs**2 + (SPECTRUM + 2.0 * inverses) * inputs**3
