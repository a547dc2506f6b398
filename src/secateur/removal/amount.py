"""How much of one matrix leaves, as whole numbers of weights: for removals that choose while they go."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch


@dataclass(frozen=True)
class Amount:
    """How much of one matrix ``(O, I)`` leaves, and which weights are compared with each other.

    Attributes:
        leaving: weights of the whole matrix that leave; not read under a pattern.
        within: weights compete inside their row, inside a block of consecutive columns over all rows, or in the whole
            matrix, there by their scores or (``share``) by the part of its row's scores that would be gone with them; not
            read under a pattern.
        keep: under a pattern, how many of every ``group`` consecutive inputs of a row stay.
        group: 0 says that there is no pattern.
    """

    leaving: int
    within: Literal["row", "share", "block", "layer"]
    keep: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        if self.leaving < 0 or not (self.group == self.keep == 0 or 0 < self.keep < self.group):
            raise ValueError(f"no matrix can lose this much: {self}")


def row_counts(amount: Amount, shape_OI: tuple[int, int], score_OI: torch.Tensor | None = None) -> torch.Tensor:
    """How many weights leave each row: an equal share, and one more in some rows where the share is not whole.

    One more leaves the rows whose next-lowest score is lowest, of equal ones the upper; without scores the first rows.
    A whole row leaves only where more than ``O * (I - 1)`` weights do.

    Returns:
        ``(O,)`` int64 that sum to ``amount.leaving``.

    Raises:
        ValueError: more leave than there are.
    """
    outputs, inputs = shape_OI
    if amount.leaving > outputs * inputs:
        raise ValueError(f"{amount.leaving} weights cannot leave a matrix of {outputs} x {inputs}")
    share, more = divmod(amount.leaving, max(1, outputs))
    counts_O = torch.full((outputs,), share, dtype=torch.int64)
    if more and score_OI is None:
        counts_O[:more] += 1
    elif more and score_OI is not None:
        next_lowest_O = score_OI.kthvalue(share + 1, dim=1).values
        counts_O[torch.sort(next_lowest_O, stable=True).indices[:more].cpu()] += 1
    return counts_O


def block_counts(amount: Amount, inputs: int, outputs: int, block_size: int) -> list[int]:
    """How many weights leave each block of ``block_size`` consecutive columns (the last one may be narrower).

    Up to the end of every block as many have left as its part of all columns says, rounded down; so they sum to
    ``amount.leaving`` and no block loses more than it has.

    Raises:
        ValueError: more leave than there are.
    """
    if amount.leaving > outputs * inputs:
        raise ValueError(f"{amount.leaving} weights cannot leave a matrix of {outputs} x {inputs}")
    ends = [min(start + block_size, inputs) for start in range(0, inputs, block_size)]
    gone = [0, *(amount.leaving * end // inputs for end in ends)]
    return [after - before for before, after in pairwise(gone)]
