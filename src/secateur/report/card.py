"""The model card: a README.md whose metadata block the hub accepts, and the figures of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.checkpoint.architecture import Loading
from secateur.files import human_bytes
from secateur.plans import Plan

Facts = dict[str, Any]


def model_card(facts: Facts) -> str:
    """The card of one output.

    Args:
        facts: what ``run`` recorded: ``title``, ``model`` (spec, hub_id, card), ``what`` (one sentence), ``before`` and
            ``after`` (parameters, bytes, zeros, prunable), ``asked``, ``calibration``, ``uneven``, ``load``, ``figures``, ``recipe`` (YAML).
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
        _figures(facts.get("figures")),
        "## How it was chosen\n\n" + _how(facts),
        "## Load it\n\n" + _load(facts),
        "## Recipe\n\nEverything needed to make it again; the full plan is in `secateur/plan.json`.\n\n"
        f"```yaml\n{facts['recipe'].strip()}\n```",
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
        "what": f"[Secateur](https://pypi.org/project/secateur/) took from {name}: {record['reached']}.",
        "before": record["before"],
        "after": record["after"],
        "asked": record["asked"],
        "criterion": plan.recipe.criterion,
        "calibration": record["calibration"],
        "uneven": record["uneven"],
        "load": record["load"],
        "figures": _figures_of(record.get("evaluation")),
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
        f"{data['window_length']} tokens ({data['description']}).",
        "before": record["before"],
        "after": record["after"],
        "asked": "recovery of a pruned model",
        "criterion": training["method"],
        "calibration": data,
        "uneven": record["uneven"],
        "load": record["load"],
        "figures": None,
        "recipe": recipe or "model: unknown",
    }


def _figures_of(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    """The card's table of an evaluation's JSON."""
    if not evaluation:
        return None
    models = evaluation["models"]
    return {
        "columns": list(models),
        "rows": {"perplexity": [f"{entry['perplexity']['value']:.2f}" for entry in models.values()]},
        "protocol": evaluation["protocol"],
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


def _figures(figures: Facts | None) -> str:
    if not figures:
        return ""
    header = "| " + " | ".join(["", *figures["columns"]]) + " |"
    rule = "|---" * (len(figures["columns"]) + 1) + "|"
    rows = [f"| {name} | " + " | ".join(values) + " |" for name, values in figures["rows"].items()]
    return "\n".join(["## Figures", "", figures["protocol"], "", header, rule, *rows])


def _how(facts: Facts) -> str:
    calibration = facts.get("calibration")
    lines = [f"- Asked for: {facts['asked']}", f"- Criterion: `{facts['criterion']}`"]
    if calibration:
        lines.append(
            f"- Calibration: {calibration['windows']} windows of {calibration['window_length']} tokens, "
            f"{calibration['description']} (sha256 `{calibration['sha256'][:16]}`)"
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
