"""The page's first sentence: how much smaller, how much faster, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.files import human_count

ALIKE = 0.03
"""Speeds nearer to each other than this are called the same."""


def verdict(
    before: Mapping[str, Any], after: Mapping[str, Any], measured: Mapping[str, Any], own: str | None, dense: str | None
) -> list[str]:
    """Parts of one sentence.

    Args:
        before, after: counts of the dense and of the written model.
        measured: what ``read_measured`` gives.
        own, dense: under which names the two stand there; None where they do not.
    """
    parts = [_smaller(before, after)]
    models = (measured.get("evaluation") or {}).get("models", {})
    if own in models and dense in models:
        parts += _faster(models[dense], models[own])
        old, new = (models[name]["perplexity"]["value"] for name in (dense, own))
        parts.append(f"perplexity {old:,.2f} → {new:,.2f}")
    elif own in models:
        parts.append(f"perplexity {models[own]['perplexity']['value']:,.2f}")
    tasks = (measured.get("tasks") or {}).get("models", {})
    if own in tasks and dense in tasks and own != dense:
        kept = tasks[own]["kept"]
        metric = next((name for name in ("acc_norm", "acc") if name in kept), None)
        if metric is not None:
            parts.append(f"{kept[metric]:.1%} of the dense model's task scores kept")
    return [part for part in parts if part]


def zeroed(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether weights were zeroed: checkpoints that were quantised once hold zeros of their own."""
    return _zero_share(after) > _zero_share(before) + 0.001


def _zero_share(count: Mapping[str, Any]) -> float:
    return count["zeros"] / max(1, count["prunable"])


def _smaller(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    gone = 1 - after["parameters"] / before["parameters"]
    sizes = f"{human_count(before['parameters'])} → {human_count(after['parameters'])}"
    said = [f"{gone:.1%} fewer parameters ({sizes})"] if gone > 0 else []
    if zeroed(before, after):
        said.append(f"{_zero_share(after):.1%} of the blocks' weights are zero")
    return " and ".join(said) or "as many parameters as before"


def _faster(dense: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    timed = dense["speed"] or {}
    names = [name for name in ("decode, batch 1", *timed) if name in timed and name in (own["speed"] or {})]
    if not names:
        return []
    name = names[0]
    ratio = timed[name]["latency"] / own["speed"][name]["latency"]
    if abs(ratio - 1) < ALIKE:
        return [f"{name}: as fast as before"]
    return [f"{name}: {ratio:.2f} × as fast"]
