"""The small tables that end a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.checkpoint.architecture import Loading
from secateur.files import human_bytes
from secateur.report.words import notes_in_words


def run_table(record: dict[str, Any], out: Path) -> RenderableType:
    """The end of ``prune`` and ``apply``."""
    before, after = record["before"], record["after"]
    table = _table("", "before", "after", "change")
    _row(table, "parameters", before["parameters"], after["parameters"])
    _row(table, "parameters not zero", before["nonzero"], after["nonzero"])
    table.add_row(
        "weights on disk",
        human_bytes(before["bytes"]),
        human_bytes(after["bytes"]),
        _change(before["bytes"], after["bytes"]),
    )
    for kind, there in sorted(before["units"].items()):
        left = after["units"].get(kind, 0)
        if left != there:
            _row(table, f"{kind} units", there, left)
    for name, entry in (record.get("evaluation") or {}).get("models", {}).items():
        table.add_row(f"perplexity, {name}", "", f"{entry['perplexity']['value']:.2f}", "")
    lines = [f"asked:    {record['asked']}", f"reached:  {record['reached']}", *notes_in_words(record.get("notes", {}))]
    lines += ["", _load_line(record, out)]
    return Group(table, Text("\n".join(lines)))


def plan_table(record: dict[str, Any]) -> RenderableType:
    """The end of ``plan``."""
    before, after = record["sizes"]["before"], record["sizes"]["after"]
    chosen = record["chosen"]
    table = _table("", "before", "after", "change")
    _row(table, "parameters", before["parameters"], after["parameters"])
    table.add_row(
        "weights on disk",
        human_bytes(before["bytes"]),
        human_bytes(after["bytes"]),
        _change(before["bytes"], after["bytes"]),
    )
    for kind, counts in chosen["units"].items():
        _row(table, f"{kind} units (prunable blocks)", counts["of"], counts["of"] - counts["removed"])
    if chosen["masked_weights"]:
        _row(
            table,
            "weights of the masked matrices",
            chosen["masked_weights"],
            chosen["masked_weights"] - chosen["zeros"],
        )
    lines = [f"asked:  {record['asked']}", *notes_in_words(record.get("notes", {}))]
    if "plan" in record:
        lines.append(f"plan:   {record['plan']}")
    return Group(table, Text("\n".join(lines)))


def recovery_table(record: dict[str, Any], out: Path) -> RenderableType:
    """The end of ``recover``."""
    training = record["training"]
    table = _table("", "before", "after", "change")
    held_before, held_after = training["held_out_before"], training["held_out_after"]
    if held_before is not None and held_after is not None:
        table.add_row("held-out loss", f"{held_before:.4f}", f"{held_after:.4f}", _change(held_before, held_after))
    table.add_row(
        "training loss",
        f"{training['losses'][0]:.4f}",
        f"{training['losses'][-1]:.4f}",
        _change(training["losses"][0], training["losses"][-1]),
    )
    steps = f"steps: {len(training['losses'])} of {training['batch_size']} windows, {training['tokens']:,} tokens"
    if training["stopped"]:
        steps += f"; {training['stopped']}, and step {training['kept_step']} is kept"
    lines = [steps, f"method: {training['method']}", *training["notes"], _load_line(record, out)]
    return Group(table, Text("\n".join(lines)))


def _load_line(record: dict[str, Any], out: Path) -> str:
    return f"load it:  {Loading(**record['load']).line(repr(str(out)))}"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _row(table: Table, name: str, before: int, after: int) -> None:
    table.add_row(name, f"{before:,}", f"{after:,}", _change(before, after))


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""
