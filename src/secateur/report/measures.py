"""The table of everything measured: dense beside pruned beside recovered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.files import human_bytes, human_count

Get = Callable[[Mapping[str, Any]], float | None]
Show = Callable[[float], str]

TASK_METRICS = ("acc_norm", "acc")
"""What is shown of a task: the accuracy by normalised length where it has one, as published tables do."""


@dataclass(frozen=True)
class Cell:
    """One figure: as shown, and what it is of the first model's."""

    text: str
    ratio: str = ""


@dataclass(frozen=True)
class MeasureTable:
    """Rows of cells under the models' names."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    note: str = ""


def evaluated(evaluation: Mapping[str, Any]) -> MeasureTable:
    """The table of what ``evaluate`` measured."""
    models: Mapping[str, Mapping[str, Any]] = evaluation["models"]
    table = MeasureTable(list(models), note=evaluation["protocol"])
    for label, get, show in _figures(models):
        _add(table, label, [get(figures) for figures in models.values()], show)
    return table


def counted(heads: Sequence[str], counts: Sequence[Mapping[str, Any]]) -> MeasureTable:
    """The table of what was counted in the folders, before anything is measured."""
    table = MeasureTable(list(heads))
    readers: list[tuple[str, Get, Show]] = [
        ("parameters", lambda count: count["parameters"], human_count),
        ("parameters not zero", lambda count: count["parameters"] - count["zeros"], human_count),
        ("weights on disk", lambda count: count["bytes"], human_bytes),
    ]
    for label, get, show in readers:
        _add(table, label, [get(count) for count in counts], show)
    return table


def _add(table: MeasureTable, label: str, values: Sequence[float | None], show: Show) -> None:
    first = values[0]
    cells = []
    for place, value in enumerate(values):
        ratio = f"{value / first:.2f} ×" if place and value is not None and first else ""
        cells.append(Cell("–" if value is None else show(value), ratio))
    table.rows.append((label, cells))


def _figures(models: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Get, Show]]:
    """Label, reader and form of every figure that any of the models has."""
    rows: list[tuple[str, Get, Show]] = [
        ("perplexity", lambda m: m["perplexity"]["value"], "{:,.2f}".format),
        ("KL to the first, nats a token", lambda m: _of(m["divergence"], "value"), "{:.4f}".format),
        ("same likeliest token", lambda m: _of(m["divergence"], "agreement"), "{:.1%}".format),
        ("parameters", lambda m: m["size"]["parameters"], human_count),
        ("parameters not zero", lambda m: m["size"]["nonzero_parameters"], human_count),
        ("weights on disk", lambda m: m["size"]["bytes_on_disk"], human_bytes),
        ("MACs a token", lambda m: m["size"]["macs_per_token"], human_count),
        ("peak memory of a forward", lambda m: m["size"]["peak_memory"], human_bytes),
    ]
    timed = dict.fromkeys(name for m in models.values() for name in m["speed"] or {})
    for name in timed:
        rows.append((f"{name}, ms", lambda m, name=name: _latency(m, name), "{:,.1f}".format))  # type: ignore[misc]
    for name in timed:
        rows.append((f"{name}, tokens/s", lambda m, name=name: _rate(m, name), "{:,.0f}".format))  # type: ignore[misc]
    return [row for row in rows if any(row[1](m) is not None for m in models.values())]


def _of(figures: Mapping[str, Any] | None, name: str) -> float | None:
    return None if figures is None else figures[name]


def _latency(model: Mapping[str, Any], name: str) -> float | None:
    timed = (model["speed"] or {}).get(name)
    return None if timed is None else 1000 * timed["latency"]


def _rate(model: Mapping[str, Any], name: str) -> float | None:
    return _of((model["speed"] or {}).get(name), "tokens_per_second")


def task_rows(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every task and model: the normalised accuracy where there is one, as published tables do."""
    rows = []
    for model, found in tasks["models"].items():
        for task, scores in found["scores"].items():
            metric = next((name for name in TASK_METRICS if name in scores), None)
            if metric is None:
                continue
            score = scores[metric]
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "model": model,
                    "value": score["value"],
                    "error": score["standard_error"],
                }
            )
    return rows


def by_task(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Those rows as a table: for every task the score of each model, in their order."""
    table: dict[str, list[str]] = {}
    for row in rows:
        error = "" if row["error"] is None else f" ± {row['error']:.3f}"
        table.setdefault(f"{row['task']} ({row['metric']})", []).append(f"{row['value']:.3f}{error}")
    return table


def task_means(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mean of every model over the tasks, and the share of the first model's that it kept."""
    means = []
    for model, found in tasks["models"].items():
        metric = next((name for name in TASK_METRICS if name in found["means"]), None)
        if metric is not None:
            mean = found["means"][metric]
            means.append(
                {
                    "model": model,
                    "metric": metric,
                    "value": mean["value"],
                    "error": mean["standard_error"],
                    "kept": found["kept"].get(metric),
                }
            )
    return means
