"""Pools: units that are chosen among each other, and how many of them can leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from secateur.removal.decision import Removals, within
from secateur.structure import OUTSIDE, Structure, UnitGroup, parameters_per_unit

Key = tuple[str, int, str]
"""Kind, block and module: what names a pool, in a plan too."""

Chosen = dict[Key, list[int]]
"""For each pool the units that leave, ascending."""

STACKED_MULTIPLE = 8

ShapesOf = Callable[[int], Mapping[str, Sequence[int]]]
"""Shapes of a block, or (``OUTSIDE``) of what stands outside the blocks, by the names that its groups use."""


@dataclass(frozen=True)
class Pool:
    """Like units of which the lowest leave.

    Attributes:
        groups: the same units leave from all of them: one group, or, for hidden channels, one a block and one outside.
        may_leave: the units among which is chosen; the rest stays (blocks that may not be pruned).
    """

    kind: str
    groups: tuple[UnitGroup, ...]
    may_leave: tuple[int, ...]

    @property
    def block(self) -> int:
        """The block that all of it stands in, if it is one."""
        return self.groups[0].block if len(self.groups) == 1 else OUTSIDE

    @property
    def key(self) -> Key:
        return self.kind, self.block, self.groups[0].module

    @property
    def families(self) -> int:
        return self.groups[0].families

    @property
    def size(self) -> int:
        """Units of one family that may leave; a ratio is a share of them."""
        return len(self.may_leave) // self.families

    @property
    def multiple(self) -> int:
        """What the number kept is a multiple of whatever ``round_to`` is.

        Stacked expert matrices are multiplied by a kernel that wants rows of whole 16 bytes: eight 16-bit numbers.
        """
        is_stacked = any(member.dim >= 2 for group in self.groups for member in group.members)
        return STACKED_MULTIPLE if is_stacked else 1

    @property
    def most(self) -> int:
        """How many can leave a family."""
        group = self.groups[0]
        return max(0, min(self.size, group.count // group.families - group.minimum))

    def order(self, score_U: torch.Tensor) -> torch.Tensor:
        """The units of every family ``(families, size)``, lowest score first; of equal scores the lower index."""
        units = torch.tensor(self.may_leave).reshape(self.families, self.size)
        return units.gather(1, torch.sort(score_U[units], dim=1, stable=True).indices)

    def sizes(self, shapes_of: ShapesOf) -> torch.Tensor:
        """How many parameters each unit holds, ``(U,)`` int64."""
        if self.kind == "block":
            held = [sum(torch.Size(s).numel() for s in shapes_of(i).values()) for i in range(self.groups[0].count)]
            return torch.tensor(held)
        places = [(group, shapes_of(group.block)) for group in self.groups]
        each = sum(parameters_per_unit(within(group, shapes), shapes) for group, shapes in places)
        return torch.full((self.groups[0].count,), each)


def pools_of(structure: Structure, kind: str, blocks: Iterable[int]) -> list[Pool]:
    """The pools of one kind, of which only ``blocks`` may give something."""
    allowed = set(blocks)
    groups = [group for group in structure.units if group.kind == kind]
    if kind == "block":
        return [Pool(kind, (group,), tuple(u for u in range(group.count) if u in allowed)) for group in groups]
    if kind == "hidden":
        return [Pool(kind, tuple(groups), tuple(range(groups[0].count)))] if groups else []
    return [Pool(kind, (group,), tuple(range(group.count))) for group in groups if group.block in allowed]


def leave_everywhere(pools: Sequence[Pool], chosen: Mapping[Key, list[int]]) -> dict[int, Removals]:
    """What leaves each block, and (``OUTSIDE``) the rest; out of a block that leaves as a whole nothing else does."""
    dropped = {unit for (kind, _, _), units in chosen.items() if kind == "block" for unit in units}
    everywhere: dict[int, Removals] = {}
    for pool in pools:
        for group in pool.groups if pool.key in chosen else ():
            if group.block not in dropped:
                everywhere.setdefault(group.block, []).append((group, chosen[pool.key]))
    return everywhere
