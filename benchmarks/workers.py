"""Two workers on two cores beside one worker on one core: wall time, and whether they choose the same.

    python benchmarks/workers.py [--reference DIR] [--windows 16] [--repetitions 1] [--methods taylor wanda gblm]

`secateur prune smollm2` as a user would start it, by itself and by torchrun with two processes, one thread each, both pinned: one process to one
core, two to two. Every run has a cache of its own that holds the converted model and nothing else. One and two are run in turns. Time is that of
the whole command, and of its stage "choosing" (what workers share; reading, writing and checking are in the rest). Then the two plans are
compared: units that leave, and bits of the masks. Results are kept as they come; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import DEFAULT_REFERENCE, RESULTS, SOURCES, Results
from safetensors.torch import load_file

from secateur.checkpoint.source import resolve_model

METHODS = {
    "taylor": ("taylor, channels 25 %", ["--criterion", "taylor", "--unit", "channel", "--ratio", "0.25"]),
    "wanda": ("wanda, weights 50 %", ["--criterion", "wanda", "--unit", "weight", "--ratio", "0.5"]),
    "gblm": ("gblm, weights 50 %", ["--criterion", "gblm", "--unit", "weight", "--ratio", "0.5"]),
}
COUNTS = (1, 2)


def prune(words: list[str], workers: int, out: Path, work: Path) -> dict[str, Any]:
    """Run the command once with its own cache; its seconds and those of its stages."""
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    cache.mkdir(parents=True)
    (cache / "models").symlink_to(resolve_model("smollm2").folder.parent)
    start = [sys.executable, "-m"]
    if workers > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m"]
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SECATEUR_CACHE": str(cache)}
    settings["PYTHONPATH"] = os.pathsep.join(SOURCES)
    cores = sorted(os.sched_getaffinity(0))[:workers]
    load, began = os.getloadavg()[0], time.monotonic()
    finished = subprocess.run(
        [*start, "secateur", "prune", "smollm2", "--out", str(out), *words],
        env=os.environ | settings,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    if finished.returncode != 0:
        raise RuntimeError(finished.stderr[-3000:])
    record = json.loads((out / "secateur" / "run.json").read_text())
    if record["settings"]["workers"] != workers:
        raise RuntimeError(f"{record['settings']['workers']} workers ran instead of {workers}")
    return {"workers": workers, "seconds": seconds, "stages": record["stages"], "cores": cores, "load_before": load}


def difference(one: Path, two: Path) -> dict[str, Any]:
    """Where two plans differ: units that only one of them takes, and bits of masks."""
    plans = [json.loads((out / "secateur" / "plan.json").read_text()) for out in (one, two)]
    cuts = [
        {
            (entry["block"], cut["kind"], cut["module"], unit)
            for entry in plan["blocks"]
            for cut in entry.get("cuts", [])
            for unit in cut["removed"]
        }
        for plan in plans
    ]
    files = [out / "secateur" / "masks.safetensors" for out in (one, two)]
    found: dict[str, Any] = {
        "blocks_equal": plans[0]["blocks"] == plans[1]["blocks"],
        "units": len(cuts[0]),
        "units_different": len(cuts[0] ^ cuts[1]) // 2,
        "weights_equal": _weights(one) == _weights(two),
    }
    if all(file.is_file() for file in files):
        masks = [load_file(file) for file in files]
        found["masks_bytes_equal"] = files[0].read_bytes() == files[1].read_bytes()
        found["places"] = 8 * sum(bits.numel() for bits in masks[0].values())
        found["places_different"] = sum(_bits_apart(masks[0][name], masks[1][name]) for name in masks[0])
        found["names_equal"] = set(masks[0]) == set(masks[1])
    return found


def _weights(out: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(out.glob("*.safetensors"))]


def _bits_apart(left: Any, right: Any) -> int:
    """How many bits of two packed masks differ."""
    apart = left.bitwise_xor(right)
    return sum(int((apart >> place & 1).sum()) for place in range(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--more", nargs="*", default=[], help="more words for secateur prune, without their dashes")
    parser.add_argument("--name", default="workers", help="of the files with the results")
    arguments = parser.parse_args()
    results = Results(
        arguments.name,
        f"python benchmarks/workers.py --windows {arguments.windows} --repetitions {arguments.repetitions}",
    )
    text = (arguments.reference / "calibration-tokens.safetensors").resolve()
    given = ["--calibration", str(text), "--windows", str(arguments.windows)]
    given += [f"--{word}" if place % 2 == 0 else word for place, word in enumerate(arguments.more)]
    resolve_model("smollm2")  # converted before any clock runs
    with tempfile.TemporaryDirectory(prefix="workers-") as folder:
        work = Path(folder)
        for repetition in range(arguments.repetitions):
            for method in arguments.methods:
                outs = {count: work / f"{method}-{count}" for count in COUNTS}
                key = f"{method} {repetition}"
                if results.get(key) is None:
                    runs = {}
                    for count in COUNTS if repetition % 2 == 0 else COUNTS[::-1]:
                        print(f"{key}, {count} worker{'s' * (count > 1)} ...", flush=True)
                        runs[str(count)] = prune([*METHODS[method][1], *given], count, outs[count], work)
                    results.put(key, {"method": method, "runs": runs, "difference": difference(*outs.values())})
                for out in outs.values():
                    shutil.rmtree(out, ignore_errors=True)
                (RESULTS / f"{arguments.name}.md").write_text(table(results))
    print(table(results))


def table(results: Results) -> str:
    """The results as Markdown."""
    lines = [
        results.caption("; one thread a worker, one core a worker; medians of the repetitions"),
        "",
        "| | repetitions | whole command: one, two | ratio | choosing: one, two | ratio | plans | load before |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, (name, _) in METHODS.items():
        entries = [entry for entry in results.content["entries"].values() if entry["method"] == method]
        if not entries:
            lines.append(f"| {name} | not run | | | | | | |")
            continue
        whole = [statistics.median(entry["runs"][str(count)]["seconds"] for entry in entries) for count in COUNTS]
        choosing = [
            statistics.median(entry["runs"][str(count)]["stages"]["choosing"] for entry in entries) for count in COUNTS
        ]
        loads = [run["load_before"] for entry in entries for run in entry["runs"].values()]
        cells = [
            name,
            str(len(entries)),
            f"{whole[0]:.1f} s, {whole[1]:.1f} s",
            f"{whole[0] / whole[1]:.2f}",
            f"{choosing[0]:.1f} s, {choosing[1]:.1f} s",
            f"{choosing[0] / choosing[1]:.2f}",
            _in_words(entries[-1]["difference"]),
            f"{min(loads):.1f} to {max(loads):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _in_words(found: dict[str, Any]) -> str:
    if found["blocks_equal"] and found.get("masks_bytes_equal", True):
        return "the same" + (", and the weights byte for byte" if found["weights_equal"] else ", but not the weights")
    parts = []
    if found["units"]:
        parts.append(f"{found['units_different']} of {found['units']} units differ")
    if "places" in found:
        share = 100 * found["places_different"] / found["places"]
        parts.append(f"{found['places_different']:,} of {found['places']:,} places differ ({share:.4f} %)")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
