"""The page's first sentence: how much smaller, how much faster, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.files import human_count
from secateur.report.measured import PERPLEXITY, TASKS
from secateur.report.measures import TASK_METRICS
from secateur.report.words import perplexity_text


def verdict(before: Mapping[str, Any], after: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """Parts of one sentence.

    Args:
        before, after: counts of the dense and of the written model.
        measured: what ``read_measured`` gives.
    """
    parts = [_smaller(before, after)]
    dense, own = _pair(measured.get(PERPLEXITY))
    if dense and own:
        parts += _faster(dense, own)
        perplexities = (perplexity_text(one["perplexity"]["value"]) for one in (dense, own))
        parts.append(f"perplexity {' → '.join(perplexities)}")
    elif own:
        parts.append(f"perplexity {perplexity_text(own['perplexity']['value'])}")
    dense, own = _pair(measured.get(TASKS))
    if dense and own:
        parts += _kept(dense["means"], own["means"], measured[TASKS].get("questions") or {})
    return [part for part in parts if part]


def _pair(found: Mapping[str, Any] | None) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The figures of the dense model and of this one, as far as they are among what was measured.

    Each measurement names its models anew; ``prune --evaluate``, which records no roles, calls them dense and pruned.
    """
    if not found:
        return None, None
    roles = found.get("roles") or {"dense": "dense", "own": "pruned"}
    return found["models"].get(roles["dense"]), found["models"].get(roles["own"])


def _kept(dense: Mapping[str, Any], own: Mapping[str, Any], questions: Mapping[str, int]) -> list[str]:
    metric = next((name for name in TASK_METRICS if name in dense and name in own), None)
    if metric is None or not dense[metric]["value"]:
        return []
    kept = f"{own[metric]['value'] / dense[metric]['value']:.1%} of the dense model's task scores kept"
    beside = f"{_with_error(own[metric])} beside {_with_error(dense[metric])}"
    asked = (
        f", {_counted(sum(questions.values()), 'question')} in {_counted(len(questions), 'task')}" if questions else ""
    )
    return [f"{kept} ({beside}{asked})"]


def _with_error(score: Mapping[str, Any]) -> str:
    error = score.get("standard_error")
    return f"{score['value']:.3f}" + ("" if error is None else f" ±\u00a0{error:.3f}")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


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
    before, after = timed[name], own["speed"][name]
    # A difference that either measurement's spread could make is no news.
    spread = sum(one.get("latency_spread") or 0 for one in (before, after))
    if abs(before["latency"] - after["latency"]) <= spread:
        return [f"{name}: as fast as the dense model within the spread of the measurement"]
    return [f"{name}: {before['latency'] / after['latency']:.2f} × as fast"]
