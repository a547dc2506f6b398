"""DSnoT: a mask refined without training, by swapping weights until each row's expected output error is near zero.

arXiv 2310.08915; methods §7. What the published code does wrong is not repeated: weights that were kept are never
"regrown", inputs of no variance have a place in the order, and a row that runs out of candidates stops (methods §7.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from secateur.errors import RecipeError

CHUNK = 1 << 22
"""Weights sorted together: orders and keys are several times as large as the weights."""


@dataclass(frozen=True)
class SwapOptions:
    """When to swap (methods §7.4).

    Attributes:
        max_cycles: swaps per row at most.
        update_threshold: a row with an error of at most this is left alone; for windows of 2048 tokens.
        power: of the variance, by which an expected contribution is divided before weights are regrown.
        same_sign: stop a row before a swap that turns the sign of its error, so that the error never grows. The published
            command line leaves this out; N:M always has it.
    """

    max_cycles: int = 50
    update_threshold: float = 0.1
    power: float = 1.0
    same_sign: bool = True


def refine(
    mask_OI: torch.Tensor,
    weight_OI: torch.Tensor,
    mean_I: torch.Tensor,
    variance_I: torch.Tensor,
    norm_I: torch.Tensor,
    options: SwapOptions | None = None,
    group: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Swap removed weights for kept ones in each row; how many are kept stays the same (methods §7.2, §7.3).

    A row's error is the sum of ``w_ij * mean_j`` over what is removed. Each swap regrows the removed weight that lowers it
    most for its variance. In its stead leaves the kept weight of the lowest Wanda score whose contribution has the other
    sign, or, under N:M, the one of the lowest score in the same group. Of equal ones the lower index comes first, and no
    weight moves twice.

    Args:
        mask_OI: True where a weight is kept.
        weight_OI: the dense matrix.
        mean_I: mean over windows of the sum over tokens of x_j, the unit of ``update_threshold`` (methods §7.1).
        variance_I: of x_j within a window.
        norm_I: ``||X_j||_2``, up to a factor.
        options: the defaults if left out.
        group: (N, M) where the mask keeps N of every M inputs.

    Returns:
        the refined mask, ``(O, I)`` boolean.

    Raises:
        RecipeError: M does not divide the number of inputs.
    """
    inputs = mask_OI.shape[1]
    if group and inputs % group[1]:
        raise RecipeError(f"{group[0]}:{group[1]} needs widths that {group[1]} divides, not {inputs}; choose another M")
    options = options or SwapOptions()
    result_OI = mask_OI.clone()
    step = max(1, CHUNK // max(1, inputs))
    for start in range(0, len(mask_OI), step):
        rows = slice(start, start + step)
        score_RI = weight_OI[rows].float().abs() * norm_I
        contribution_RI = weight_OI[rows].float() * mean_I
        key_RI = contribution_RI.double() / _divisor(variance_I, options.power)
        swaps = _Swaps(mask_OI[rows], contribution_RI, key_RI, score_RI, group[1] if group else 0)
        swaps.run(result_OI[rows], options)
    return result_OI


def _divisor(variance_I: torch.Tensor, power: float) -> torch.Tensor:
    """The variance to a power, never zero: the contribution of an input that does not vary is sure, so it goes first."""
    return variance_I.double().clamp(min=torch.finfo(torch.float32).tiny) ** power


class _Swaps:
    """Some rows of a matrix, all swapped in step; of each row what may still move, in order."""

    def __init__(
        self,
        mask_RI: torch.Tensor,
        contribution_RI: torch.Tensor,
        key_RI: torch.Tensor,
        score_RI: torch.Tensor,
        group: int,
    ) -> None:
        self.contribution_RI, self.group = contribution_RI, group
        # Stable, so that it does not depend on the machine which of equal ones comes first.
        self.removed_RI, self.removed_R = _order(key_RI, ~mask_RI)
        if group:
            self.kept_score_RI = score_RI.masked_fill(~mask_RI, torch.inf)
        else:
            self.negative_RI, self.negative_R = _order(score_RI, mask_RI & (contribution_RI < 0))
            self.positive_RI, self.positive_R = _order(score_RI, mask_RI & (contribution_RI > 0))
        self.error_R = contribution_RI.double().masked_fill(mask_RI, 0).sum(dim=1)
        # How many have been taken from the low and the high end, and of the kept ones of either sign.
        self.low_R, self.high_R, self.negatives_R, self.positives_R = torch.zeros_like(self.removed_R).repeat(4, 1)

    def run(self, mask_RI: torch.Tensor, options: SwapOptions) -> None:
        """Swap in ``mask_RI`` until every row is done."""
        sign_R = self.error_R.sign()
        active_R = torch.ones_like(sign_R, dtype=torch.bool)
        for _ in range(options.max_cycles):
            active_R &= (self.error_R.abs() > options.update_threshold) & (self.low_R + self.high_R < self.removed_R)
            rising_R = self.error_R > 0
            regrown_R1 = self._next_regrown(rising_R)
            pruned_R1, there_is_R = self._next_pruned(rising_R, regrown_R1)
            change_R1 = self.contribution_RI.gather(1, pruned_R1).double() - self.contribution_RI.gather(1, regrown_R1)
            after_R = self.error_R + change_R1[:, 0]
            active_R &= there_is_R
            if options.same_sign or self.group:
                active_R &= after_R.sign() == sign_R
            if not bool(active_R.any()):
                return
            self.error_R = torch.where(active_R, after_R, self.error_R)
            self._swap(mask_RI, active_R, rising_R, regrown_R1, pruned_R1)

    def _next_regrown(self, rising_R: torch.Tensor) -> torch.Tensor:
        """The removed weight that lowers the error most: from the high end of the order where the error is above zero."""
        place_R = torch.where(rising_R, self.removed_R - 1 - self.high_R, self.low_R)
        return self._at(self.removed_RI, place_R)

    def _next_pruned(self, rising_R: torch.Tensor, regrown_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept weight that leaves for it, and for each row whether there is one."""
        if self.group:
            start_R1 = regrown_R1 // self.group * self.group
            inputs_RM = start_R1 + torch.arange(self.group, device=start_R1.device)
            score_RM = self.kept_score_RI.gather(1, inputs_RM)
            lowest_R1 = score_RM.argmin(dim=1, keepdim=True)
            return start_R1 + lowest_R1, score_RM.gather(1, lowest_R1)[:, 0] < torch.inf
        negative_R1 = self._at(self.negative_RI, self.negatives_R)
        positive_R1 = self._at(self.positive_RI, self.positives_R)
        there_is_R = torch.where(rising_R, self.negatives_R < self.negative_R, self.positives_R < self.positive_R)
        return torch.where(rising_R[:, None], negative_R1, positive_R1), there_is_R

    def _swap(
        self,
        mask_RI: torch.Tensor,
        active_R: torch.Tensor,
        rising_R: torch.Tensor,
        regrown_R1: torch.Tensor,
        pruned_R1: torch.Tensor,
    ) -> None:
        rows = torch.nonzero(active_R).reshape(-1)
        mask_RI[rows, regrown_R1[rows, 0]] = True
        mask_RI[rows, pruned_R1[rows, 0]] = False
        if self.group:
            self.kept_score_RI[rows, pruned_R1[rows, 0]] = torch.inf
        self.high_R += active_R & rising_R
        self.negatives_R += active_R & rising_R
        self.low_R += active_R & ~rising_R
        self.positives_R += active_R & ~rising_R

    def _at(self, order_RI: torch.Tensor, place_R: torch.Tensor) -> torch.Tensor:
        """The input at a place of each row's order; of a row that has run out anything, for it is not used."""
        return order_RI.gather(1, place_R.clamp(0, order_RI.shape[1] - 1)[:, None])


def _order(key_RI: torch.Tensor, among_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's inputs by ascending key, those of ``among_RI`` first, and how many these are."""
    largest = torch.finfo(key_RI.dtype).max
    key_RI = key_RI.clamp(-largest, largest).masked_fill_(~among_RI, torch.inf)
    return torch.sort(key_RI, dim=1, stable=True).indices, among_RI.sum(dim=1)
