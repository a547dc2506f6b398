"""What a sweep takes beside one plain pass with the whole model in memory: SmolLM2-135M, one thread, interleaved.

    python benchmarks/sweep_time.py [--reference DIR] [--windows 32] [--repetitions 2]

Wanda's sweep (weights 50 %, pruned propagation: gather, score, mask, and run again, without writing a model) is held against one plain forward
without the head; the exact-gradient sweep (mean gradient of every matrix, head included) against one plain forward and backward with the
head. Every measurement is a process of its own; all are run in turns, each repetition in the opposite order
of the one before, and the figure is the median of the ratios within the repetitions. Reading and hashing the weights at the beginning of a run are not counted (they are in
one_shot.py). Streamed ways run with nothing allowed to keep, and with 2 GiB. Results are kept as they come; a second call goes on with what is
missing.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from common import DEFAULT_REFERENCE, RESULTS, Results, fresh
from gradients import LOAD, PLAIN, STREAMED

from secateur.checkpoint.source import resolve_model

FORWARD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32).eval()
started = time.perf_counter()
with torch.no_grad():
    for batch in ids.split({micro_batch}):
        model.base_model(input_ids=batch, use_cache=False)
result = dict(seconds=time.perf_counter() - started)
"""

PLANNED = """
from secateur.checkpoint.reader import open_checkpoint
from secateur.gathering import Workplace
from secateur.planning import Planner
from secateur.recipe import recipe_from
checkpoint = open_checkpoint({folder!r})
checkpoint.content_hash
recipe = recipe_from(model={folder!r}, calibration={windows!r}, windows={count}, micro_batch={micro_batch}, **{fields!r})
planner = Planner(checkpoint, recipe, Workplace(Path("scratch"), None, memory={memory}))
planner.windows
started = time.perf_counter()
planner.plan()
result = dict(seconds=time.perf_counter() - started)
"""

WANDA = {"criterion": "wanda", "unit": "weight", "ratio": 0.5}
FORTH, BACK = "plain forward, no head", "plain forward and backward, head"
SPARE = 2 << 30

WAYS: dict[str, tuple[str, dict, str, float | None]] = {
    # code, options, what it is held against, the limit of the ratio
    FORTH: (FORWARD, {}, FORTH, None),
    BACK: (PLAIN, {"save": ""}, BACK, None),
    "wanda 50 %, nothing kept": (PLANNED, {"fields": WANDA, "memory": 0}, FORTH, 2.3),
    "wanda 50 %, 2 GiB": (PLANNED, {"fields": WANDA, "memory": SPARE}, FORTH, 2.3),
    "exact gradients, nothing kept": (STREAMED, {"save": "", "memory": 0}, BACK, 1.4),
    "exact gradients, 2 GiB": (STREAMED, {"save": "", "memory": SPARE}, BACK, 1.4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--name", default="sweep_time", help="of the files with the results")
    arguments = parser.parse_args()
    sizes = f"--windows {arguments.windows} --micro-batch {arguments.micro_batch}"
    results = Results(arguments.name, f"python benchmarks/sweep_time.py {sizes} --repetitions {arguments.repetitions}")
    shared = {
        "folder": str(resolve_model("smollm2").folder),
        "windows": str((arguments.reference / "calibration-tokens.safetensors").resolve()),
        "count": arguments.windows,
        "micro_batch": arguments.micro_batch,
    }
    for repetition in range(arguments.repetitions):
        for way in list(WAYS) if repetition % 2 == 0 else list(WAYS)[::-1]:
            if results.get(f"{repetition}: {way}") is None:
                code, options, _, _ = WAYS[way]
                load = os.getloadavg()[0]
                entry = fresh((LOAD + code).format(**shared, **options), threads=1)
                results.put(f"{repetition}: {way}", entry | {"load_before": load})
                print(f"{repetition}: {way:36} {entry['seconds']:7.1f} s", flush=True)
    (RESULTS / f"{arguments.name}.md").write_text(table(results))
    print(table(results))


def table(results: Results) -> str:
    """The results as Markdown."""
    entries = results.content["entries"]
    repetitions = sorted({int(key.partition(":")[0]) for key in entries})
    loads = [entry["load_before"] for entry in entries.values()]
    lines = [
        results.caption(f"; one thread, load before each between {min(loads):.1f} and {max(loads):.1f}"),
        "",
        "| | seconds, median | ratios | median ratio | held against | limit | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, (_, _, against, limit) in WAYS.items():
        pairs = [(entries.get(f"{number}: {way}"), entries.get(f"{number}: {against}")) for number in repetitions]
        whole = [(mine, other) for mine, other in pairs if mine and other]
        if not whole:
            lines.append(f"| {way} | not run | | | | | |")
            continue
        ratios = [mine["seconds"] / other["seconds"] for mine, other in whole]
        median = statistics.median(ratios)
        cells = [
            way,
            f"{statistics.median(mine['seconds'] for mine, _ in whole):.1f}",
            "" if way == against else ", ".join(f"{ratio:.2f}" for ratio in ratios),
            "" if way == against else f"{median:.2f}",
            "" if way == against else against,
            "" if limit is None else f"{limit:g}, {'held' if median <= limit else 'not held'}",
            f"{max(mine['peak_mib'] for mine, _ in whole):.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
