"""Every one-shot method on SmolLM2-135M at many ratios: perplexity, KL, time and peak memory, a column at a time.

    python benchmarks/grid.py [--reference DIR] [--columns "50 %" ...] [--methods sparsegpt ...]

Each column is a `secateur compare` on the reference windows. In the columns whose times are shown every method has a comparison and a cache of its
own, so that nothing is found made; times are of planning (opening the model, calibrating, choosing), beside one plain forward without the head over the same
windows. The other columns are one comparison each, and share what they can with each other. What has been measured is kept: a second
call goes on with what is missing, and cells that are missing are marked. Each run may take 6 GiB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

from common import BEST, DEFAULT_REFERENCE, RESULTS, ROOT, Results, fresh, lead

WEIGHTS = {
    BEST: "preset=best unit={unit}",
    "magnitude, by matrix": "magnitude unit={unit} within=layer",
    "wanda": "wanda unit={unit}",
    "wanda, one share of every row": "wanda unit={unit} within=share",
    "ria": "ria unit={unit}",
    "wanda++, score alone": "wanda++ unit={unit}",
    "wanda++": "wanda++ unit={unit} reconstruct=regional",
    "wanda, blocks fitted": "wanda unit={unit} reconstruct=block",
    "gblm": "gblm unit={unit}",
    "dsnot on wanda": "wanda unit={unit} removal=dsnot",
    "wanda, AlphaPruning": "wanda unit={unit} allocation=alpha",
    "wanda, OWL": "wanda unit={unit} allocation=owl",
    "wanda, sensitivity": "wanda unit={unit} allocation=sensitivity",
    "sparsegpt": "sparsegpt unit={unit}",
    "sparsegpt update on wanda's mask": "wanda unit={unit} removal=sparsegpt",
    "sparsegpt, sensitivity": "sparsegpt unit={unit} allocation=sensitivity",
    "alps": "sparsegpt unit={unit} within=row removal=alps",
}
NO_PATTERN = (
    "magnitude, by matrix",
    "wanda, one share of every row",
    "alps",
    "wanda, AlphaPruning",
    "wanda, OWL",
    "wanda, sensitivity",
    "sparsegpt, sensitivity",
)
CUTS = {
    BEST: "preset=best unit={unit}",
    "random": "random unit={unit}",
    "magnitude": "magnitude unit={unit}",
    "wanda": "wanda unit={unit} propagate=dense",
    "taylor": "taylor unit={unit}",
    "flap": "flap unit={unit}",
    "fms, exact gradients": "fms unit={unit} gradient=exact",
    "taylor, weights refitted": "taylor unit={unit} removal=sparsegpt",
    "taylor, sensitivity": "taylor unit={unit} allocation=sensitivity",
    "taylor, two-tier": "taylor unit={unit} allocation=two-tier",
    "taylor, global": "taylor unit={unit} allocation=global",
    "taylor, global, weights refitted": "taylor unit={unit} allocation=global removal=sparsegpt",
    "taylor 2nd order, global, weights refitted": "taylor:order=second unit={unit} allocation=global removal=sparsegpt",
}
BLOCKS = {
    BEST: "preset=best unit=block",
    "taylor": "taylor unit=block",
    "ShortGPT": "influence unit=block",
    "angular": "angular unit=block",
}


def _filled(methods: dict[str, str], unit: str, extra: str) -> dict[str, str]:
    return {name: f"{words.format(unit=unit)} {extra}".strip() for name, words in methods.items()}


PATTERNS = {name: words for name, words in WEIGHTS.items() if name not in NO_PATTERN} | {
    "alps": "sparsegpt unit={unit} removal=alps"
}
COLUMNS: dict[str, dict[str, str]] = {
    "50 %": _filled(WEIGHTS, "weight", "ratio=0.5"),
    "60 %": _filled(WEIGHTS, "weight", "ratio=0.6"),
    "70 %": _filled(WEIGHTS, "weight", "ratio=0.7"),
    "2:4": _filled(PATTERNS, "2:4", ""),
    "4:8": _filled(PATTERNS, "4:8", ""),
    "channels 20 %": _filled(CUTS, "channel", "ratio=0.2"),
    "channels 50 %": _filled(CUTS, "channel", "ratio=0.5"),
    "params -20 %": _filled(CUTS, "head,channel", "target=params=-20%"),
    "blocks 20 %": _filled(BLOCKS, "", "ratio=0.2"),
}

TIMED = ("50 %", "channels 20 %", "blocks 20 %")
"""Columns whose times are shown."""

FORWARD = """
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from secateur import console; console.quiet_libraries()
from secateur.checkpoint.source import resolve_model
ids = load_file({calibration!r})["input_ids"]
model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2").folder, dtype=torch.float32).eval().model
seconds = []
for _ in range(2):  # the first is a warm-up
    started = time.perf_counter()
    with torch.no_grad():
        for window in ids:
            model(input_ids=window[None], use_cache=False)
    seconds.append(time.perf_counter() - started)
result = dict(seconds=seconds[-1])
"""

COMPARE = """
from pathlib import Path
from secateur import comparison
rows = comparison.compare("smollm2", {words!r}, Path({out!r}), text={evaluation!r}, max_windows=None,
                          calibration={calibration!r}, memory="6GiB").rows
result = {{"rows": [row.flat() for row in rows]}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS))
    parser.add_argument("--methods", nargs="*", help="only these of each column")
    arguments = parser.parse_args()
    work = ROOT / "benchmarks" / "work" / "grid"
    results = Results("grid", "python benchmarks/grid.py")
    texts = {
        "calibration": str((arguments.reference / "calibration-tokens.safetensors").resolve()),
        "evaluation": str((arguments.reference / "evaluation-tokens.safetensors").resolve()),
    }
    for column in arguments.columns:
        wanted = {m: w for m, w in COLUMNS[column].items() if not arguments.methods or m in arguments.methods}
        missing = {method: words for method, words in wanted.items() if results.get(f"{column}: {method}") is None}
        if not missing:
            continue
        print(f"{time.strftime('%H:%M')} {column}: {', '.join(missing)}", flush=True)
        if column in TIMED:
            _one_by_one(results, column, missing, work, texts)
        else:
            _together(results, column, missing, work, texts)
    (RESULTS / "grid.md").write_text(table(results))
    print(table(results))


def _one_by_one(results: Results, column: str, missing: dict[str, str], work: Path, texts: dict[str, str]) -> None:
    """Each method in a comparison of its own, with its time beside a forward's."""
    for method, words in missing.items():
        place = work / "timed"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        load, forward = os.getloadavg()[0], fresh(FORWARD.format(**texts))["seconds"]
        code = COMPARE.format(words=[words], out=str(place / "out"), **texts)
        dense, row = fresh(code, SECATEUR_CACHE=str(place / "cache"))["rows"]
        results.put("dense", dense)
        _put(results, f"{column}: {method}", row | {"words": words, "forward": forward, "load": load})
        shutil.rmtree(place)


def _together(results: Results, column: str, missing: dict[str, str], work: Path, texts: dict[str, str]) -> None:
    """All methods in one comparison, which goes on where it was stopped; their times say nothing and are not kept."""
    place = work / column.replace(" ", "").replace("%", "").replace(":", "-")
    place.mkdir(parents=True, exist_ok=True)
    code = COMPARE.format(words=list(missing.values()), out=str(place), **texts)
    _, *rows = fresh(code, SECATEUR_CACHE=str(work / "cache"))["rows"]
    for (method, words), row in zip(missing.items(), rows, strict=True):
        row |= {"seconds": None, "peak_memory": None, "words": words}
        _put(results, f"{column}: {method}", row)
    shutil.rmtree(place)


def _put(results: Results, key: str, row: dict) -> None:
    results.put(key, row)
    (RESULTS / "grid.md").write_text(table(results))
    print(f"  {key}: {row['perplexity']} {row['failed'] or ''}", flush=True)


def table(results: Results) -> str:
    """Perplexities by method and column; then time and memory of the first column that has them."""
    dense = results.get("dense")
    lines = [
        results.caption(
            ". Perplexity on 40 × 512 tokens of WikiText-2 test, calibration 32 × 256 tokens of WikiText-2 train, fp32"
        ),
        "",
    ]
    if dense is not None:
        lines += [f"Dense: {dense['perplexity']:.3f}.", ""]
    groups = (
        ("50 %", "60 %", "70 %", "2:4", "4:8"),
        ("channels 20 %", "channels 50 %", "params -20 %"),
        ("blocks 20 %",),
    )
    for columns in groups:
        methods = list(dict.fromkeys(method for column in columns for method in COLUMNS[column]))
        lines += [
            f"| | {' | '.join(columns)} | planning, in forwards | peak memory |",
            "|---" * (len(columns) + 3) + "|",
        ]
        for method in methods:
            found = [results.get(f"{column}: {method}") for column in columns]
            cells = [_cell(entry, method in COLUMNS[column]) for entry, column in zip(found, columns, strict=True)]
            first = next((e for e in found if e is not None and e["failed"] is None and e["seconds"] is not None), None)
            cost = ["", ""]
            if first is not None:
                cost = [f"{_forwards(first):.1f}", f"{first['peak_memory'] / 2**20:,.0f} MiB"]
            lines.append(f"| {method} | {' | '.join([*cells, *cost])} |")
        lines.append("")
    return "\n".join([*lines, *_lead(results), *_cost(results), ""])


def _lead(results: Results) -> list[str]:
    """In each column, how much of the distance between the next best method and dense ``--preset best`` makes good."""
    dense, lines = results.get("dense"), []
    for column, methods in COLUMNS.items():
        found = {method: results.get(f"{column}: {method}") for method in methods}
        known = {m: e["perplexity"] for m, e in found.items() if e is not None and e["failed"] is None}
        best = known.pop(BEST, None)
        if dense is None or best is None or not known:
            continue
        lines.append(lead(column, best, known, dense["perplexity"]))
    return lines


def _cost(results: Results) -> list[str]:
    """What ``--preset best`` of weights takes beside SparseGPT: at most eight times as long is allowed."""
    best, plain = (results.get(f"{TIMED[0]}: {method}") for method in (BEST, "sparsegpt"))
    if best is None or plain is None:
        return []
    times = _forwards(best) / _forwards(plain)
    return [
        f"* {TIMED[0]}: {BEST} plans for {_forwards(best):.1f} forwards, sparsegpt for {_forwards(plain):.1f}: {times:.1f} times"
    ]


def _forwards(entry: dict) -> float:
    return entry["seconds"] / entry["forward"]


def _cell(entry: dict | None, asked: bool) -> str:
    if entry is None:
        return "not run yet" if asked else ""
    if entry["failed"] is not None:
        return "failed"
    return f"{entry['perplexity']:,.2f}"


if __name__ == "__main__":
    main()
