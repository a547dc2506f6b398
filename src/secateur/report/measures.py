"""The table of everything measured: dense beside pruned beside recovered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.files import human_bytes, human_count
from secateur.report.words import perplexity_text, without_folders

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


@dataclass(frozen=True)
class _Figure:
    """A row: what it is called, how it is read and shown, and how its error or spread is read where it has one."""

    label: str
    get: Get
    show: Show
    error: Get = lambda model: None


def evaluated(evaluation: Mapping[str, Any]) -> MeasureTable:
    """The table of what ``evaluate`` measured; a figure that has an error or a spread is shown with it."""
    models: Mapping[str, Mapping[str, Any]] = evaluation["models"]
    table = MeasureTable(list(models), note=without_folders(evaluation["protocol"], evaluation.get("text", "")))
    dense = (evaluation.get("roles") or {"dense": "dense"})["dense"]
    first = "dense" if table.heads[0] == dense else "the first"
    for figure in _figures(models, first):
        _add(table, figure, list(models.values()))
    return table


def counted(heads: Sequence[str], counts: Sequence[Mapping[str, Any]]) -> MeasureTable:
    """The table of what was counted in the folders, before anything is measured."""
    table = MeasureTable(list(heads))
    for figure in (
        _Figure("parameters", lambda count: count["parameters"], human_count),
        _Figure("parameters not zero", lambda count: count.get("nonzero"), human_count),
        _Figure("weights on disk", lambda count: count["bytes"], human_bytes),
    ):
        _add(table, figure, counts)
    return table


def _add(table: MeasureTable, figure: _Figure, columns: Sequence[Mapping[str, Any]]) -> None:
    first = figure.get(columns[0])
    cells = []
    for place, column in enumerate(columns):
        value, error = figure.get(column), figure.error(column)
        text = "–" if value is None else figure.show(value)
        ratio = f"{value / first:.2f} ×" if place and value is not None and first else ""
        cells.append(Cell(text if error is None else f"{text} ±\u00a0{figure.show(error)}", ratio))
    table.rows.append((figure.label, cells))


def _figures(models: Mapping[str, Mapping[str, Any]], first: str) -> list[_Figure]:
    """Every figure that any of the models has; ``first`` is what the first of them is called.

    Perplexity stands without its standard error: all models read the same windows, so they differ far more surely than that says.
    """
    rows = [
        _Figure("perplexity", _reader("perplexity", "value"), perplexity_text),
        _Figure(f"KL to {first}, nats a token", _reader("divergence", "value"), "{:.4f}".format, _reader("divergence", "standard_error")),
        _Figure("same likeliest token", _reader("divergence", "agreement"), "{:.1%}".format),
        _Figure("parameters", _reader("size", "parameters"), human_count),
        _Figure("parameters not zero", _reader("size", "nonzero_parameters"), human_count),
        _Figure("weights on disk", _reader("size", "bytes_on_disk"), human_bytes),
        _Figure("MACs a token", _reader("size", "macs_per_token"), human_count),
        _Figure("peak memory of a forward", _reader("size", "peak_memory"), human_bytes),
    ]  # fmt: skip
    timed = dict.fromkeys(name for m in models.values() for name in m["speed"] or {})
    for what, of, show in (("ms", "latency", _milliseconds), ("tokens/s", "tokens_per_second", "{:,.1f}".format)):
        rows += [
            _Figure(f"{name}, {what}", _reader("speed", name, of), show, _reader("speed", name, f"{of}_spread"))
            for name in timed
        ]
    return [row for row in rows if any(row.get(model) is not None for model in models.values())]


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _reader(*path: str) -> Get:
    """What stands at the end of these keys; None where one of them is missing."""

    def read(model: Mapping[str, Any]) -> float | None:
        found: Any = model
        for key in path:
            found = None if found is None else found.get(key)
        return found

    return read


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
