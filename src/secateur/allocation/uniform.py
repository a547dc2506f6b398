"""The same share from every pool: what every family's own config can say."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import torch

from secateur.allocation.pools import Key, Pool
from secateur.errors import RecipeError

ROUNDED = ("channel", "hidden")
"""Kinds whose number kept is rounded: widths of matrices. There are too few heads for that."""


def leaving(pool: Pool, share: float | Fraction, round_to: int = 1) -> int:
    """How many units leave each family: ``int(size * share)``, rounded down as published codes do, and no more than can.

    Widths of matrices are rounded so that a multiple of ``round_to`` is kept: never fewer than the share would keep.
    """
    return rounded(pool, min(int(pool.size * share), pool.most), round_to)


def rounded(pool: Pool, count: int, round_to: int) -> int:
    """``count`` units leaving, or fewer, so that a multiple of ``round_to`` is kept."""
    step = lcm(round_to, pool.multiple)
    if step == 1 or pool.kind not in ROUNDED:
        return count
    return max(0, pool.size - -(-(pool.size - count) // step) * step)


def uniform_amounts(pools: Sequence[Pool], share: float | Fraction, round_to: int = 1) -> dict[Key, int]:
    """How many units leave each family of each pool."""
    return {pool.key: leaving(pool, share, round_to) for pool in pools}


def check_share(pools: Sequence[Pool], share: float | Fraction) -> None:
    """Refuse a share that leaves too few units.

    Raises:
        RecipeError: it names the largest ratio.
    """
    for pool in pools:
        wanted = int(pool.size * share)
        if wanted > pool.most:
            stays = pool.groups[0].minimum
            raise RecipeError(
                f"this takes {wanted} of {pool.size} {pool.kind} units out of {_place(pool)}, where {stays} have to stay; "
                f"give a smaller --ratio (it may take {pool.most} of {pool.size})"
            )


def check_total(pools: Sequence[Pool], share: float | Fraction) -> None:
    """Refuse a share that the pools of a kind together cannot give.

    Raises:
        RecipeError: it names the largest ratio.
    """
    for kind in dict.fromkeys(pool.kind for pool in pools):
        alike = [pool for pool in pools if pool.kind == kind]
        there, most = sum(pool.size for pool in alike), sum(pool.most for pool in alike)
        if int(there * share) > most:
            raise RecipeError(
                f"all blocks together can give {most} of {there} {kind} units, not {int(there * share)}; the largest --ratio is "
                f"{int(1000 * most / there) / 1000:g}"
            )


def lowest_units(pool: Pool, score_U: torch.Tensor, count: int) -> list[int]:
    """The ``count`` lowest units of each family, ascending.

    Units that come in families (query heads of a KV group) leave every family in equal number, each its own lowest.
    """
    return sorted(pool.order(score_U)[:, :count].reshape(-1).tolist())


def _place(pool: Pool) -> str:
    return "the model" if pool.block < 0 else f"block {pool.block}"
