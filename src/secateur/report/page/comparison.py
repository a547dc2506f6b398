"""The page of a comparison, and one for each of its recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import secateur
from secateur.comparison.folder import PAGE, RECIPE, RECIPES
from secateur.comparison.result import Comparison, Row
from secateur.files import atomic_file, human_bytes, human_count, human_seconds
from secateur.plans import load_plan
from secateur.report.comparison import COLUMNS, cell_text, notes_of
from secateur.report.measures import Cell, MeasureTable
from secateur.report.page import charts
from secateur.report.page.render import render
from secateur.report.page.run import Facts, how_chosen, plan_charts
from secateur.report.words import perplexity_text, without_folders

COSTS = {
    "nonzero_parameters": ("parameters not zero", charts.SHORT),
    "seconds": ("seconds to plan it", ",.0f"),
}
"""What perplexity is set against: title, and the number's form."""

RUINED = 100
"""A model with more than this many times the dense model's perplexity is praised for nothing."""


def write_comparison_pages(comparison: Comparison) -> Path:
    """Write the comparison's ``report.html`` and one beside every plan; returns the first."""
    pages = {}
    for row in comparison.rows[1:]:
        run = comparison.record["recipes"][row.name][0]
        if "planning" in run and row.failed is None:
            pages[row.name] = _write_recipe_page(comparison, row, run)
    file = comparison.folder / PAGE
    _write(file, render("comparison.html", **_facts(comparison, pages)))
    return file


def _write(file: Path, page: str) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _facts(comparison: Comparison, pages: Mapping[str, str]) -> Facts:
    dense, *rows = comparison.rows
    known = [row for row in rows if row.failed is None and row.mean("perplexity") is not None]
    pictures = []
    for cost, (title, shown) in COSTS.items():
        points = [
            {
                "name": row.name,
                "cost": row.mean(cost),
                "perplexity": row.mean("perplexity"),
                "page": pages.get(row.name),
            }
            for row in known
            if row.mean(cost) is not None
        ]
        if len(points) > 1:
            pictures.append(charts.pareto(points, title, shown, dense.values["perplexity"][0]))
    table = []
    for row in comparison.rows:
        marks = "".join(mark for mark, said in (("†", row.found), ("‡", row.resumed)) if said)
        cells = [{"value": row.mean(figure), "text": cell_text(row, figure, marks) or "–"} for figure in COLUMNS]
        table.append({"name": row.name, "page": pages.get(row.name), "cells": cells, "failed": row.failed is not None})
    return {
        "title": f"{len(rows)} recipes on {Path(comparison.record['model']).name}",
        "verdict": _verdict(dense, known),
        "charts": pictures,
        "heads": ["recipe", *(head.replace("-\n", "").replace("\n", " ") for head, _, _ in COLUMNS.values())],
        "rows": table,
        "notes": notes_of(comparison, inside=True),
        "version": secateur.__version__,
    }


def _verdict(dense: Row, known: list[Row]) -> list[str]:
    yardstick = dense.values["perplexity"][0]
    parts = [f"dense perplexity {perplexity_text(yardstick)}"]
    sound = [row for row in known if _perplexity(row) <= RUINED * yardstick]
    if sound:
        best = min(sound, key=_perplexity)
        parts.append(f"{best.name} comes nearest with {perplexity_text(_perplexity(best))}")
        fastest = min(sound, key=lambda row: row.mean("seconds") or 0)
        if fastest is not best:
            parts.append(
                f"{fastest.name} is planned fastest ({human_seconds(fastest.mean('seconds') or 0)} beside "
                f"{human_seconds(best.mean('seconds') or 0)}) and gives {perplexity_text(_perplexity(fastest))}"
            )
    parts += [
        f"{row.name} ruins the model (perplexity {perplexity_text(_perplexity(row))})"
        for row in known
        if row not in sound
    ]
    return parts


def _perplexity(row: Row) -> float:
    return row.mean("perplexity") or 0


def _write_recipe_page(comparison: Comparison, row: Row, run: Mapping[str, Any]) -> str:
    """The page of one recipe, of its first seed; returns where it is, seen from the comparison's."""
    folder = Path(run["planning"]["record"]["plan"]).parent
    place = comparison.folder / RECIPES / folder.name
    plan, planned = load_plan(place), run["planning"]
    dense, figures = comparison.rows[0], planned["record"]["sizes"]
    zeros, masked = plan.zeros()
    old, new = (figures[when]["parameters"] for when in ("before", "after"))
    said = [f"{1 - new / old:.1%} fewer parameters ({human_count(old)} → {human_count(new)})"] if new < old else []
    said += [f"{zeros / masked:.1%} of the masked matrices' weights are zero"] if masked else []
    perplexities = dense.values["perplexity"][0], run["measured"]["perplexity"]["value"]
    said += [f"perplexity {' → '.join(map(perplexity_text, perplexities))}"]
    removed = [(f"{kind} units", gone, of) for kind, (gone, of) in plan.removed_by_kind().items()]
    removed += [("weights of masked matrices", zeros, masked)] if masked else []
    removed += [("parameters", old - new, old)] if new < old else []
    text = comparison.record["calibration"].get(str(run["seed"]))
    cut_from = text and without_folders(text["description"])
    times = [
        ("planning", human_seconds(planned["seconds"]) + (" (without what was found made)" if row.found else "")),
        ("peak memory", human_bytes(planned["peak_memory"])),
    ]
    facts: Facts = {
        "title": row.name,
        "verdict": said,
        "measured": run["measured"],
        "tables": [_beside_dense(comparison, row)],
        "removed": removed,
        **plan_charts(plan),
        "training": None,
        "tasks": None,
        "continuations": [],
        "how": [("asked for", planned["record"]["asked"]), *how_chosen(plan, cut_from)],
        "times": times,
        "recipe": without_folders((place / RECIPE).read_text(encoding="utf-8")),
        "load": None,
        "reproduce": f"secateur apply recipes/{folder.name} --out SMALLER   # writes the pruned model",
        "uneven": False,
        "version": secateur.__version__,
        "back": f"../../{PAGE}",
    }
    _write(place / PAGE, render("run.html", **facts))
    return f"{RECIPES}/{folder.name}/{PAGE}"


def _beside_dense(comparison: Comparison, row: Row) -> MeasureTable:
    table = MeasureTable(
        ["dense", row.name], note=without_folders(comparison.record["protocol"], comparison.record["text"])
    )
    for figure, (head, _, _) in COLUMNS.items():
        if figure in ("seconds", "peak_memory"):
            continue
        first, own = comparison.rows[0].mean(figure), row.mean(figure)
        ratio = f"{own / first:.2f} ×" if first and own is not None else ""
        cells = [Cell(cell_text(comparison.rows[0], figure) or "–"), Cell(cell_text(row, figure) or "–", ratio)]
        table.rows.append((head.replace("-\n", "").replace("\n", " "), cells))
    return table
