"""The model card: a README.md whose metadata block the hub accepts, and the figures of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.architecture import Loading
from secateur.files import atomic_file, human_bytes
from secateur.plans import Plan
from secateur.report.measured import PERPLEXITY, TASKS, read_measured
from secateur.report.measures import by_task, evaluated, task_means, task_rows
from secateur.report.words import without_folders

Facts = dict[str, Any]

FIGURES_BEGIN, FIGURES_END = "<!-- figures -->", "<!-- end of figures -->"
"""What stands between them is written anew when more has been measured."""


def model_card(facts: Facts) -> str:
    """The card of one output.

    Args:
        facts: what ``run`` recorded: ``title``, ``model`` (spec, hub_id, card), ``what`` (one sentence), ``before`` and
            ``after`` (parameters, bytes, zeros, prunable), ``asked``, ``calibration``, ``uneven``, ``load``, ``measured`` (what
            ``read_measured`` gives), ``recipe`` (YAML).
    """
    from huggingface_hub import ModelCardData

    model = facts["model"]
    card = model.get("card") or {}
    metadata = ModelCardData(
        license=card.get("license"),
        license_name=card.get("license_name"),
        license_link=card.get("license_link"),
        base_model=model.get("hub_id") or card.get("base_model"),
        library_name="transformers",
        pipeline_tag=facts["load"]["task"],
        tags=["pruning", "secateur"],
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {facts['title']}",
        facts["what"],
        _sizes_table(facts),
        FIGURES_BEGIN + "\n" + figures_markdown(facts.get("measured") or {}) + FIGURES_END,
        "## How it was chosen\n\n" + _how(facts),
        "## Load it\n\n" + _load(facts),
        "## Recipe\n\nEverything needed to make it again; the full plan is in `secateur/plan.json`.\n\n"
        f"```yaml\n{without_folders(facts['recipe'].strip())}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_card(folder: Path, facts: Facts) -> None:
    """Put the card into a finished folder."""
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")


def pruned_facts(plan: Plan, source_card: Facts, record: Facts) -> Facts:
    """What the card of a pruned folder says."""
    name = plan.model.hub_id or Path(plan.model.spec).name
    return {
        "title": f"{name}, pruned",
        "model": plan.model.model_dump() | {"card": source_card},
        "what": f"Secateur took from {name}: {record['reached']}.",
        "before": record["before"],
        "after": record["after"],
        "asked": record["asked"],
        "criterion": plan.recipe.criterion,
        "calibration": record["calibration"],
        "uneven": record["uneven"],
        "load": record["load"],
        "measured": {PERPLEXITY: record["evaluation"]} if "evaluation" in record else {},
        "recipe": plan.recipe.to_yaml(),
    }


def recovered_facts(record: Facts, title: str, recipe: str | None) -> Facts:
    """What the card of a recovered folder says; ``title`` is how it was tuned, ``recipe`` the YAML it was pruned by."""
    name = record["model"]["hub_id"] or Path(record["model"]["spec"]).name
    training, data = record["training"], record["data"]
    return {
        "title": f"{name}, pruned and recovered",
        "model": record["model"],
        "what": f"A pruned {name}, tuned by {title} for {training['kept_step']} steps on {data['windows']} windows of "
        f"{data['window_length']} tokens ({without_folders(data['description'], data['source'])}).",
        "before": record["before"],
        "after": record["after"],
        "asked": "recovery of a pruned model",
        "criterion": training["method"],
        "calibration": data,
        "uneven": record["uneven"],
        "load": record["load"],
        "recipe": recipe or "model: unknown",
    }


def _sizes_table(facts: Facts) -> str:
    before, after = facts["before"], facts["after"]
    rows = [
        "| | before | after |",
        "|---|---|---|",
        f"| parameters | {before['parameters']:,} | {after['parameters']:,} |",
        f"| zeros in the blocks' matrices | {_share(before)} | {_share(after)} |",
        f"| size of the weights | {human_bytes(before['bytes'])} | {human_bytes(after['bytes'])} |",
    ]
    for kind, left in sorted(after["units"].items()):
        there = before["units"].get(kind)
        if there is not None and there != left:
            rows.append(f"| {kind} units | {there:,} | {left:,} |")
    return "\n".join(rows)


def _share(count: dict[str, Any]) -> str:
    return f"{100 * count['zeros'] / max(1, count['prunable']):.2f} %"


def figures_markdown(measured: Mapping[str, Any]) -> str:
    """The card's figures: what ``evaluate`` measured, with tasks or without; empty where nothing was measured yet."""
    parts = []
    if found := measured.get(PERPLEXITY):
        table = evaluated(found)
        cells = {
            label: [f"{cell.text} ({cell.ratio})" if cell.ratio else cell.text for cell in row]
            for label, row in table.rows
        }
        parts += [table.note, _markdown(table.heads, cells)]
    if found := measured.get(TASKS):
        rows = by_task(task_rows(found))
        for mean in task_means(found):
            error = "" if mean["error"] is None else f" ± {mean['error']:.3f}"
            rows.setdefault(f"mean ({mean['metric']})", []).append(f"{mean['value']:.3f}{error}")
            rows.setdefault("share of the first's", []).append("" if mean["kept"] is None else f"{mean['kept']:.1%}")
        parts += [without_folders(found["protocol"]), _markdown(list(found["models"]), rows)]
    return "\n\n".join(["## Figures", *parts]) + "\n" if parts else ""


def refresh_card(folder: Path) -> None:
    """Put what has been measured since into a written card; one that somebody has written anew is left as it is."""
    file = folder / "README.md"
    if not file.is_file():
        return
    before, begin, rest = file.read_text(encoding="utf-8").partition(FIGURES_BEGIN)
    _, end, after = rest.partition(FIGURES_END)
    if begin and end:
        with atomic_file(file) as temporary:
            text = f"{before}{begin}\n{figures_markdown(read_measured(folder))}{end}{after}"
            temporary.write_text(text, encoding="utf-8")


def _markdown(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [["", *heads], ["---"] * (len(heads) + 1), *([label, *cells] for label, cells in rows.items())]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _how(facts: Facts) -> str:
    calibration = facts.get("calibration")
    lines = [f"- Asked for: {facts['asked']}", f"- Criterion: `{facts['criterion']}`"]
    if calibration:
        lines.append(
            f"- Calibration: {calibration['windows']} windows of {calibration['window_length']} tokens, "
            f"{without_folders(calibration['description'], calibration['source'])} (sha256 `{calibration['sha256'][:16]}`)"
        )
    else:
        lines.append("- Calibration: none was needed")
    return "\n".join(lines)


def _load(facts: Facts) -> str:
    loading = Loading(**facts["load"])
    note = (
        "Its sizes are not those of its family, so transformers builds it through the bundled `modeling_secateur.py`; "
        "`secateur.load(folder)` needs no remote code.\n\n"
        if facts["uneven"]
        else ""
    )
    processor = "tokenizer" if loading.processor == "AutoTokenizer" else "processor"
    lines = [
        f"from transformers import {loading.model}, {loading.processor}",
        "model = " + loading.line('"FOLDER"'),
        f'{processor} = {loading.processor}.from_pretrained("FOLDER")',
    ]
    return note + "\n".join(["```python", *lines, "```"])
