"""What of a recipe cannot go together, each case in one sentence that says what to do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from secateur.allocation.uniform import ROUNDED
from secateur.criteria import BlockCriterion
from secateur.errors import RecipeError, suggest
from secateur.quantities import is_n_of_m, parse_target

if TYPE_CHECKING:
    from secateur.recipe import Recipe

CUT_KINDS = ("block", "hidden", "head", "query", "expert", "channel")
"""Units that are physically cut out, in the order they are decided."""

SPANNING = ("block", "hidden")
"""Units of the model as a whole: one choice, for which every block has to be scored first."""


def check_units(recipe: Recipe) -> None:
    """Units there are, each once, and one pattern of masks at most."""
    if not recipe.unit:
        raise RecipeError("--unit is empty; name at least one unit, for example channel")
    patterns = [unit for unit in recipe.unit if unit == "weight" or ":" in unit]
    for unit in recipe.unit:
        if unit not in (*CUT_KINDS, "weight") and not is_n_of_m(unit):
            known = [*CUT_KINDS, "weight", "2:4"]
            raise RecipeError(f"there is no unit '{unit}'{suggest(unit, known)}; N:M keeps N of every M, 0 < N < M")
    if len(set(recipe.unit)) != len(recipe.unit):
        raise RecipeError(f"--unit names a unit twice: {','.join(recipe.unit)}")
    if len(patterns) > 1:
        raise RecipeError(f"{' and '.join(patterns)} cannot go together: one mask pattern at a time")


def check_amounts(recipe: Recipe) -> None:
    """Ratio, target, rounding and rounds."""
    if recipe.target is not None:
        parse_target(recipe.target)
        if recipe.ratio is not None:
            raise RecipeError(f"--target {recipe.target} says how much leaves; leave --ratio {recipe.ratio:g} out")
        if not recipe.cut_kinds:
            raise RecipeError("--target is about what is cut, and zeros take no room away; give --ratio instead")
    if recipe.round_to > 1 and not any(kind in ROUNDED for kind in recipe.cut_kinds):
        raise RecipeError(f"--round-to {recipe.round_to} is for channel and hidden units; leave it out")
    if recipe.steps > 1 and (recipe.masks_weights or not recipe.cut_kinds):
        raise RecipeError("--steps is for units that are cut; masks are chosen in one step, so leave it out")


def check_allocation(recipe: Recipe) -> None:
    """How much from where, with what leaves."""
    policy = recipe.parsed_policy()
    spread = recipe.allocation
    if policy is not None and any(kind in SPANNING for kind in recipe.cut_kinds):
        raise RecipeError(f"block and hidden units leave the model as a whole; leave --allocation {policy.name} out")
    if policy is not None and recipe.within == "global":
        raise RecipeError(
            f"--within global says itself how much each block gives; leave --allocation {policy.name} out"
        )
    if policy is not None and recipe.steps > 1:
        raise RecipeError(f"--allocation {policy.name} looks at the dense model once; leave --steps out")
    if policy is not None and recipe.masks_weights and "expert" in recipe.cut_kinds:
        raise RecipeError(
            f"--allocation {policy.name} counts the experts' weights before they are cut; cut and mask in two runs"
        )
    if recipe.steps > 1 and spread == "global" and "block" in recipe.cut_kinds and len(recipe.cut_kinds) > 1:
        raise RecipeError("blocks and other units have no global choice in several --steps; leave --steps out")
    if "query" in recipe.cut_kinds and spread == "global":
        raise RecipeError(
            "query heads leave every group in equal number, so they have no global choice; use --allocation uniform"
        )
    if spread == "global" and recipe.rank == "together" and not apart_from_each_other(recipe.cut_kinds):
        raise RecipeError(
            f"{' and '.join(recipe.cut_kinds)} units hold parameters of each other, so one ranking would count them twice; "
            "use --rank apart"
        )
    if "hidden" in recipe.cut_kinds and recipe.blocks is not None:
        raise RecipeError("hidden channels run through all blocks; leave --blocks out")
    if "hidden" in recipe.cut_kinds and spread == "two-tier":
        raise RecipeError(
            "hidden channels run through all blocks, so no end can be kept whole; use another --allocation"
        )
    if spread == "two-tier" and recipe.blocks is not None:
        raise RecipeError("--allocation two-tier names the blocks itself; say --protect FIRST:LAST instead of --blocks")
    if spread == "global" and not recipe.cut_kinds:
        raise RecipeError(
            "--allocation global is for units that are cut; for masks over the whole model give --unit weight "
            "--within global"
        )
    if spread == "two-tier" and not recipe.cut_kinds:
        raise RecipeError("--allocation two-tier is for units that are cut; limit masks with --blocks")
    if recipe.protect is not None and spread != "two-tier":
        raise RecipeError("--protect keeps the ends whole under --allocation two-tier; add that, or leave it out")
    if recipe.protect is not None and not re.fullmatch(r"[0-9]+:[0-9]+", recipe.protect):
        raise RecipeError(f"--protect is FIRST:LAST, two numbers of blocks such as 4:2, not '{recipe.protect}'")
    if recipe.rank == "apart" and spread != "global":
        raise RecipeError("--rank is about --allocation global; add that, or leave it out")


def check_block_criterion(recipe: Recipe) -> None:
    """Criteria that know whole blocks alone."""
    criterion = recipe.parsed_criterion()
    if not isinstance(criterion, BlockCriterion):
        return
    if recipe.unit != ("block",):
        raise RecipeError(
            f"{criterion.name} says what whole blocks are worth and nothing of what is in them, so it cannot choose "
            f"{','.join(recipe.unit)}; give --unit block, or another --criterion"
        )
    if criterion.of_runs and recipe.allocation == "global":
        raise RecipeError(
            f"{criterion.name} takes one run of blocks and ranks no single ones; leave --allocation global out, or use "
            "--criterion influence"
        )


def apart_from_each_other(kinds: tuple[str, ...]) -> bool:
    """Whether no parameter belongs to units of two of these kinds."""
    return len(kinds) < 2 or not (set(kinds) & set(SPANNING) or {"expert", "channel"} <= set(kinds))
