"""The table that ends ``evaluate --tasks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from secateur.evaluation.tasks import Score, TaskEvaluation


def tasks_table(evaluation: TaskEvaluation) -> Table:
    """A row for each figure of each task, then the means and what was kept of them; one model a column."""
    first, *others = evaluation.models
    note = f"kept: of {first}" if others else ""
    table = Table(box=SIMPLE_HEAD, header_style="bold", caption=note or None)
    for head in ("", "questions", ""):
        table.add_column(head, justify="right" if head else "left", style="dim" if head else None)
    for name in evaluation.models:
        table.add_column(name, justify="right", overflow="fold")
    columns = list(evaluation.models.values())
    for task, scores in columns[0].scores.items():
        for number, metric in enumerate(scores):
            count = f"{evaluation.questions[task]:,}" if task in evaluation.questions else ""
            cells = [task, count] if number == 0 else ["", ""]
            table.add_row(*cells, metric, *(_shown(column.scores[task][metric]) for column in columns))
    several = len(columns[0].scores) > 1
    for metric in columns[0].means if several or others else ():
        if several:
            table.add_row("mean", "", metric, *(_shown(column.means[metric]) for column in columns))
        if others:
            kept = ["" if metric not in column.kept else f"{column.kept[metric]:.1%}" for column in columns]
            table.add_row("kept", "", metric, *kept)
    return table


def _shown(score: Score) -> str:
    if score.standard_error is None:
        return f"{score.value:,.4f}" if score.value < 10 else f"{score.value:,.2f}"
    digits = 4 if score.value < 10 else 2
    return f"{score.value:,.{digits}f} ± {score.standard_error:,.{digits}f}"
