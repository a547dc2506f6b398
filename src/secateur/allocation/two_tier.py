"""Both ends kept whole, the same share from every block between them (LLM-Pruner's published choice, methods §14.3)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from secateur.allocation.pools import Key, Pool
from secateur.allocation.uniform import leaving
from secateur.errors import RecipeError


def two_tier_amounts(
    pools: Sequence[Pool], everywhere: Sequence[Pool], ratio: float | Fraction, round_to: int = 1
) -> dict[Key, int]:
    """How many units leave each family of the pools in the middle, so that of the whole model ``ratio`` leaves.

    As published: 25 % out of 26 of 32 blocks are 20 % of all.

    Args:
        pools: of the middle.
        everywhere: of all blocks, the ends too.
    """
    shares = {kind: middle_share(pools, everywhere, ratio, kind) for kind in {pool.kind for pool in pools}}
    return {pool.key: leaving(pool, shares[pool.kind], round_to) for pool in pools}


def middle_share(pools: Sequence[Pool], everywhere: Sequence[Pool], ratio: float | Fraction, kind: str) -> Fraction:
    """The share of the middle's units of one kind that is ``ratio`` of the whole model's."""
    exact = Fraction(str(ratio)) if isinstance(ratio, float) else Fraction(ratio)
    whole, middle = (sum(len(pool.may_leave) for pool in some if pool.kind == kind) for some in (everywhere, pools))
    return exact * whole / middle


def check_middle(pools: Sequence[Pool], everywhere: Sequence[Pool], ratio: float) -> None:
    """Refuse a ratio that the middle cannot give.

    Raises:
        RecipeError: it names the largest ratio.
    """
    for kind in dict.fromkeys(pool.kind for pool in pools):
        share = middle_share(pools, everywhere, ratio, kind)
        alike = [pool for pool in pools if pool.kind == kind]
        if any(int(pool.size * share) > pool.most for pool in alike):
            largest = min(Fraction(pool.most, pool.size) for pool in alike) * Fraction(str(ratio)) / share
            raise RecipeError(
                f"the blocks between the protected ends cannot give {ratio:g} of all {kind} units; the largest --ratio is "
                f"{int(1000 * largest) / 1000:g}, or give a smaller --protect"
            )
