"""The table of a comparison, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.comparison.result import Comparison, Row
from secateur.files import human_bytes, human_count, human_seconds
from secateur.report.words import perplexity_text, without_folders

Shown = Callable[[float], str]

COLUMNS: dict[str, tuple[str, Shown, Shown]] = {
    "perplexity": ("perplexity", perplexity_text, perplexity_text),
    "kl": ("KL to\ndense", "{:.4f}".format, "{:.4f}".format),
    "agreement": ("same\nlike-\nliest\ntoken", "{:.1%}".format, "{:.1%}".format),
    "parameters": ("para-\nmeters", human_count, human_count),
    "nonzero_parameters": ("para-\nmeters\nnot\nzero", human_count, human_count),
    "bytes": ("weights\non disk", human_bytes, human_bytes),
    "seconds": ("time", human_seconds, human_seconds),
    "peak_memory": ("memory", human_bytes, human_bytes),
}
"""Of each figure the head, and how its mean and its deviation are shown."""

SPREAD = ("perplexity", "kl", "agreement")
"""Figures whose deviation over seeds is shown; of the others it is in JSON and CSV."""

NAME_WIDTH = 12
"""Characters that a recipe's name has at the least; it is broken where 80 columns do not hold it."""


def comparison_table(comparison: Comparison) -> RenderableType:
    """The end of ``compare``."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    heads, *rows = _cells(comparison)
    table.add_column(heads[0], overflow="fold", min_width=NAME_WIDTH)
    for head in heads[1:]:
        table.add_column(head, justify="right", overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return Group(table, Text("\n".join(["", *notes_of(comparison)])))


def comparison_markdown(comparison: Comparison) -> str:
    """The same as a Markdown table."""
    heads, *rows = _cells(comparison)
    heads = [head.replace("-\n", "").replace("\n", " ") for head in heads]
    lines = [heads, ["---", *(["---:"] * (len(heads) - 1))], *rows]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)
    return f"{table}\n\n" + "".join(f"{note}\n\n" for note in notes_of(comparison)).rstrip() + "\n"


def _cells(comparison: Comparison) -> list[list[str]]:
    seeds = max(len(row.seeds) for row in comparison.rows) > 1
    heads = ["", *(["n"] if seeds else []), *(head for head, _, _ in COLUMNS.values())]
    rows = []
    for row in comparison.rows:
        marks = "".join(mark for mark, said in (("†", row.found), ("‡", row.resumed)) if said)
        count = [str(len(row.values["perplexity"]))] if seeds else []
        rows.append([row.name, *count, *(cell_text(row, figure, marks) for figure in COLUMNS)])
    return [heads, *rows]


def cell_text(row: Row, figure: str, marks: str = "") -> str:
    """One figure of a row, as it is shown; empty where there is none."""
    mean, deviation = row.mean(figure), row.deviation(figure)
    if mean is None:
        return "failed" if row.failed is not None and figure == "perplexity" else ""
    _, shown, spread = COLUMNS[figure]
    text = shown(mean)
    if deviation is not None and figure in SPREAD:
        text += f" ± {spread(deviation)}"
    return text + (marks if figure == "seconds" else "")


def notes_of(comparison: Comparison, inside: bool = False) -> list[str]:
    """What has to be said beside the figures, a sentence each.

    Args:
        inside: they will lie in the comparison's own folder, which may be moved: paths begin there.
    """
    record = comparison.record
    notes = [f"{without_folders(record['protocol'], record['text'])}. KL(dense || pruned) in nats a token."]
    notes += record["notes"]
    found = [f"{row.name} ({', '.join(row.found)})" for row in comparison.rows if row.found]
    if found:
        notes.append(f"† its time is without what an earlier recipe or run had measured: {'; '.join(found)}.")
    if any(row.resumed for row in comparison.rows):
        notes.append("‡ it was interrupted before; its time is that of the last attempt.")
    notes += [f"{row.name} failed: {row.failed}." for row in comparison.rows if row.failed is not None]
    if inside:
        notes.append("Carry one out, from the folder of this page, with: secateur apply recipes/NAME --out DIR")
    else:
        notes.append(f"Carry one out with: secateur apply {comparison.folder}/recipes/NAME --out DIR")
    return notes
