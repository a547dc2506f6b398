"""What was asked and what was reached, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.plans import Plan
from secateur.quantities import Target
from secateur.recipe import SPANNING, Recipe
from secateur.report.count import Count

_FOLDERS = re.compile(r"(?<![\w/:.])/(?:[^\s/]+/)+(?=[^\s/])")
"""The folders of an absolute path in a text; an address has none."""


def without_folders(text: str, source: str = "") -> str:
    """``text`` with absolute paths cut to their last name, since pages and cards are published.

    Args:
        source: a path that stands in it and may hold spaces.
    """
    if Path(source).is_absolute():
        text = text.replace(source, Path(source).name)
    return _FOLDERS.sub("", text)


def perplexity_text(value: float) -> str:
    """``29.04``; of a ruined model, where no digit says more than the size, ``1.17e7``."""
    return f"{value:,.2f}" if value < 1e5 else f"{value:.2e}".replace("e+0", "e").replace("e+", "e")


def asked(plan: Plan) -> str:
    """The recipe's demand in words."""
    recipe, parts = plan.recipe, []
    if recipe.cut_kinds:
        parts.append(_asked_of_units(recipe))
    if recipe.n_of_m:
        parts.append(f"{recipe.n_of_m} sparsity")
    elif recipe.masks_weights:
        parts.append(f"{100 * recipe.mask_ratio:g} % {_whose(recipe)}")
    blocks = f" in blocks {recipe.blocks}" if recipe.blocks else ""
    policy = recipe.parsed_policy()
    spread = f", each block its own share by {policy.name}" if policy else ""
    removal = recipe.parsed_removal()
    leaves = (
        f", {'what is left' if removal.updates else 'the mask'} refined by {removal.name}" if removal.needs() else ""
    )
    if removal.writes_biases:
        leaves = ", its expected output in biases"
    fitted = ", blocks fitted to the dense model" if recipe.reconstruct else ""
    return " and ".join(parts) + blocks + spread + leaves + fitted


def _whose(recipe: Recipe) -> str:
    """Of what the ratio of single weights is a share."""
    if recipe.parsed_policy() is not None:
        return "of the weights of all matrices"
    within = {
        "row": "of every row",
        "share": "of every matrix, its rows up to one share of their scores",
        "block": "of every 128 inputs of a matrix",
        "layer": "of every matrix",
        "global": "of the weights of all matrices",
    }
    return within[recipe.within or "row"]


def _asked_of_units(recipe: Recipe) -> str:
    kinds = recipe.cut_kinds
    if recipe.target:
        asked = f"{recipe.target} of the whole model, by {_units(kinds)}"
    elif recipe.allocation == "uniform" or recipe.parsed_policy() is not None:
        inside, spanning = (tuple(kind for kind in kinds if (kind in SPANNING) == spans) for spans in (False, True))
        each = "all blocks'" if recipe.parsed_policy() else "each block's"
        whose = [f"{each} {_units(inside)}"] * bool(inside) + [f"the model's {_units(spanning)}"] * bool(spanning)
        asked = f"{100 * recipe.cut_ratio:g} % of {' and of '.join(whose)}"
    else:
        whole = "the model's parameters in" if recipe.allocation == "global" else "the model's"
        asked = f"{100 * recipe.cut_ratio:g} % of {whole} {_units(kinds)}"
    extras = {
        ", ranked by standardised scores": recipe.normalise == "zscore",
        ", ends kept whole": recipe.allocation == "two-tier",
        f", kept in multiples of {recipe.round_to}": recipe.round_to > 1,
        f", in {recipe.steps} rounds": recipe.steps > 1,
    }
    return asked + "".join(words for words, said in extras.items() if said)


def _units(kinds: Sequence[str]) -> str:
    """``head and channel units``, ``blocks``, ``hidden channels and blocks``."""
    named = {"block": "blocks", "hidden": "hidden channels"}
    others = [kind for kind in kinds if kind not in named]
    parts = [f"{' and '.join(others)} units"] if others else []
    return " and ".join(parts + [named[kind] for kind in kinds if kind in named])


def notes_in_words(notes: Mapping[str, Any]) -> list[str]:
    """What an allocation, a target, rounding and a removal came to, a line each."""
    lines = []
    for kind, ratios in notes.get("allocation", {}).items():
        least, most = (choose(ratios, key=ratios.__getitem__) for choose in (min, max))
        what = "weights" if kind == "weight" else f"{kind} units"
        lines.append(
            f"shares of {what}: from {100 * ratios[least]:.1f} % of block {least} to {100 * ratios[most]:.1f} % of block {most}"
        )
    if raised := notes.get("removal", {}).get("dampening"):
        lines.append(f"dampening had to be raised to {raised:g} where the inputs' second moments could not be inverted")
    if fit := notes.get("reconstruction"):
        lines.append(
            f"blocks fitted: their error fell from {fit['error_before']:.4g} to {fit['error_after']:.4g}, a mean over blocks"
        )
    if found := notes.get("target"):
        target = Target(found["measure"], found["at_most"])
        lines.append(
            f"target: at most {target.describe(found['at_most'])}; reached {found['reached']:,} "
            f"(the next smaller cut would leave {found['next_larger']:,})"
        )
    if cost := notes.get("rounding"):
        parts = {f"{kind} units": count for kind, count in cost["units_kept_more"].items()}
        parts["parameters"] = cost["parameters_kept_more"]
        said = " and ".join(f"{abs(n):,} {what} {'more' if n >= 0 else 'fewer'}" for what, n in parts.items())
        lines.append(f"rounding to {cost['round_to']} keeps {said} than without")
    return lines


def reached(plan: Plan, before: Count, after: Count) -> str:
    """What the written files hold, in words."""
    parts = []
    for kind in plan.recipe.cut_kinds:
        there, left = before.units.get(kind, 0), after.units.get(kind, 0)
        if there:
            parts.append(f"{there - left} of {there} {kind} units removed ({100 * (there - left) / there:.2f} %)")
    gone = before.parameters - after.parameters
    if gone:
        what = "parameters removed" if gone > 0 else "parameters more, biases"
        parts.append(f"{abs(gone):,} of {before.parameters:,} {what} ({100 * abs(gone) / before.parameters:.2f} %)")
    if plan.recipe.masks_weights:
        parts.append(
            f"{after.zeros:,} zeros in {after.prunable:,} weights of the blocks' matrices ({100 * after.zeros / after.prunable:.2f} %)"
        )
    if after.valid_n_of_m is not None:
        parts.append(f"{plan.recipe.n_of_m} holds in every group")
    return "; ".join(parts)
