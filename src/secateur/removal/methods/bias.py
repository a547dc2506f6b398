"""What leaves is replaced by its mean: the expected output goes into the matrix's bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from secateur.removal.methods.base import Removal, Removed, Task
from secateur.statistics import InputMoments, Statistic


class Bias(Removal):
    """b += W_{:,removed} E[x_removed], over all calibration tokens (FLAP, arXiv 2312.11983; methods §12).

    Of inputs that are cut, and of single weights that are zeroed; the weights that stay are as they were, bit for bit. The
    mean output of every matrix on the inputs that were measured is then the dense one's. The model needs biases to hold it:
    those that its family has, or that a switch of its config gives it (see ``biases``).
    """

    name = "bias"
    updates = True
    writes_biases = True
    propagation = "dense"

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputMoments})

    def remove(self, task: Task) -> Removed:
        mask_OI = task.choose()
        return Removed(mask_OI, shift_O=_expected(task.weight_OI.masked_fill(mask_OI, 0), task.of(InputMoments).mean()))

    def refit(
        self, name: str, weight_OI: torch.Tensor, kept_K: torch.Tensor, statistics: Mapping[type[Statistic], Any]
    ) -> Removed:
        stays_OK = torch.ones(len(weight_OI), len(kept_K), dtype=torch.bool, device=weight_OI.device)
        gone_I = torch.ones(weight_OI.shape[1], dtype=torch.bool, device=weight_OI.device)
        gone_I[kept_K] = False
        return Removed(stays_OK, shift_O=_expected(weight_OI[:, gone_I], statistics[InputMoments].mean()[gone_I]))

    def scratch_bytes(self, outputs: int, inputs: int) -> int:
        return 12 * outputs * inputs  # what leaves, and the same in float64


def _expected(weight_OI: torch.Tensor, mean_I: torch.Tensor) -> torch.Tensor:
    """``W E[x]``, ``(O,)`` float64."""
    return weight_OI.double() @ mean_I.double()
