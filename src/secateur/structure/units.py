"""Units: what leaves a block together, and which indices of which parameters that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["producer", "consumer"]


@dataclass(frozen=True)
class Member:
    """The part of one parameter that belongs to the units of a group.

    ``index_UC[u]`` holds, ascending, the indices along ``dim`` that unit ``u`` owns. Channel c of one member
    corresponds to channel c of the others; a member with a multiple of the smallest C (the query rows of a KV
    group, a fused projection) is laid out repeat-major: reshape to (U, repeats, smallest C).
    """

    parameter: str  # name inside the block
    dim: int  # the dimension that is cut
    role: Role  # consumer: zeroing these indices in the dense model is exactly removal
    index_UC: NDArray[np.int64]


@dataclass(frozen=True)
class UnitGroup:
    """Like units of one block, found together: its heads, its query heads or its MLP channels."""

    kind: str  # "head" | "query" | "channel"
    block: int
    module: str  # deepest module inside the block that holds all members; "" is the block itself
    count: int  # U
    families: int  # query: the KV groups, each of count / families consecutive units; the same number leaves each
    members: tuple[Member, ...]  # in execution order


@dataclass(frozen=True)
class Refusal:
    """Units that are there but are not offered, because cutting them would not be exact."""

    kind: str
    block: int
    module: str
    reason: str


@dataclass(frozen=True)
class Structure:
    """Everything the trace found: ``units`` can be cut, ``refused`` says what cannot and why."""

    units: list[UnitGroup]
    refused: list[Refusal]

    def of_block(self, block: int) -> list[UnitGroup]:
        """Return the groups of one block."""
        return [group for group in self.units if group.block == block]


def parameters_per_unit(group: UnitGroup, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return how many parameters leave with one unit of ``group``.

    ``shapes`` maps the names inside the block to shapes. A parameter that two members cut along different
    dimensions is counted once where they cross.
    """
    owned: dict[str, dict[int, int]] = {}
    for member in group.members:
        owned.setdefault(member.parameter, {})[member.dim] = member.index_UC.shape[1]
    total = 0
    for name, cuts in owned.items():
        left = [size - cuts.get(dim, 0) for dim, size in enumerate(shapes[name])]
        total += prod(shapes[name]) - prod(left)
    return total
