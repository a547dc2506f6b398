"""The presets where they were not tuned: calibrated on C4, judged on PTB and on novels, SmolLM2-135M.

    python benchmarks/elsewhere.py [--data DIR]

`docs/decisions.md` says what was tried on WikiText-2 before the presets became what they are. Here every recipe is calibrated on 32 × 256 tokens of C4
(validation documents) and measured on 32 × 256 tokens of two other texts. What has been measured is kept.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path

from common import RESULTS, ROOT, Results, fresh

DEFAULT_DATA = ROOT.parent / "shared" / "data"
TEXTS = {"PTB": "text/ptb-valid.txt", "novels": "text/bookcorpus-like.txt"}
RECIPES: dict[str, dict[str, str]] = {
    "weights 50 %": {
        "wanda": "wanda unit=weight",
        "preset balanced (sparsegpt)": "preset=balanced unit=weight",
        "alps": "sparsegpt unit=weight within=row removal=alps",
        "preset best": "preset=best unit=weight",
    },
    "2:4": {
        "wanda": "wanda unit=2:4",
        "preset balanced (sparsegpt)": "preset=balanced unit=2:4",
        "alps": "sparsegpt unit=2:4 removal=alps",
        "preset best": "preset=best unit=2:4",
    },
    "channels 20 %": {
        "taylor, global": "taylor unit=channel allocation=global ratio=0.2",
        "preset balanced": "preset=balanced unit=channel ratio=0.2",
        "preset best": "preset=best unit=channel ratio=0.2",
    },
}

COMPARE = """
from pathlib import Path
from secateur import comparison
found = comparison.compare("smollm2", {words!r}, Path({out!r}), text={text!r}, context=256, max_windows=32,
                           calibration={calibration!r}, windows=32, window_length=256)
result = {{"rows": [row.flat() for row in found.rows]}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    data = parser.parse_args().data.resolve()
    work = ROOT / "benchmarks" / "work" / "elsewhere"
    results = Results("elsewhere", "python benchmarks/elsewhere.py")
    for recipes, (name, file) in itertools.product(RECIPES.values(), TEXTS.items()):
        words = list(recipes.values())
        if all(results.get(f"{name}: {word}") for word in words):
            continue
        code = COMPARE.format(
            words=words,
            out=str(work / "out"),
            text=str(data / file),
            calibration=str(data / "text/c4-validation-2k.parquet"),
        )
        for row in fresh(code, SECATEUR_CACHE=str(work / "cache"))["rows"]:
            results.put(
                f"{name}: {row['recipe']}", {"perplexity": row["perplexity"], "kl": row["kl"], "failed": row["failed"]}
            )
        (RESULTS / "elsewhere.md").write_text(table(results))
    shutil.rmtree(work, ignore_errors=True)
    print(table(results))


def table(results: Results) -> str:
    lines = [results.caption(". Perplexity, and KL to the dense model in nats a token"), ""]
    lines += [f"| | {' | '.join(TEXTS)} |", "|---" * (len(TEXTS) + 1) + "|", _row(results, "dense", "dense")]
    for group, recipes in RECIPES.items():
        lines += [_row(results, f"{group}, {name}", word) for name, word in recipes.items()]
    return "\n".join([*lines, ""])


def _row(results: Results, name: str, word: str) -> str:
    cells = []
    for text in TEXTS:
        entry = results.get(f"{text}: {word}")
        if entry is None or entry["perplexity"] is None:
            cells.append("not run yet" if entry is None else "failed")
        else:
            cells.append(f"{entry['perplexity']:.2f}" + (f" ({entry['kl']:.3f})" if entry["kl"] is not None else ""))
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
