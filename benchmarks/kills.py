"""A hundred kills at random moments, and not one byte that differs.

    python benchmarks/kills.py [--kills 100] [--seed 0]

For each of several recipes ``secateur prune`` runs once undisturbed, in a process of its own, on a random Llama of tiny width with
twelve blocks. Then it is started again and killed (SIGKILL) at a uniformly random moment of that run's duration, once to three times
in a row, and started a last time to its end. Every file of the result has to be that of the undisturbed run byte for byte, except
the logs and the record's timings; nothing may be left beside it; and where a block had been finished, the next attempt must not have
begun with the first. A benchmark that is stopped goes on with the next case.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Results

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from resumable import RECIPES, different
from tiny_models import tiny_llama

from secateur import console
from secateur.runlog import read_events

BLOCKS, WINDOWS, LENGTH = 12, 16, 64
AT_MOST = 3
"""Kills in a row before a run is left to finish."""


class Place:
    """One folder with the model, its text, and everything that the runs write."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import save_file

        self.folder, self.model, self.text = folder, folder / "model", folder / "windows.safetensors"
        tiny_llama(num_hidden_layers=BLOCKS).save_pretrained(self.model)
        generator = torch.Generator().manual_seed(3)
        save_file({"input_ids": torch.randint(128, (WINDOWS, LENGTH), generator=generator)}, self.text)

    def prune(self, recipe: str, name: str, kill_after: float | None = None) -> tuple[int, float, str]:
        """Run the command line; exit code, seconds and stderr. A cache of its own, shared by its attempts only."""
        words = [sys.executable, "-m", "secateur", "prune", str(self.model), "--out", str(self.folder / name)]
        words += ["--calibration", str(self.text), *RECIPES[recipe]]
        environment = os.environ | {"SECATEUR_CACHE": str(self.folder / f"cache {name}"), "OMP_NUM_THREADS": "1"}
        with (self.folder / "stderr").open("w+") as said:
            began = time.monotonic()
            process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=said)
            try:
                process.wait(kill_after)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            seconds = time.monotonic() - began
            said.seek(0)
            return process.returncode, seconds, said.read()


def straight(place: Place, recipe: str) -> tuple[Path, float]:
    """The undisturbed run and its seconds: the less of two, since a kill has to come before the end."""
    name = f"straight {list(RECIPES).index(recipe)}"
    durations = []
    for attempt in (name, f"{name} again"):
        code, seconds, said = place.prune(recipe, attempt)
        if code != 0:
            raise RuntimeError(said)
        durations.append(seconds)
    if different(place.folder / name, place.folder / f"{name} again"):
        raise RuntimeError(f"two undisturbed runs of {recipe} differ")
    return place.folder / name, min(durations)


def where(out: Path) -> str:
    """In which stage a killed run was."""
    partial = out.with_name(f"{out.name}.partial")
    if out.exists():
        return "after the end"
    stages = [line for line in read_events(partial / "secateur" / "log.jsonl") if "stage" in line]
    if not partial.exists():
        return "before its folder"
    if not stages:
        return "beginning"
    return str(stages[-1]["stage"]) + ("" if stages[-1]["event"] == "stage started" else ", done")


def blocks_in(out: Path) -> list[int]:
    """How many blocks each attempt walked over."""
    counts: list[int] = []
    for line in read_events(out / "secateur" / "log.jsonl"):
        if line.get("event") == "run started":
            counts.append(0)
        elif line.get("event") == "block finished":
            counts[-1] += 1
    return counts


def one_case(place: Place, recipe: str, whole: Path, duration: float, shares: list[float]) -> dict[str, Any]:
    """Kill a run at these shares of its duration, let it finish, and compare."""
    out = place.folder / "out"
    kills = []
    for share in shares:
        code, _, said = place.prune(recipe, "out", share * duration)
        if code == 0:
            break  # faster this time: it had ended before it could be killed
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{recipe}: ended with {code} by itself: {said}")
        kills.append({"share": round(share, 4), "in": where(out)})
    code, seconds, said = place.prune(recipe, "out")
    counts, needed = (blocks_in(folder) if code == 0 else [] for folder in (out, whole))
    walked_before = bool(counts[:-1]) and max(counts[:-1]) > 0
    entry = {
        "recipe": recipe,
        "kills": kills,
        "exit": code,
        "said": said.strip().splitlines()[-1] if code else "",
        "seconds": round(seconds, 2),
        "of": round(duration, 2),
        "different": different(whole, out) if code == 0 else ["no result"],
        "left": [path.name for path in place.folder.glob("*out*") if path.name not in ("out", "cache out")],
        "blocks": counts,
        "from_zero": walked_before and counts[-1] >= sum(needed),
    }
    for path in place.folder.glob("*out*"):
        shutil.rmtree(path)
    return entry


def table(results: Results) -> str:
    entries = list(results.content["entries"].values())
    machine = results.content["machine"]
    kills = [kill for entry in entries for kill in entry["kills"]]
    wrong = sum(bool(entry["different"] or entry["left"]) for entry in entries)
    walked = [entry for entry in entries if any(entry["blocks"][:-1])]
    lines = [
        f"`{results.content['command']}`: {machine['processor']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"one thread; {BLOCKS} blocks, {WINDOWS} windows of {LENGTH} tokens.",
        "",
        f"{len(kills)} kills in {len(entries)} runs; {wrong} results that differ or leave anything behind. Of {len(walked)} runs killed after a "
        f"block had been finished, {sum(entry['from_zero'] for entry in walked)} began with the first block again.",
        "",
        "| recipe | undisturbed | runs | kills | results that differ | last attempt, mean | began again |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        mine = [entry for entry in entries if entry["recipe"] == recipe]
        if mine:
            mean = sum(entry["seconds"] for entry in mine) / len(mine)
            lines.append(
                f"| {recipe} | {mine[0]['of']:.1f} s | {len(mine)} | {sum(len(entry['kills']) for entry in mine)} | "
                f"{sum(bool(entry['different']) for entry in mine)} | {mean:.1f} s | {sum(entry['from_zero'] for entry in mine)} |"
            )
    stages = Counter(kill["in"] for kill in kills)
    lines += ["", "Killed in: " + ", ".join(f"{stage} ({count})" for stage, count in stages.most_common()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    console.quiet_libraries()
    results = Results("kills", f"python benchmarks/kills.py --kills {chosen.kills} --seed {chosen.seed}")
    chance = random.Random(chosen.seed)
    undisturbed: dict[str, tuple[Path, float]] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        place = Place(Path(folder))
        done = number = 0
        while done < chosen.kills:
            recipe = list(RECIPES)[number % len(RECIPES)]
            shares = [chance.uniform(0, 1) for _ in range(chance.randint(1, AT_MOST))]
            key = f"{chosen.seed}/{number}"
            entry = results.get(key)
            if entry is None:
                if recipe not in undisturbed:
                    undisturbed[recipe] = straight(place, recipe)
                entry = one_case(place, recipe, *undisturbed[recipe], shares)
                results.put(key, entry)
                print(key, recipe, entry["kills"], entry["different"] or "the same", flush=True)
            done += len(entry["kills"])
            number += 1
    (RESULTS / "kills.md").write_text(table(results))
    print(table(results))
    if any(entry["different"] or entry["left"] or entry["from_zero"] for entry in results.content["entries"].values()):
        sys.exit("some results differ")


if __name__ == "__main__":
    main()
