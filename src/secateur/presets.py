"""Recipes by how much they may cost: what composes best, as fields that a user's own words override."""

from __future__ import annotations

from typing import Any

from secateur.errors import RecipeError, suggest

PRESETS = ("fast", "balanced", "best")

REFITTED = "sparsegpt:dampening=0.3"
"""What reads cut units fitted anew, but held thirty times as firmly to what it was as SparseGPT holds what a mask leaves.

Least squares goes as far as the calibration windows say; held back it serves them as well and other text better.
"""

PULLED = "alps:steps=12,rho=0.3,fit_steps=4"
"""ALPS stopped early."""

FIRM = f"{PULLED},dampening=0.1"
"""Held ten times as firmly as published, for the reason that cuts are: at thirty Gemma's masks serve other text worse."""

NOISY = f"{PULLED},noise=0.5"
"""As if inputs came with half as much noise as signal: held by each input's own power it suits models that one part of the mean does not."""


def preset_fields(name: str, units: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a recipe that a preset stands for.

    Args:
        units: what leaves, as in a recipe.

    Raises:
        RecipeError: there is no such preset.
    """
    if name not in PRESETS:
        raise RecipeError(f"there is no preset '{name}'{suggest(name, PRESETS)}")
    if units == ("block",):
        fitted = {"reconstruct": "block"} if name == "best" else {}
        return {"criterion": "influence" if name == "fast" else "angular"} | fitted
    masks = any(unit == "weight" or ":" in unit for unit in units)
    if masks and len(units) == 1:
        return _of_masks(name, pattern=":" in units[0])
    return _of_cuts(name, units, masks)


def _of_masks(name: str, pattern: bool) -> dict[str, Any]:
    if name == "fast":
        return {"criterion": "wanda"}
    if name == "balanced":
        return {"criterion": "sparsegpt"}
    best = {"criterion": "sparsegpt"}
    if pattern:  # blocks that differ would not be the pattern that hardware knows
        return best | {"removal": NOISY, "reconstruct": "block:epochs=4,between=1"}
    shares = {"within": "row", "allocation": "sensitivity:windows=4"}
    return best | shares | {"removal": FIRM, "reconstruct": "block:epochs=4"}


def _of_cuts(name: str, units: tuple[str, ...], masks: bool) -> dict[str, Any]:
    if name == "fast":
        return {"criterion": "wanda", "propagate": "dense"}
    spans = {"hidden", "block"} & set(units)  # no weights are updated then
    fields: dict[str, Any] = {"criterion": "taylor"}
    if not spans:
        fields["removal"] = "sparsegpt" if masks else REFITTED
    if name == "balanced" or spans:
        return fields
    fields["criterion"] = "taylor:order=second"
    # Query heads leave every group in equal number, and of masks each matrix has its own share.
    ranked = {} if masks or "query" in units else {"allocation": "global"}
    return fields | {"reconstruct": "block"} | ranked
