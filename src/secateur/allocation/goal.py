"""How much has to leave, whether asked as a ratio or as a target, in one round or a part of it in each of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from secateur.allocation.pools import Key
from secateur.errors import RecipeError
from secateur.quantities import Target
from secateur.structure import OUTSIDE

HALVINGS = 40


@dataclass(frozen=True)
class Goal:
    """One of three: a number for each pool, parameters for each ranking, or what remains of the model.

    Attributes:
        leaving: how many units leave each family of each pool.
        budgets: how many parameters leave each ranking.
        unit_sizes: for the rankings, how many parameters each unit of a pool holds in the dense model, ``(U,)``; a single
            number where they are alike.
        remains: of the target's measure, what the dense model has, and the most that may remain.
    """

    leaving: dict[Key, int] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)
    unit_sizes: dict[Key, torch.Tensor] = field(default_factory=dict)
    remains: tuple[int, int] | None = None

    def part(self, step: int, steps: int, blocks: Sequence[int], gone: Mapping[Key, Sequence[int]]) -> Goal:
        """What round ``step`` (from 1) of ``steps`` takes.

        The schedule is linear in the dense model's counts, as LLM-Pruner's iterative steps are.

        Args:
            blocks: dense numbers of the blocks that are left.
            gone: what the rounds before took, in the dense model's numbers.
        """
        number = {old: new for new, old in enumerate(blocks)} | {OUTSIDE: OUTSIDE}
        spent = dict.fromkeys(self.budgets, 0)
        for key, units in gone.items():
            if key in self.unit_sizes:
                name = key[0] if key[0] in spent else "together"
                sizes = self.unit_sizes[key]
                spent[name] += int(sizes) * len(units) if len(sizes) == 1 else int(sizes[list(units)].sum())
        return Goal(
            leaving={
                (kind, number[block], module): count * step // steps - count * (step - 1) // steps
                for (kind, block, module), count in self.leaving.items()
                if block in number
            },
            budgets={name: max(0, budget * step // steps - spent[name]) for name, budget in self.budgets.items()},
            unit_sizes={
                (kind, number[block], module): sizes if len(sizes) == 1 else sizes[list(blocks)]
                for (kind, block, module), sizes in self.unit_sizes.items()
                if block in number
            },
            remains=self.remains
            and (self.remains[0], self.remains[0] - (self.remains[0] - self.remains[1]) * step // steps),
        )


@dataclass(frozen=True)
class Solved:
    """How a target was met.

    Attributes:
        share: the common ratio found.
        short: the next smaller one, which leaves too much.
        reached: of the measure.
        before: what ``short`` would leave: more than the target allows.
    """

    share: float
    short: float
    reached: int
    before: int


def solve(target: Target, at_most: int, cost: Callable[[float], int], units: str) -> Solved:
    """The smallest share whose model costs at most ``at_most``.

    Args:
        cost: of the model out of which this share, from 0 to 1, has left; what cannot leave stays.
        units: what may leave, for the message.

    Raises:
        RecipeError: the model is that small already, or cannot become so; the message names the smallest reachable.
    """
    dense, smallest = cost(0.0), cost(1.0)
    if dense <= at_most:
        raise RecipeError(
            f"the model has {target.describe(dense)} already, and the target is {target.describe(at_most)}: nothing has to leave"
        )
    if smallest > at_most:
        raise RecipeError(
            f"{target.describe(at_most)} cannot be reached with {units} units: the smallest is {target.describe(smallest)}; "
            "give a larger --target or more kinds of --unit"
        )
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if cost(middle) <= at_most:
            high = middle
        else:
            low = middle
    return Solved(high, low, cost(high), cost(low))


def solve_by_kind(
    target: Target, at_most: int, cost: Callable[[Mapping[str, float]], int], kinds: Sequence[str]
) -> tuple[Solved, dict[str, float]]:
    """The ratio of each kind that meets the target: one for all, as far as counts allow.

    Where the coarsest kind (a head) jumps past the target, it is held at the step before, and finer ones give what is missing.

    Args:
        cost: of the model out of which these shares, by kind, have left.
        kinds: coarsest first.

    Raises:
        RecipeError: as ``solve``.
    """
    held: dict[str, float] = {}
    best: tuple[Solved, dict[str, float]] | None = None
    for number, kind in enumerate(kinds):
        free = kinds[number:]

        def shares(share: float, free: Sequence[str] = free) -> dict[str, float]:
            return held | dict.fromkeys(free, share)

        try:
            solved = solve(target, at_most, lambda share, shares=shares: cost(shares(share)), " and ".join(kinds))  # type: ignore[misc]
        except RecipeError:
            if best is None:
                raise
            break  # the finer kinds alone cannot give it
        if best is None or solved.reached > best[0].reached:
            best = solved, shares(solved.share)
        held[kind] = solved.short
    if best is None:
        raise ValueError("there are no kinds to take from")
    return best
