"""What a comparison found: a row a recipe, as a table, JSON and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = ("perplexity", "kl", "agreement", "parameters", "nonzero_parameters", "bytes", "seconds", "peak_memory")
"""The columns of a row; of several seeds each is a mean beside its standard deviation."""


@dataclass(frozen=True)
class Row:
    """One recipe over its seeds.

    Attributes:
        values: for each of ``FIGURES`` the figure of every seed that was measured.
        found: what it did not have to measure, so that its time is without it.
        resumed: an earlier attempt was interrupted, so that its time is that of the last.
        failed: why it has no figures; None where it has.
    """

    name: str
    seeds: list[int]
    values: dict[str, list[float]]
    found: list[str]
    resumed: bool = False
    failed: str | None = None

    def mean(self, figure: str) -> float | None:
        values = self.values[figure]
        return statistics.fmean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """The sample's standard deviation over seeds; None of fewer than two."""
        values = self.values[figure]
        return statistics.stdev(values) if len(values) > 1 else None

    def flat(self) -> dict[str, Any]:
        """The row as it stands in the CSV."""
        cells: dict[str, Any] = {"recipe": self.name, "n": len(self.values["perplexity"])}
        for figure in FIGURES:
            cells[figure], cells[f"{figure}_deviation"] = self.mean(figure), self.deviation(figure)
        return cells | {"found_made": " ".join(self.found), "resumed": self.resumed, "failed": self.failed}


@dataclass(frozen=True)
class Comparison:
    """Recipes side by side, in the order given.

    Attributes:
        folder: where everything lies.
        rows: the dense model first, then a row a recipe.
        record: everything that was measured and on what, JSON-able; the content of ``compare.json``.
    """

    folder: Path
    rows: list[Row]
    record: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """The recipes that could not be carried out for every seed."""
        return [row.name for row in self.rows if row.failed is not None]

    def to_json(self) -> dict[str, Any]:
        return self.record

    def to_csv(self) -> str:
        text = io.StringIO()
        flat = [row.flat() for row in self.rows]
        writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()


def row_of(name: str, runs: Sequence[dict[str, Any]]) -> Row:
    """The row of one recipe from what ``result.json`` says of each of its seeds."""
    whole = [run for run in runs if "measured" in run and "planning" in run]
    readers: dict[str, Callable[[dict[str, Any]], float]] = {
        "perplexity": lambda run: run["measured"]["perplexity"]["value"],
        "kl": lambda run: run["measured"]["divergence"],
        "agreement": lambda run: run["measured"]["agreement"],
        "parameters": lambda run: run["planning"]["record"]["sizes"]["after"]["parameters"],
        "nonzero_parameters": lambda run: run["measured"]["nonzero_parameters"],
        "bytes": lambda run: run["planning"]["record"]["sizes"]["after"]["bytes"],
        "seconds": lambda run: run["planning"]["seconds"],
        "peak_memory": lambda run: run["planning"]["peak_memory"],
    }
    return Row(
        name,
        [run["seed"] for run in runs],
        {figure: [read(run) for run in whole] for figure, read in readers.items()},
        sorted({kind for run in whole for kind in run["planning"]["found"]}),
        any(run["attempts"] > 1 for run in whole),
        next((run["failed"] for run in runs if "failed" in run), None),
    )
