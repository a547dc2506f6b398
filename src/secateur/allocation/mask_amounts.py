"""How many single weights leave each matrix."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from secateur.allocation.shares import apportion, apportion_steps
from secateur.recipe import Recipe
from secateur.removal.amount import Amount

Shapes = Mapping[int, Mapping[str, tuple[int, int]]]
"""By block and matrix the shape ``(O, I)`` that a cut leaves."""

Ratios = Mapping[int, Mapping[str, float]]
"""By block and matrix the share that leaves."""


class MaskAmounts:
    """The amount of every matrix, out of a recipe.

    Under a uniform allocation each comparison group gives its ratio rounded down, as published codes count. Where every
    block has its own ratio the counts of all matrices add up to the recipe's share of all weights exactly; under N:M a
    block can only give whole weights of every group, so the total is off by at most half of such a step. Either way
    as many weights stay as there are rows, or groups, so that none is emptied.

    Args:
        ratios: by block and matrix; None is uniform.
        shapes: by block and matrix, where there are ratios.

    Raises:
        RecipeError: the blocks cannot give so much.
    """

    def __init__(self, recipe: Recipe, ratios: Ratios | None = None, shapes: Shapes | None = None) -> None:
        self._recipe = recipe
        self._counted: dict[tuple[int, str], Amount] | None = None
        if ratios is not None and shapes is not None:
            count = _counted_patterns if recipe.n_of_m else _counted_weights
            self._counted = count(recipe, ratios, shapes)

    def of(self, block: int, name: str, shape_OI: tuple[int, int]) -> Amount | None:
        """Of one matrix, as the cut leaves it; None where a threshold over the whole model decides."""
        if self._counted is not None:
            return self._counted[block, name]
        recipe, pattern, (outputs, inputs) = self._recipe, self._recipe.n_of_m, shape_OI
        if pattern:
            leaving = outputs * inputs // pattern.group * (pattern.group - pattern.keep)
            return Amount(leaving, "row", pattern.keep, pattern.group)
        if recipe.within == "row":
            return Amount(outputs * int(inputs * recipe.mask_ratio), "row")
        if recipe.within == "global" or recipe.within is None:
            return None
        return Amount(min(int(outputs * inputs * recipe.mask_ratio), outputs * max(0, inputs - 1)), recipe.within)


def _counted_weights(recipe: Recipe, ratios: Ratios, shapes: Shapes) -> dict[tuple[int, str], Amount]:
    assert recipe.within is not None
    assert recipe.within != "global"  # the recipe has refused it
    places = [(block, name) for block, own in shapes.items() for name in own]
    sizes = [prod(shapes[block][name]) for block, name in places]
    wish = [ratios[block][name] * size for (block, name), size in zip(places, sizes, strict=True)]
    most = [outputs * max(0, inputs - 1) for outputs, inputs in (shapes[block][name] for block, name in places)]
    counts = apportion(wish, most, int(sum(sizes) * recipe.mask_ratio))
    return {place: Amount(count, recipe.within) for place, count in zip(places, counts, strict=True)}


def _counted_patterns(recipe: Recipe, ratios: Ratios, shapes: Shapes) -> dict[tuple[int, str], Amount]:
    """One N for each block: its matrices give alike."""
    assert recipe.n_of_m is not None
    group = recipe.n_of_m.group
    sizes = {block: {name: prod(shape) for name, shape in own.items()} for block, own in shapes.items() if own}
    groups = [sum(own.values()) // group for own in sizes.values()]
    wish = [
        sum(ratios[block][name] * size for name, size in own.items()) / sum(own.values())
        for block, own in sizes.items()
    ]
    steps = apportion_steps(wish, groups, group, recipe.mask_ratio)
    return {
        (block, name): Amount(size // group * step, "row", group - step, group) if step else Amount(0, "row")
        for (block, own), step in zip(sizes.items(), steps, strict=True)
        for name, size in own.items()
    }
