"""Structured pruning on SmolLM2-135M: every kind of unit, allocation and score; perplexity before and after a short LoRA.

    python benchmarks/structured.py [--reference DIR] [--text FILE] [--only NAME ...]

Each row runs as a user would run it (`secateur prune`, then `secateur recover`), scores on the reference's 32 x 256 calibration
tokens, perplexity on its 40 windows of 512 tokens of WikiText-2 test. The LoRA is short on purpose: 12 steps of 8 windows of
256 tokens of WikiText-2 train, rank 8, peak learning rate 3e-4; it shows how fast each cut heals, not how far. All rows are pruned
first and tuned after. Results are kept as they come; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from common import DEFAULT_REFERENCE, RESULTS, Results, fresh
from one_shot import PERPLEXITY, PRELUDE

from secateur.checkpoint.source import resolve_model

DEFAULT_TEXT = DEFAULT_REFERENCE.parent / "data" / "text" / "wikitext2-train-part.txt"
TUNING: dict[str, Any] = {"steps": 12, "batch_size": 8, "learning_rate": 3e-4, "windows": 112, "window_length": 256}

PRUNE = """
import secateur
started = time.perf_counter()
record = secateur.prune({folder!r}, {out!r}, calibration={calibration!r}, overwrite=True, **{fields!r}).record
sizes = record["sizes"]
result = dict(seconds=time.perf_counter() - started, reached=record["reached"], architecture=record["architecture"],
    uneven=record["uneven"], parameters=[sizes["before"]["parameters"], sizes["after"]["parameters"]])
"""

RECOVER = """
import secateur
started = time.perf_counter()
secateur.recover({pruned!r}, {out!r}, data={text!r}, overwrite=True, **{tuning!r})
result = dict(seconds=time.perf_counter() - started)
"""

ROWS: dict[str, dict[str, Any]] = {
    "channels 20 %, element Taylor (1st order)": {"unit": "channel", "ratio": 0.2},
    "channels 20 %, vector Taylor": {"unit": "channel", "ratio": 0.2, "criterion": "taylor:order=vector"},
    "channels 20 %, random": {"unit": "channel", "ratio": 0.2, "criterion": "random"},
    "channels 20 %, L2": {"unit": "channel", "ratio": 0.2, "criterion": "magnitude:norm=l2"},
    "hidden 20 %, element Taylor": {"unit": "hidden", "ratio": 0.2},
    "params -20 % across head, query, channel, element Taylor": {"unit": "head,query,channel", "target": "params=-20%"},
    "params -20 % across head and channel, global": {
        "unit": "head,channel", "target": "params=-20%", "allocation": "global",
    },
    "params -20 % across head and channel, two-tier": {
        "unit": "head,channel", "target": "params=-20%", "allocation": "two-tier",
    },
    "channels 50 %, element Taylor": {"unit": "channel", "ratio": 0.5},
    "one KV group of three, element Taylor": {"unit": "head", "ratio": 0.34},
    "one query head a group, element Taylor": {"unit": "query", "ratio": 0.34},
    "channels 20 %, Taylor 2nd order": {"unit": "channel", "ratio": 0.2, "criterion": "taylor:order=second"},
    "channels 20 %, Taylor mixed": {"unit": "channel", "ratio": 0.2, "criterion": "taylor:order=mixed"},
    "channels 20 %, L1": {"unit": "channel", "ratio": 0.2, "criterion": "magnitude:norm=l1"},
    "channels 20 %, element Taylor, two-tier": {"unit": "channel", "ratio": 0.2, "allocation": "two-tier"},
    "channels 20 %, element Taylor, global": {"unit": "channel", "ratio": 0.2, "allocation": "global"},
    "channels 20 %, element Taylor, 4 rounds": {"unit": "channel", "ratio": 0.2, "steps": 4},
    "blocks 20 %, element Taylor": {"unit": "block", "ratio": 0.2},
    "hidden 20 %, L2": {"unit": "hidden", "ratio": 0.2, "criterion": "magnitude:norm=l2"},
    "hidden 20 %, random": {"unit": "hidden", "ratio": 0.2, "criterion": "random"},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT)
    parser.add_argument("--only", nargs="*", help="rows to run; the others are taken from earlier results")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    results = Results("structured", "python benchmarks/structured.py")
    places = {
        "folder": str(resolve_model("smollm2").folder),
        "calibration": str((arguments.reference / "calibration-tokens.safetensors").resolve()),
        "evaluation": str((arguments.reference / "evaluation-tokens.safetensors").resolve()),
    }
    prelude = PRELUDE.format(**places)
    if results.get("dense") is None:
        results.put("dense", fresh(prelude + PERPLEXITY.format(**places, out=places["folder"])))
    wanted = {name: fields for name, fields in ROWS.items() if not arguments.only or name in arguments.only}
    for name, fields in wanted.items():
        if results.get(name) is None:
            results.put(name, prune(prelude, fields, places, work / _folder(name)))
            (RESULTS / "structured.md").write_text(table(results))
    for name, fields in wanted.items():
        entry = results.get(name)
        if entry is not None and "tuned_perplexity" not in entry:
            if not (work / _folder(name)).is_dir():
                prune(prelude, fields, places, work / _folder(name))
            results.put(name, entry | tune(prelude, places, work / _folder(name), arguments.text))
            shutil.rmtree(work / _folder(name))
            (RESULTS / "structured.md").write_text(table(results))
    (RESULTS / "structured.md").write_text(table(results))
    print(table(results))


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def prune(prelude: str, fields: dict[str, Any], places: dict[str, str], folder: Path) -> dict[str, Any]:
    """Prune into ``folder``, with scores of earlier rows where they are the same, and measure perplexity."""
    print(f"pruning {folder.name} ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    cache = {"SECATEUR_CACHE": str(folder.parent / "cache")}
    entry = fresh(prelude + PRUNE.format(fields=fields, out=str(folder), **places), **cache)
    entry["perplexity"] = fresh(prelude + PERPLEXITY.format(out=str(folder), **places))["perplexity"]
    return entry


def tune(prelude: str, places: dict[str, str], pruned: Path, text: Path) -> dict[str, Any]:
    """A short LoRA on what was pruned, and its perplexity."""
    print(f"tuning {pruned.name} ...", flush=True)
    tuned = str(pruned.parent / "tuned")
    code = RECOVER.format(pruned=str(pruned), out=tuned, text=str(text.resolve()), tuning=TUNING)
    seconds = fresh(prelude + code, SECATEUR_CACHE=str(pruned.parent / "cache"))["seconds"]
    perplexity = fresh(prelude + PERPLEXITY.format(out=tuned, **places))["perplexity"]
    return {"tuning_seconds": seconds, "tuned_perplexity": perplexity}


def table(results: Results) -> str:
    """The results as Markdown."""
    machine = results.content["machine"]
    lines = [
        f"`{results.content['command']}`: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"torch {machine['torch']}, transformers {machine['transformers']}; scores on 32 × 256 tokens, perplexity on 40 × 512 tokens of "
        "WikiText-2 test, fp32; LoRA of 12 steps of 8 × 256 tokens of WikiText-2 train.",
        "",
        "| what leaves | parameters | perplexity | after a short LoRA | written as | date |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("dense", *ROWS):
        entry = results.get(name)
        if entry is None:
            lines.append(f"| {name} | not run yet | | | | |")
            continue
        share = f"{100 * (entry['parameters'][1] / entry['parameters'][0] - 1):.1f} %" if "parameters" in entry else ""
        tuned = (
            f"{entry['tuned_perplexity']:.2f}" if "tuned_perplexity" in entry else "" if name == "dense" else "not run"
        )
        written = entry.get("architecture", "") + (" with the modelling file" if entry.get("uneven") else "")
        cells = [name, share, f"{entry['perplexity']:.2f}", tuned, written, entry["date"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
