"""SparseGPT: column by column, each removal's error made good by the columns that follow."""

from __future__ import annotations

from pydantic import Field

from secateur.removal.amount import Amount
from secateur.removal.methods.base import Removed, Task
from secateur.removal.methods.updating import Updating, UpdatingOptions
from secateur.removal.quantise import Quantiser
from secateur.removal.sparsegpt import sparsegpt
from secateur.statistics import InputSecondMoment


class SparseGPTOptions(UpdatingOptions):
    block_size: int = Field(default=128, ge=1, le=1 << 16)
    bits: int = Field(default=16, ge=2, le=16)


class SparseGPT(Updating):
    """min ||W X - W' X||_F^2 over the weights that stay, approximately (arXiv 2301.00774; methods §3).

    With its own criterion the mask is chosen on the way, block of columns by block of columns; with any other the mask is
    that criterion's, and only the update is SparseGPT's. ``bits`` below 16 also rounds what stays to so many bits a weight
    within the same loop; the checkpoint keeps its dtype.
    """

    name = "sparsegpt"
    options_type = SparseGPTOptions

    def remove(self, task: Task) -> Removed:
        options = self.options
        own = task.adaptive and task.amount is not None
        found = sparsegpt(
            task.weight_OI,
            self.hessian_II(task.of(InputSecondMoment)),
            task.amount or Amount(0, "row"),
            mask_OI=None if own else task.choose(),
            block_size=options.block_size,
            dampening=options.dampening,
            quantiser=Quantiser.of(task.weight_OI, options.bits) if options.bits < 16 else None,
            name=task.name,
        )
        return Removed(found.mask_OI, found.weight_OI, self.raised(found.dampening))

    def scratch_bytes(self, outputs: int, inputs: int) -> int:
        # The Hessian as it is, damped, inverted and factored; the weights twice, and the errors of a block of columns.
        return 4 * (4 * inputs * inputs + 3 * outputs * inputs)

    def operations(self, outputs: int, inputs: int) -> float:
        # The factor; what each column's error does to those after it, half of it a column at a time, which is slower.
        return 5.0 * inputs**3 + 4.0 * outputs * inputs**2
