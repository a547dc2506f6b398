"""DSnoT: a mask refined by swaps, the weights as they were."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.options import Options
from secateur.removal.dsnot import SwapOptions, refine
from secateur.removal.methods.base import Removal, Removed, Task
from secateur.statistics import InputMean, InputNorm, InputVariance, Statistic


class DSnoTOptions(Options):
    cycles: int = Field(default=50, ge=0, le=1_000_000)
    threshold: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    power: float = Field(default=1.0, ge=0, le=16)
    sign: Literal["same", "any"] = "same"
    skip: str = ""


class DSnoT(Removal):
    """Swaps removed weights for kept ones until each row's expected output error is near zero (arXiv 2310.08915; methods §7).

    The mask that the criterion gives is where it starts, N:M as well; how many leave each row stays. ``cycles``,
    ``threshold`` and ``power`` are the published defaults; ``sign=same`` stops a row before its error changes sign, as the
    paper has it and N:M always does; matrices whose name contains ``skip`` keep their first mask.
    """

    name = "dsnot"
    options_type = DSnoTOptions

    def needs(self) -> frozenset[type[Statistic]]:
        return frozenset({InputMean, InputVariance, InputNorm})

    def remove(self, task: Task) -> Removed:
        options, amount = self.options, task.amount
        if options.skip and options.skip in task.name:
            return Removed(task.choose())
        swaps = SwapOptions(options.cycles, options.threshold, options.power, options.sign == "same")
        pattern = (amount.keep, amount.group) if amount is not None and amount.group else None
        return Removed(
            refine(
                task.choose(),
                task.weight_OI,
                task.of(InputMean).mean(),
                task.of(InputVariance).mean(),
                task.of(InputNorm).norm_I(),
                swaps,
                pattern,
            )
        )


class PublishedDSnoTOptions(DSnoTOptions):
    sign: Literal["same", "any"] = "any"
    skip: str = "mlp"


class PublishedDSnoT(DSnoT):
    """DSnoT as its published command line runs by default: errors may change sign, and MLP matrices keep their first mask
    (methods §7.4)."""

    name = "dsnot-published"
    options_type = PublishedDSnoTOptions
