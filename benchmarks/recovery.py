"""What recovery gives back of a pruned SmolLM2-135M, by method and by the text it is tuned on.

    python benchmarks/recovery.py [--reference DIR] [--data DIR] [--only NAME ...] [--no-tasks]

A fifth of the blocks' parameters leave (heads and channels, Taylor), then each recovery tunes 48 steps of 16 windows of 128 tokens.
Measured are perplexity on WikiText-2 (the reference windows) and PTB, and the mean of seven tasks of lm-eval, the first 200
questions of each. Then LoRAPrune at 50 % beside pruning first and tuning by LoRA for as many steps, and masks at 50 % and 2:4 whose
zeros have to be the same after tuning. What has been measured is kept; rows that are missing are marked.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from common import DEFAULT_REFERENCE, RESULTS, ROOT, Results, fresh

DEFAULT_DATA = ROOT.parent / "shared" / "data"
WORK = ROOT / "benchmarks" / "work" / "recovery"
TASKS = "boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"
QUESTIONS = 200
STEPS, BATCH, LENGTH, WINDOWS = 48, 16, 128, 256
RATES = {"lora": 1e-3, "lora-prune": 1e-3, "distill": 1e-3, "full": 1e-4}
"""Peak learning rates of so short a run; of other methods their own."""

PRUNED: dict[str, dict[str, Any]] = {
    "cut": dict(criterion="taylor", unit="head,channel", target="params=-15.8%"),
    "halved": dict(criterion="taylor", unit="head,channel", ratio=0.5),
    "masked 50 %": dict(criterion="wanda", unit="weight", ratio=0.5),
    "masked 2:4": dict(criterion="wanda", unit="2:4"),
}
"""What is tuned; a fifth of the 106 million parameters of the blocks is 15.8 % of all."""

CUT_ROWS = [
    ("lora", "wikitext"),
    ("lora", "alpaca"),
    ("lora", "self"),
    ("distill", "self"),
    ("full", "wikitext"),
    ("distill", "wikitext"),
    ("full", "alpaca"),
    ("full", "self"),
    ("distill", "alpaca"),
]
MASK_ROWS = [(pruned, method) for pruned in ("masked 50 %", "masked 2:4") for method in ("spp", "full", "lora")]

PRUNE = """
import secateur
secateur.prune("smollm2", {out!r}, calibration={calibration!r}, overwrite=True, **{recipe!r})
"""

RECOVER = """
import secateur
found = secateur.recover({pruned!r}, {out!r}, data={data!r}, windows={windows}, window_length={length}, overwrite=True, **{settings!r})
record = found.record
training = {{name: value for name, value in record["training"].items() if name != "removed"}}
result = dict(training=training | dict(losses=training["losses"][::8]), stages=record["stages"], after=record["after"])
"""

MEASURE = """
from secateur import console; console.quiet_libraries()
from pathlib import Path
from secateur.measuring import evaluate_models, evaluate_models_on_tasks
result = dict()
for name, text, limit in {texts!r}:
    found = evaluate_models([{folder!r}], text, None, limit, alone=True, speed=False, prompts=())
    result[name] = next(iter(found.models.values())).perplexity.value
if {tasks!r}:
    found = evaluate_models_on_tasks([{folder!r}], {tasks!r}, Path({questions!r}), {limit}, batch_size=8, alone=True)
    scores = next(iter(found.models.values()))
    result["means"] = {{name: [mean.value, mean.standard_error] for name, mean in scores.means.items()}}
    result["scores"] = {{task: {{name: [s.value, s.standard_error] for name, s in own.items()}} for task, own in scores.scores.items()}}
"""

SAME_ZEROS = """
from secateur.checkpoint.reader import open_checkpoint
before, after = open_checkpoint({pruned!r}), open_checkpoint({out!r})
different = checked = 0
for index in range(len(before.skeleton.blocks)):
    prefix = before.skeleton.block_prefix(index)
    names = [prefix + matrix.parameter for matrix in before.skeleton.prunable(index).values()]
    old, new = before.read(names), after.read(names)
    for name in names:
        different += int(((old[name] == 0) != (new[name] == 0)).sum())
        checked += old[name].numel()
result = dict(different=different, checked=checked)
"""


class Bench:
    """Runs what is missing, and writes the table after each entry."""

    def __init__(self, reference: Path, data: Path, only: list[str] | None, with_tasks: bool) -> None:
        self.results = Results("recovery", "python benchmarks/recovery.py")
        self.only, self.with_tasks, self.questions = only, with_tasks, data / "tasks"
        self.calibration = str((reference / "calibration-tokens.safetensors").resolve())
        evaluation = str((reference / "evaluation-tokens.safetensors").resolve())
        self.texts = [("wikitext", evaluation, None), ("ptb", str(data / "text/ptb-valid.txt"), 32)]
        self.data = {
            "wikitext": str(data / "text/wikitext2-train-part.txt"),
            "alpaca": str(data / "instruct/alpaca-2000.json"),
            "self": "self",
        }

    def wanted(self, key: str) -> bool:
        return self.results.get(key) is None and (not self.only or any(word in key for word in self.only))

    def put(self, key: str, entry: dict[str, Any]) -> None:
        self.results.put(key, entry)
        (RESULTS / "recovery.md").write_text(table(self.results))
        print(
            f"{time.strftime('%H:%M')} {key}: {entry.get('wikitext')} {entry.get('ptb')} {entry.get('means')}",
            flush=True,
        )

    def measure(self, folder: str, tasks: bool) -> dict[str, Any]:
        found = fresh(
            MEASURE.format(
                folder=folder, texts=self.texts, tasks=TASKS if tasks and self.with_tasks else "",
                questions=str(self.questions), limit=QUESTIONS,
            )
        )  # fmt: skip
        return {name: found[name] for name in ("wikitext", "ptb", "means", "scores") if name in found}

    def pruned(self, name: str) -> str:
        """The folder of a pruned model, made where it is not there."""
        out = WORK / name.replace(" ", "").replace("%", "").replace(":", "-")
        if not (out / "secateur" / "run.json").is_file():
            fresh(PRUNE.format(out=str(out), calibration=self.calibration, recipe=PRUNED[name]))
        return str(out)

    def recover(self, key: str, pruned: str, method: str, data: str, tasks: bool, **more: Any) -> None:
        if not self.wanted(key):
            return
        out = WORK / "recovered"
        shutil.rmtree(out, ignore_errors=True)
        settings = dict(method=method, batch_size=BATCH, micro_batch=8, held_out=16, steps=STEPS) | more
        rate = RATES.get(method.split(":")[0])
        settings |= {} if rate is None else {"learning_rate": rate}
        found = fresh(
            RECOVER.format(
                pruned=pruned,
                out=str(out),
                data=self.data[data],
                windows=WINDOWS + 16,
                length=LENGTH,
                settings=settings,
            )
        )
        entry = {"training": found["training"], "stages": found["stages"], "parameters": found["after"]["parameters"]}
        if pruned.startswith(str(WORK)) and "masked" in pruned:
            entry["zeros"] = fresh(SAME_ZEROS.format(pruned=pruned, out=str(out)))
        self.put(key, entry | self.measure(str(out), tasks))
        shutil.rmtree(out, ignore_errors=True)

    def run(self) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        if self.wanted("dense"):
            self.put("dense", self.measure("smollm2", tasks=True))
        if self.wanted("cut"):
            self.put("cut", self.measure(self.pruned("cut"), tasks=True))
        for method, data in CUT_ROWS[:4]:
            self.recover(f"cut, {method}, {data}", self.pruned("cut"), method, data, tasks=True)
        self.recover("halved by lora-prune", "smollm2", "lora-prune:ratio=0.5", "wikitext", tasks=False)
        if self.wanted("halved"):
            self.put("halved", self.measure(self.pruned("halved"), tasks=False))
        self.recover("halved, lora", self.pruned("halved"), "lora", "wikitext", tasks=False)
        for pruned, method in MASK_ROWS:
            if self.wanted(pruned):
                self.put(pruned, self.measure(self.pruned(pruned), tasks=False))
            self.recover(f"{pruned}, {method}", self.pruned(pruned), method, "wikitext", tasks=False, steps=STEPS // 2)
        for method, data in CUT_ROWS[4:]:
            self.recover(f"cut, {method}, {data}", self.pruned("cut"), method, data, tasks=True)


def table(results: Results) -> str:
    caption = (
        f". Perplexity on 40 × 512 tokens of WikiText-2 test and 32 × 512 of PTB valid; mean of {TASKS.replace(',', ', ')}, "
        f"first {QUESTIONS} questions, accuracy by normalised length where the task has it. Tuned for {STEPS} steps of {BATCH} × {LENGTH} tokens"
    )
    lines = [results.caption(caption), "", "| | WikiText-2 | PTB | tasks | of dense | tuning |", "|---" * 6 + "|"]
    lines.append(_row(results, "dense", "dense"))
    lines.append(_row(results, "a fifth of the blocks' parameters cut", "cut"))
    lines += [_row(results, f"then {method} on {data}", f"cut, {method}, {data}") for method, data in CUT_ROWS]
    lines.append(_row(results, "heads and channels halved", "halved"))
    lines.append(_row(results, "then lora on wikitext", "halved, lora"))
    lines.append(_row(results, "halved by lora-prune on wikitext", "halved by lora-prune"))
    lines += [
        "",
        f"| masks, {STEPS // 2} steps on wikitext | WikiText-2 | PTB | places where zeros differ | tuning |",
        "|---" * 5 + "|",
    ]
    for pruned in dict.fromkeys(pruned for pruned, _ in MASK_ROWS):
        lines.append(_mask_row(results, pruned, pruned))
        lines += [_mask_row(results, f"then {m}", f"{p}, {m}") for p, m in MASK_ROWS if p == pruned]
    return "\n".join([*lines, ""])


def _row(results: Results, name: str, key: str) -> str:
    entry, dense = results.get(key), results.get("dense")
    if entry is None:
        return f"| {name} | not run yet | | | | |"
    cells = [f"{entry['wikitext']:,.2f}", f"{entry['ptb']:,.2f}", "", ""]
    if "means" in entry:
        value, error = entry["means"]["acc_norm"]
        cells[2] = f"{100 * value:.1f} ± {100 * error:.1f}"
        if dense is not None and "means" in dense:
            cells[3] = f"{100 * value / dense['means']['acc_norm'][0]:.1f} %"
    return f"| {name} | {' | '.join([*cells, _tuning(entry)])} |"


def _mask_row(results: Results, name: str, key: str) -> str:
    entry = results.get(key)
    if entry is None:
        return f"| {name} | not run yet | | | |"
    zeros = f"{entry['zeros']['different']} of {entry['zeros']['checked']:,}" if "zeros" in entry else ""
    return f"| {name} | {entry['wikitext']:,.2f} | {entry['ptb']:,.2f} | {zeros} | {_tuning(entry)} |"


def _tuning(entry: dict[str, Any]) -> str:
    return f"{entry['stages']['training'] / 60:.1f} min" if "stages" in entry else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=DEFAULT_REFERENCE)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--only", nargs="*", help="only entries whose name has one of these words")
    parser.add_argument("--no-tasks", action="store_true", help="perplexity alone")
    arguments = parser.parse_args()
    Bench(arguments.reference, arguments.data.resolve(), arguments.only, not arguments.no_tasks).run()


if __name__ == "__main__":
    main()
