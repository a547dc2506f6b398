"""Units: what leaves a block together, and which indices of which parameters that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["producer", "consumer", "choice"]

OUTSIDE = -1
"""The block number of groups that stand outside the blocks: embeddings, final norm and head; and whole blocks."""


@dataclass(frozen=True)
class Member:
    """The part of one parameter that belongs to the units of a group.

    ``index_UC[u]`` holds, ascending, the indices along ``dim`` that unit ``u`` owns. Channel c of one member
    corresponds to channel c of the others; a member with more of them (the query rows of a KV group, a fused projection)
    is laid out repeat-major: reshape to (U, repeats, common divisor of all C).
    """

    parameter: str  # name inside the block (of a group outside the blocks: inside the model)
    dim: int  # the dimension that is cut
    # consumer: zeroing these indices in the dense model is exactly removal. choice: what a router chooses by; removal
    # makes its product (of a bias: its entry) minus infinity.
    role: Role
    index_UC: NDArray[np.int64]


@dataclass(frozen=True)
class Norm:
    """A module whose statistics run over the units: masked out, they are taken over those that stay."""

    module: str  # inside the block; its input and output have the same last dimension
    index_UC: NDArray[np.int64]  # what each unit owns of that dimension


@dataclass(frozen=True)
class Argument:
    """A tensor without parameters that has an entry for each unit, such as ALiBi slopes: it is cut where it enters."""

    path: str  # keyword or number of the block's argument, or "buffer:NAME" inside the block
    dim: int
    period: int  # the dimension is a repetition (over the batch) of this many entries
    index_UC: NDArray[np.int64]  # what each unit owns of one period


@dataclass(frozen=True)
class UnitGroup:
    """Like units found together: the heads of a block, its channels; all hidden channels; all blocks.

    ``hidden`` units span the model: one group for each block and one outside the blocks (``block`` is ``OUTSIDE``) have
    the same count, and the same units leave from all of them. ``block`` units are one group without members, outside;
    unit i is block i.
    """

    kind: str  # "head" | "query" | "channel" | "expert" | "hidden" | "block"
    block: int
    module: str  # deepest module inside the block that holds all members; "" is the block itself
    count: int  # U
    families: int  # query: the KV groups, each of count / families consecutive units; the same number leaves each
    members: tuple[Member, ...]  # in execution order
    norms: tuple[Norm, ...] = ()
    arguments: tuple[Argument, ...] = ()
    minimum: int = 1  # how many units have to stay in every family: experts that a token needs


@dataclass(frozen=True)
class Refusal:
    """Units that are there but are not offered, because cutting them would not be exact."""

    kind: str
    block: int
    module: str
    reason: str
    obstacles: frozenset[str] = frozenset()


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
