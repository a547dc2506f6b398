"""From wishes to ratios and to whole units: the wanted total is always met, and no part gives more than it can.

``L`` numbers the parts among which a total is spread: blocks, or single matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.errors import RecipeError

CLOSE = 1e-9
"""Counts nearer to each other than this are taken to be equal: they come out of divisions."""


def balance(wish_L: Sequence[float], size_L: Sequence[int], ratio: float, most_L: Sequence[float]) -> list[float]:
    """Ratios in proportion to wishes, whose mean weighted by size is ``ratio``.

    A part whose ratio would pass its most gives its most, and the rest share what is missing, again in proportion
    (AlphaPruning scales once and may pass 1, methods §8.2). Parts whose wish is nothing give nothing until all others
    give their most; then they share equally.

    Args:
        wish_L: relative amounts; below zero is nothing. All equal gives ``ratio`` everywhere.
        size_L: what each part holds, in one unit: weights, for example.
        ratio: of the whole, in [0, 1].
        most_L: the largest ratio of each part.

    Returns:
        float64 ratios, each in [0, most].

    Raises:
        RecipeError: the parts together cannot give so much; the message names what they can.
    """
    whole = math.fsum(size_L)
    wanted = ratio * whole
    at_most = math.fsum(size * most for size, most in zip(size_L, most_L, strict=True))
    if wanted > at_most * (1 + CLOSE):
        raise RecipeError(
            f"a ratio of {ratio:g} is more than the blocks can give together, which is {at_most / max(whole, 1):g}; "
            "give a smaller --ratio"
        )
    wish = [max(0.0, float(value)) for value in wish_L]
    ratio_L = [0.0] * len(wish)
    _fill(ratio_L, [index for index, value in enumerate(wish) if value > 0], wish, size_L, most_L, wanted)
    _fill(ratio_L, [index for index, value in enumerate(wish) if not value], [1.0] * len(wish), size_L, most_L, wanted)
    return ratio_L


def _fill(
    ratio_L: list[float],
    free: list[int],
    wish_L: Sequence[float],
    size_L: Sequence[int],
    most_L: Sequence[float],
    wanted: float,
) -> None:
    """Raise the ratios of ``free`` in proportion to their wishes until all parts give ``wanted``, or each its most."""
    while free:
        missing = wanted - math.fsum(size * ratio for size, ratio in zip(size_L, ratio_L, strict=True))
        largest = max(wish_L[index] for index in free)
        part = {index: wish_L[index] / largest for index in free}  # however small the wishes are
        held = math.fsum(size_L[index] * part[index] for index in free)
        if missing <= wanted * 1e-14 or not held:  # what is less is rounding
            return
        full = {index for index in free if missing / held * part[index] >= most_L[index]}
        for index in full or free:
            ratio_L[index] = most_L[index] if full else missing / held * part[index]
        free = [index for index in free if index not in full] if full else []


def apportion(wish_L: Sequence[float], most_L: Sequence[int], total: int) -> list[int]:
    """Whole counts nearest to wished ones that add up to ``total``: the largest remainders are rounded up.

    Of equal remainders the first is rounded up. Where ``most_L`` binds nowhere and the wishes add up to ``total``, each
    count is less than one away from its wish.

    Args:
        wish_L: wished counts; they are scaled to add up to ``total``.
        most_L: how many each part can give: all that it has but those that must stay.
        total: units to give altogether.

    Raises:
        RecipeError: the parts together cannot give so many.
    """
    there = sum(most_L)
    if total > there:
        raise RecipeError(
            f"{total} units are more than the blocks can give together, which is {there}; give a smaller --ratio"
        )
    each = balance(wish_L, [1] * len(wish_L), total / max(1, len(wish_L)), [float(most) for most in most_L])
    counts = [min(most, math.floor(value + CLOSE)) for value, most in zip(each, most_L, strict=True)]
    rest = [round(value - count, 9) for value, count in zip(each, counts, strict=True)]
    room = [index for index in range(len(counts)) if counts[index] < most_L[index]]
    for index in sorted(room, key=lambda index: (-rest[index], index))[: total - sum(counts)]:
        counts[index] += 1
    return counts


def apportion_steps(wish_L: Sequence[float], groups_L: Sequence[int], group: int, ratio: float) -> list[int]:
    """How many weights leave every group of ``group`` in each block: N:M with another N in every block.

    (AlphaPruning's mixed sparsity rounds each block's ratio, methods §8.3; here the total is met too.)

    Args:
        wish_L: wished ratios.
        groups_L: groups of each block: its weights by ``group``.
        ratio: of all weights.

    Returns:
        counts from 0 to ``group - 1``. The weights that leave altogether are off what is asked by at most half of what
        one step of the largest block changes.

    Raises:
        RecipeError: more is asked than one kept weight in every group leaves room for.
    """
    most = (group - 1) / group
    exact = [value * group for value in balance(wish_L, groups_L, ratio, [most] * len(wish_L))]
    counts = [min(group - 1, math.floor(value + CLOSE)) for value in exact]
    missing = ratio * group * math.fsum(groups_L) - math.fsum(
        count * groups for count, groups in zip(counts, groups_L, strict=True)
    )
    rest = [round(value - count, 9) for value, count in zip(exact, counts, strict=True)]
    for index in sorted(range(len(counts)), key=lambda index: (-rest[index], index)):
        if rest[index] > 0 and counts[index] < group - 1 and groups_L[index] < 2 * missing:
            counts[index] += 1
            missing -= groups_L[index]
    return counts
