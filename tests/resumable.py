"""What tests and the benchmark of kills share: runs to interrupt, and results to compare byte for byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

LOGS = {"secateur/log.txt", "secateur/log.jsonl"}
"""The only files of a result in which an interrupted run may be seen, beside the record's TIMINGS."""

RECORD, PAGE = "secateur/run.json", "report.html"
TIMINGS = ("seconds", "stages", "attempts")

RECIPES: dict[str, list[str]] = {
    "taylor channels": ["--unit", "channel", "--ratio", "0.3"],
    "gblm weight, pruned": ["--criterion", "gblm", "--unit", "weight", "--ratio", "0.5"],
    "wanda 2:4, pruned": ["--criterion", "wanda", "--unit", "2:4"],
    "magnitude weight, global": ["--criterion", "magnitude", "--unit", "weight", "--within", "global"],
    "taylor head,channel in two rounds": ["--unit", "head,channel", "--ratio", "0.5", "--steps", "2"],
    "taylor second order, weight": ["--criterion", "taylor:order=second", "--unit", "weight"],
    "wanda weight, dense": ["--criterion", "wanda", "--unit", "weight", "--propagate", "dense"],
    "sparsegpt weight, each block its own share": [
        "--criterion",
        "sparsegpt",
        "--unit",
        "weight",
        "--allocation",
        "owl",
    ],
    "taylor channels, global, refitted, blocks fitted": [
        *[
            "--ratio",
            "0.3",
            "--allocation",
            "global",
            "--removal",
            "sparsegpt",
            "--reconstruct",
            "block:epochs=1,between=1",
        ],
    ],
    "flap head,channel, biases": ["--criterion", "flap", "--unit", "head,channel", "--ratio", "0.3"],
    "wanda weight, biases, pruned": [
        "--criterion",
        "wanda",
        "--unit",
        "weight",
        "--removal",
        "bias",
        "--propagate",
        "pruned",
    ],
    "taylor head,channel, global": ["--unit", "head,channel", "--ratio", "0.3", "--allocation", "global"],
}


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a finished result but its logs: bytes, and of the record all but its timings."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in LOGS:
            found[name] = file.read_bytes()
    record = json.loads(found[RECORD])
    if PAGE in found:  # which tells the timings too
        found[PAGE] = re.sub(rb"<h2>What the run took</h2>.*?</table>", b"", found[PAGE], flags=re.DOTALL)
    found[RECORD] = {key: value for key, value in record.items() if key not in TIMINGS}
    return found


def different(first: Path, second: Path) -> list[str]:
    """The files in which two results differ, or that only one of them has."""
    one, other = contents(first), contents(second)
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
