"""The page of one run: what was taken, from where, by what, and what it cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import secateur
from secateur.checkpoint.architecture import Loading
from secateur.checkpoint.manifest import RECORD
from secateur.errors import PlanError
from secateur.files import atomic_file, human_bytes, human_seconds
from secateur.plans import Plan, load_plan
from secateur.report.measured import PERPLEXITY, TASKS, read_measured
from secateur.report.measures import MeasureTable, by_task, counted, evaluated, task_means, task_rows
from secateur.report.page import charts
from secateur.report.page.render import render
from secateur.report.page.verdict import verdict, zeroed
from secateur.report.words import notes_in_words, without_folders
from secateur.runfolder import RUN_FILE
from secateur.structure import OUTSIDE

PAGE = "report.html"

Facts = dict[str, Any]


def write_run_page(folder: Path, record: Mapping[str, Any] | None = None) -> Path:
    """Write ``report.html`` into a folder that ``prune``, ``apply`` or ``recover`` made; returns the file.

    Args:
        record: the run's record, where it is not written yet.
    """
    if record is None:
        record = json.loads((folder / RECORD / RUN_FILE).read_text(encoding="utf-8"))
    file = folder / PAGE
    with atomic_file(file) as temporary:
        temporary.write_text(render("run.html", **run_facts(folder, record)), encoding="utf-8")
    return file


def run_facts(folder: Path, record: Mapping[str, Any]) -> Facts:
    """Everything that the page says."""
    plan: Plan | None = None
    with suppress(PlanError):
        plan = load_plan(folder)
    recipe = folder / RECORD / "recipe.yaml"
    measured = read_measured(folder)
    training = record.get("training")
    before = record.get("dense") or record["before"]
    columns = {"dense": before, "pruned": record["before"], "recovered": record["after"]}
    counts = columns if training and record.get("dense") else {"before": record["before"], "after": record["after"]}
    return {
        "title": _title(record),
        "verdict": verdict(before, record["after"], measured),
        "measured": measured,
        "tables": _tables(measured, counts),
        "removed": _removed(record, plan),
        **plan_charts(plan, training),
        "training": _training(training, record),
        "tasks": _tasks(measured),
        "continuations": _continuations(measured),
        "how": _how(record, plan),
        "times": _times(record),
        "recipe": without_folders(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
        "load": _load(record),
        "reproduce": _reproduce(record, plan),
        "uneven": record.get("uneven", False),
        "version": secateur.__version__,
        "back": None,
    }


def _title(record: Mapping[str, Any]) -> str:
    model = record["model"]
    name = model.get("hub_id") or Path(model["spec"]).name
    return f"{name}, pruned and recovered" if "training" in record else f"{name}, pruned"


def _tables(measured: Mapping[str, Any], counts: Mapping[str, Mapping[str, Any]]) -> list[MeasureTable]:
    found = measured.get(PERPLEXITY)
    return [evaluated(found)] if found else [counted(list(counts), list(counts.values()))]


def _removed(record: Mapping[str, Any], plan: Plan | None) -> list[tuple[str, int, int]]:
    """What was removed: kind, how many, of how many."""
    rows = []
    before, after = record["before"]["units"], record["after"]["units"]
    for kind in sorted(before):
        if after.get(kind, 0) != before[kind]:
            rows.append((f"{kind} units", before[kind] - after.get(kind, 0), before[kind]))
    if plan is not None and not rows:
        rows = [(f"{kind} units", gone, of) for kind, (gone, of) in plan.removed_by_kind().items() if gone]
    if zeroed(record["before"], record["after"]):
        rows.append(("weights of the blocks' matrices zeroed", record["after"]["zeros"], record["after"]["prunable"]))
    gone = record["before"]["parameters"] - record["after"]["parameters"]
    if gone:
        rows.append(("parameters", gone, record["before"]["parameters"]))
    return rows


# -- pictures


def plan_charts(plan: Plan | None, training: Mapping[str, Any] | None = None) -> Facts:
    """Where the model was cut, and how the scores lie that decided it."""
    if plan is None:
        return {"where": None, "dropped": [], "scores": [], "steps": False}
    shares, blocks = shares_of(plan)
    dropped = sorted(
        {unit for entry in plan.blocks for cut in entry.cuts if cut.kind == "block" for unit in cut.removed}
    )
    return {
        "where": charts.heat_map(shares, blocks) if shares else None,
        "dropped": dropped,
        "scores": _distributions(plan),
        "steps": plan.recipe.steps > 1,
    }


def shares_of(plan: Plan) -> tuple[dict[str, dict[int, dict[str, Any]]], int]:
    """By kind of unit, and by matrix, what was removed from every block; and how many blocks there are to show."""
    shares: dict[str, dict[int, dict[str, Any]]] = {}
    blocks = 1 + max((entry.block for entry in plan.blocks), default=0)
    for entry in plan.blocks:
        for cut in entry.cuts:
            if cut.kind == "block":
                blocks = max(blocks, cut.count)
                for block in range(cut.count):
                    gone = int(block in cut.removed)
                    shares.setdefault("whole block", {})[block] = {"share": gone, "gone": gone, "of": 1}
            elif entry.block != OUTSIDE:
                _count(shares, cut.kind, entry.block, len(cut.removed), cut.count)
        for name, masked in entry.masks.items():
            _count(shares, short(name), entry.block, masked.zeros, masked.shape[0] * masked.shape[1])
    return shares, blocks


def short(name: str) -> str:
    """A matrix's name without what all have in common; experts share a row."""
    return ".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdigit())


def _count(shares: dict[str, dict[int, dict[str, Any]]], part: str, block: int, gone: int, of: int) -> None:
    cell = shares.setdefault(part, {}).setdefault(block, {"share": 0.0, "gone": 0, "of": 0})
    cell["gone"] += gone
    cell["of"] += of
    cell["share"] = cell["gone"] / cell["of"]


def _distributions(plan: Plan) -> list[Facts]:
    """A picture for every kind of unit, or for every matrix, over all blocks."""
    found: dict[str, dict[int, Any]] = {}
    for entry in plan.blocks:
        for name, spread in entry.scores.items():
            if spread.kept:
                found.setdefault(short(name), {})[entry.block] = spread
    kinds, pictures = plan.recipe.cut_kinds, []
    order = [*kinds, *dict.fromkeys(short(name) for entry in plan.blocks for name in entry.masks)]
    for name, spreads in sorted(found.items(), key=lambda item: order.index(item[0])):
        called = "blocks" if name == "block" else f"{name} units" if name in kinds else name
        pictures.append(charts.distribution(called, spreads))
        if len(spreads) > 1 and name in kinds:
            pictures.append(charts.by_block(called, spreads))
    return pictures


def _training(training: Mapping[str, Any] | None, record: Mapping[str, Any]) -> Facts | None:
    if not training:
        return None
    data = record["data"]
    lines = [
        f"{training['method']}, {len(training['losses'])} steps of {training['batch_size']} windows, {training['tokens']:,} tokens",
        f"on {data['windows']} windows of {data['window_length']} tokens: {without_folders(data['description'], data['source'])}",
    ]
    if training["held_out_before"] is not None and training["held_out_after"] is not None:
        lines.append(
            f"loss on {training['held_out_windows']} windows kept out: {training['held_out_before']:.4f} before, "
            f"{training['held_out_after']:.4f} after"
        )
    if training["stopped"]:
        lines.append(f"{training['stopped']}; the state of step {training['kept_step']} is kept")
    return {"lines": [*lines, *training["notes"]], "chart": charts.loss_curve(training["losses"], training["looks"])}


def _tasks(measured: Mapping[str, Any]) -> Facts | None:
    tasks = measured.get(TASKS)
    if not tasks:
        return None
    rows = task_rows(tasks)
    chart = charts.task_scores(rows, list(tasks["models"])) if rows else None
    return {"rows": rows, "means": task_means(tasks), "chart": chart, "protocol": without_folders(tasks["protocol"]), "models": list(tasks["models"]), "table": by_task(rows)}  # fmt: skip


def _continuations(measured: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    return list(((measured.get(PERPLEXITY) or {}).get("continuations") or {}).items())


# -- words


def _how(record: Mapping[str, Any], plan: Plan | None) -> list[tuple[str, str]]:
    rows = []
    if "asked" in record:
        rows += [("asked for", record["asked"]), ("reached", record["reached"])]
    if plan is not None:
        rows += how_chosen(plan)
    rows += [("noted", line) for line in notes_in_words(record.get("notes", {}))]
    model = record["model"]
    rows.append(("the model it came from", model.get("hub_id") or without_folders(model["spec"], model["spec"])))
    if "logits_difference" in record:
        rows.append(("loaded in a fresh process", f"logits differ by at most {record['logits_difference']:.1g}"))
    return rows


def how_chosen(plan: Plan, cut_from: str | None = None) -> list[tuple[str, str]]:
    """The recipe's parts in words.

    Args:
        cut_from: how the windows were made, where the plan knows only a file of them.
    """
    recipe, text = plan.recipe, plan.calibration
    parts = {
        "criterion": recipe.criterion,
        "allocation": recipe.allocation,
        "removal": recipe.removal,
        "reconstruct": recipe.reconstruct,
    }
    where = "none was needed"
    if text:
        described = cut_from or without_folders(text.description, text.source)
        where = f"{text.windows} windows of {text.window_length} tokens, {described}"
    return [*((name, str(value)) for name, value in parts.items() if value), ("calibration", where)]


def _times(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(stage, human_seconds(seconds)) for stage, seconds in (record.get("stages") or {}).items()]
    if record.get("seconds") is not None:
        rows.append(("altogether", human_seconds(record["seconds"])))
    if record.get("peak_memory"):
        rows.append(("peak memory", human_bytes(record["peak_memory"])))
    return rows


def _load(record: Mapping[str, Any]) -> str:
    loading = Loading(**record["load"])
    return "\n".join(
        [
            f"from transformers import {loading.model}, {loading.processor}",
            "",
            "model = " + loading.line('"FOLDER"'),
            f'processor = {loading.processor}.from_pretrained("FOLDER")',
        ]
    ).replace("processor =", "tokenizer =" if loading.processor == "AutoTokenizer" else "processor =")


def _reproduce(record: Mapping[str, Any], plan: Plan | None) -> str:
    if "training" in record:
        return _recover_command(record)
    return "secateur prune --recipe secateur/recipe.yaml --out AGAIN\nsecateur apply secateur/plan.json --out AGAIN   # the same weights, nothing measured anew"


def _recover_command(record: Mapping[str, Any]) -> str:
    """The command that made a recovered folder, as far as its record says."""
    from secateur.recovery import RecoverySettings

    identity, recovered_from = record.get("identity") or {}, record["model"]["recovered_from"]
    source, _, windows, length = identity.get("data") or [record["data"]["source"], None, None, None]
    given = {"data": without_folders(source, source), "windows": windows, "window-length": length}
    default = RecoverySettings().model_dump(mode="json")
    changed = {name: value for name, value in (identity.get("settings") or {}).items() if value != default.get(name)}
    given |= {name.replace("_", "-"): value for name, value in changed.items()}
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return " ".join(
        ["secateur recover", shlex.quote(without_folders(recovered_from, recovered_from)), "--out AGAIN", *flags]
    )
