"""A model of Llama-2-7B's shape on a small machine: peak memory, where the time goes, how much of it is arithmetic, how much waiting.

    python benchmarks/large.py --model DIR [--methods taylor gblm wanda] [--windows 4] [--tokens 128] [--memory 4GiB]

DIR is made by large_model.py where it is not there (13.5 GB). Each method runs `secateur.plan` in a process of its own, with all threads
of the machine, a cache of its own beside DIR that is removed afterwards (gblm keeps gradients there, 13 GB), and the model's files
dropped from the page cache before.

Memory is read from outside (/proc/PID/status every 50 ms); mapped pages of files count. Where time goes is said by a clock in the
process on the functions that do the work. Arithmetic: the products with weights that were really computed, counted as they ran, divided
by the rate at which this process multiplies matrices of the same shapes in float32, measured before and after the run. Waiting for the disk: the
share of looks from outside at which the first thread, or any while none ran, was in state D; upper bounds beside it are what every second
lacks of one thread's worth of processor time, and all wall time less the processor time of a thread. Results are kept as they come; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Results, fresh
from large_model import LAYERS, make_large_model
from safetensors.torch import save_file
from watching import Clock, Watch

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "taylor": ("taylor, channels 20 % (exact gradients)", {"criterion": "taylor", "unit": "channel", "ratio": 0.2}),
    "gblm": ("gblm, weights 50 %", {"criterion": "gblm", "unit": "weight", "ratio": 0.5}),
    "wanda": ("wanda, weights 50 %", {"criterion": "wanda", "unit": "weight", "ratio": 0.5}),
}
PRODUCTS = ("forward", "again", "inputs", "weights")
WAITING_LIMIT = 0.15


# -- in the process that is measured


class Recorder(logging.Handler):
    """Keeps every event of the run with its time."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "event"):
            self.events.append({"time": time.monotonic(), "event": record.event, **getattr(record, "fields", {})})


def plan_once(fields: dict[str, Any], model: str, windows: str, memory: str) -> dict[str, Any]:
    """Plan under clock and log; everything that the parent cannot see from outside."""
    import secateur
    from secateur import console
    from secateur.checkpoint.reader import open_checkpoint

    console.quiet_libraries()
    shapes = matrices_of(model)
    rows = window_length(windows)
    rates = [rates_of(shapes, rows)]
    recorder, clock = Recorder(), Clock()
    for name in ("secateur", "secateur.events"):
        logging.getLogger(name).addHandler(recorder)
        logging.getLogger(name).setLevel(logging.INFO)
    counted = under_clock(clock)
    before = status()
    began, cpu = time.monotonic(), time.process_time()
    clock.start()
    plan = secateur.plan(model, calibration=windows, memory=memory, **fields)
    seconds = clock.finish()
    ended, cpu = time.monotonic(), time.process_time() - cpu
    after = status()
    rates.append(rates_of(shapes, rows))
    checkpoint = open_checkpoint(model)
    block = checkpoint.skeleton.block_shapes(0)
    matrices = [matrix.shape(block) for matrix in checkpoint.skeleton.prunable(0).values()]
    vocabulary, hidden = checkpoint.config.vocab_size, checkpoint.config.hidden_size
    return {
        "began": began,
        "ended": ended,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "before": before,
        "peak": after["VmHWM"],
        "parts": seconds,
        "history": clock.history,
        "events": recorder.events,
        "rates": rates,
        "products": counted,
        "block_products": sum(map(math.prod, matrices)),
        "head_products": vocabulary * hidden,
        "sizes": {
            "one block's weights": 4 * sum(map(math.prod, block.values())),
            "one block's matrices": 4 * sum(map(math.prod, matrices)),
            "largest matrix": 4 * max(map(math.prod, matrices)),
        },
        "removed": {
            "units": sum(len(cut.removed) for entry in plan.blocks for cut in entry.cuts),
            "weights": sum(mask.zeros for entry in plan.blocks for mask in entry.masks.values()),
        },
    }


def status() -> dict[str, int]:
    """This process's memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0].startswith(("VmRSS", "VmHWM", "Rss"))}


def window_length(windows: str) -> int:
    from safetensors import safe_open

    with safe_open(windows, framework="pt") as file:
        return file.get_slice("input_ids").get_shape()[1]


def matrices_of(model: str) -> list[tuple[int, int]]:
    """The shapes of one block's matrices; of a Llama, as large_model.py makes it."""
    config = json.loads(Path(model, "config.json").read_text())
    hidden, width = config["hidden_size"], config["intermediate_size"]
    return [(hidden, hidden)] * 4 + [(width, hidden)] * 2 + [(hidden, width)]


@torch.no_grad()
def rates_of(shapes: list[tuple[int, int]], rows: int) -> dict[str, float]:
    """Multiply-adds a second in float32 over one block's matrices with one window's tokens, by kind of product; median of three."""
    seconds: dict[str, list[float]] = {"forward": [], "inputs": [], "weights": []}
    for _ in range(3):
        taken = dict.fromkeys(seconds, 0.0)
        for outputs, inputs in dict.fromkeys(shapes):
            x, gradient = torch.randn(rows, inputs), torch.randn(rows, outputs)
            weight = torch.randn(1, inputs).expand(outputs, inputs).contiguous()  # numbers do not matter, time does
            works = {
                "forward": lambda x=x, weight=weight: x @ weight.T,
                "inputs": lambda gradient=gradient, weight=weight: gradient @ weight,
                "weights": lambda gradient=gradient, x=x: gradient.T @ x,
            }
            for kind, work in works.items():
                began = time.perf_counter()
                work()
                taken[kind] += (time.perf_counter() - began) * shapes.count((outputs, inputs))
        for kind, found in taken.items():
            seconds[kind].append(found)
    products = rows * sum(map(math.prod, shapes))
    return {kind: products / statistics.median(found) for kind, found in seconds.items()}


def under_clock(clock: Clock) -> dict[str, int]:
    """Put the functions that do the work under the clock; returns how many tokens went through products, counted as they run."""
    from secateur import gathering, planning, run, stepping
    from secateur.blockstore import BlockStore
    from secateur.checkpoint.reader import Checkpoint
    from secateur.planning import Planner
    from secateur.scoring import BlockScorer
    from secateur.sweep import backward, walk
    from secateur.sweep.boundary import BoundaryStore
    from secateur.sweep.entrance import BlockCalls
    from secateur.sweep.taps import GradientTaps

    counted = dict.fromkeys((*PRODUCTS, "head"), 0)
    preflight = "estimating before the run"

    hashing = cached_property(clock.timed(Checkpoint.__dict__["content_hash"].func, "reading and hashing the weights"))
    hashing.__set_name__(Checkpoint, "content_hash")
    Checkpoint.content_hash = hashing  # type: ignore[assignment]
    clock.watch(run, "open_checkpoint", "opening the model")
    clock.watch(planning, "find_all_units", "tracing the structure")
    clock.watch(stepping, "prepare", preflight)
    clock.watch(walk, "enter", "embeddings")
    clock.watch(Planner, "_decide", "scoring and choosing")
    clock.watch(BlockScorer, "everything", "scoring and choosing")
    clock.watch(Planner, "_choose_from_scores", "scoring and choosing")
    clock.watch(gathering, "halved", "gradients to disk and back")
    clock.watch(planning, "whole", "gradients to disk and back")
    clock.watch(BlockStore, "put", "gradients to disk and back")
    clock.watch(BlockStore, "get", "gradients to disk and back")
    clock.watch(BoundaryStore, "put", "hidden states to disk and back")
    clock.watch(BoundaryStore, "commit", "hidden states to disk and back")
    clock.watch(GradientTaps, "fold", "weight gradients and their statistics")

    def run_kind(calls: Any, block: Any, index: int, batch: int, x_BTD: torch.Tensor) -> str:
        again = torch.is_grad_enabled()
        if not clock.inside(preflight):
            counted["again" if again else "forward"] += x_BTD.shape[0] * x_BTD.shape[1]
        return "blocks forward, with gradients on" if again else "blocks forward"

    def back_kind(tensor: torch.Tensor, *rest: Any, **more: Any) -> str:
        if not clock.inside(preflight):
            for kind in ("inputs", "weights"):
                counted[kind] += tensor.shape[0] * tensor.shape[1]
        return "blocks backward"

    def head_kind(logits: Any, ids_T: torch.Tensor, *rest: Any) -> str:
        counted["head"] += 2 * len(ids_T)  # there and back
        return "head and loss"

    clock.watch(BlockCalls, "run", run_kind)
    clock.watch(torch.Tensor, "backward", back_kind)
    clock.watch(backward, "window_gradient", head_kind)

    plain = walk.resident_block

    class Timed:
        """Bringing a block in, and letting it go."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._within = plain(*args, **kwargs)

        def __enter__(self) -> Any:
            return clock.timed(self._within.__enter__, "bringing blocks in")()

        def __exit__(self, *error: Any) -> Any:
            return clock.timed(self._within.__exit__, "letting blocks go")(*error)

    walk.resident_block = Timed  # type: ignore[assignment]
    return counted


# -- outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("benchmarks/work/large"))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model, where it is made")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="all that the machine has, by default")
    parser.add_argument("--name", default="large", help="of the files with the results")
    arguments = parser.parse_args()
    model = make_large_model(arguments.model.resolve(), arguments.layers)
    work = model.parent / f"{model.name}-work"
    work.mkdir(exist_ok=True)
    windows = work / f"windows-{arguments.windows}-{arguments.tokens}.safetensors"
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(vocabulary, (arguments.windows, arguments.tokens), generator=generator)
    save_file({"input_ids": ids_NT}, windows)
    sizes = f"--windows {arguments.windows} --tokens {arguments.tokens} --memory {arguments.memory}"
    results = Results(arguments.name, f"python benchmarks/large.py {sizes}")
    for method in arguments.methods:
        if results.get(method) is None:
            print(f"{method} ...", flush=True)
            drop_from_cache(model)
            setting = {"model": str(model), "windows": str(windows), "memory": arguments.memory}
            results.put(method, measured(METHODS[method][1], setting, arguments.threads, work / "cache"))
            shutil.rmtree(work / "cache", ignore_errors=True)
        (RESULTS / f"{arguments.name}.md").write_text(table(results))
    print(table(results))


def drop_from_cache(folder: Path) -> None:
    """Have the system forget the pages of these files, so that a run reads them from the disk."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measured(fields: dict[str, Any], setting: dict[str, str], threads: int, cache: Path) -> dict[str, Any]:
    """One method in a process of its own, watched."""
    watch, load = Watch(), os.getloadavg()[0]
    code = f"from large import plan_once\nresult = plan_once({fields!r}, **{setting!r})"
    found = fresh(code, threads=threads, watch=watch, SECATEUR_CACHE=str(cache))
    began, ended = found["began"], found["ended"]
    wall = ended - began
    looks = watch.between(began, ended)
    highest = max(looks, key=lambda look: look["VmRSS"])
    kinds = {"forward": "forward", "again": "forward", "inputs": "inputs", "weights": "weights", "head": "forward"}
    products = {
        kind: tokens * found["head_products" if kind == "head" else "block_products"]
        for kind, tokens in found["products"].items()
    }
    rates = {kind: sum(rate[kind] for rate in found["rates"]) / len(found["rates"]) for kind in found["rates"][0]}
    arithmetic = {kind: count / rates[kinds[kind]] for kind, count in products.items()}
    idle = wall - found["cpu"] / found["threads"]
    quiet = sum(
        max(0.0, after["time"] - before["time"] - (after["cpu_ticks"] - before["cpu_ticks"]) / os.sysconf("SC_CLK_TCK"))
        for before, after in zip(looks[::20], looks[20::20], strict=False)
    )
    return {
        "load_before": load,
        "seconds": wall,
        "threads": found["threads"],
        "memory": {
            "VmHWM": max(found["peak"], *(look["VmHWM"] for look in looks)),
            "before": found["before"],
            "highest": {name: highest[name] for name in ("VmRSS", "RssAnon", "RssFile", "children")},
            "highest_in": phase_at(found["events"], highest["time"]),
            "highest_while": next((n for t, n in reversed(found["history"]) if t <= highest["time"]), "rest"),
            "highest_at": highest["time"] - began,
            "of": found["sizes"],
        },
        "stages": stages(found["events"], watch),
        "parts": dict(sorted(found["parts"].items(), key=lambda item: -item[1])),
        "arithmetic": {
            "products": products,
            "rates": found["rates"],
            "seconds": arithmetic,
            "share": sum(arithmetic.values()) / wall,
        },
        "disk": {
            "waited": watch.waited(began, ended),
            "share": watch.waited(began, ended) / wall,
            "any": watch.waited(began, ended, "any_waits"),
            "quiet": quiet,
            "idle": idle,
            "queued": (looks[-1]["queued"] - looks[0]["queued"]) / 1e9,
            "major_faults": looks[-1]["major_faults"] - looks[0]["major_faults"],
            "read_bytes": looks[-1]["read_bytes"] - looks[0]["read_bytes"],
            "write_bytes": looks[-1]["write_bytes"] - looks[0]["write_bytes"],
        },
        "estimate": next((event for event in found["events"] if event["event"] == "preflight"), None),
        "removed": found["removed"],
    }


def stages(events: list[dict[str, Any]], watch: Watch) -> list[dict[str, Any]]:
    """The parts that the run itself announces: when they began, how long they took, and how much of it was waiting."""
    found, running = [], {}
    for event in events:
        if event["event"] == "part started":
            running[event["part"]] = event["time"]
        elif event["event"] == "part finished" and event["part"] in running:
            began, ended = running.pop(event["part"]), event["time"]
            looks = watch.between(began, ended)
            found.append(
                {
                    "part": event["part"],
                    "seconds": ended - began,
                    "waited": watch.waited(began, ended),
                    "highest": max((look["VmRSS"] for look in looks), default=0),
                    "read_bytes": looks[-1]["read_bytes"] - looks[0]["read_bytes"] if looks else 0,
                }
            )
    return found


def phase_at(events: list[dict[str, Any]], moment: float) -> str:
    """Which part the run was in."""
    part = "before the first part"
    for event in events:
        if event["time"] > moment:
            break
        if event["event"] == "part started":
            part = event["part"]
        elif event["event"] == "part finished":
            part = f"after: {event['part']}"
    return part


def table(results: Results) -> str:
    """The results as Markdown."""
    entries = {method: entry for method in METHODS if (entry := results.get(method)) is not None}
    lines = [
        results.caption(),
        "",
        "| | peak memory (VmHWM) | highest look: anonymous + mapped files | wall | arithmetic | waiting for the disk | any thread in D (upper bound) | less than one thread ran (upper bound) | wall - CPU / threads | read | waiting for a core | load before |",
        "|" + "---|" * 12,
    ]
    for method, entry in entries.items():
        memory, disk = entry["memory"], entry["disk"]
        high = memory["highest"]
        verdict = "" if disk["share"] < WAITING_LIMIT else f" (over {WAITING_LIMIT:.0%})"
        cells = [
            METHODS[method][0],
            _gib(memory["VmHWM"]),
            f"{_gib(high['RssAnon'])} + {_gib(high['RssFile'])}, in “{memory['highest_in']}”, {memory['highest_while']}",
            f"{entry['seconds']:.0f} s, {entry['threads']} threads",
            f"{100 * entry['arithmetic']['share']:.0f} %",
            f"{100 * disk['share']:.1f} %{verdict}",
            f"{100 * disk['any'] / entry['seconds']:.1f} %",
            f"{100 * disk['quiet'] / entry['seconds']:.1f} %",
            f"{100 * disk['idle'] / entry['seconds']:.1f} %",
            _gib(disk["read_bytes"]),
            f"{100 * disk['queued'] / entry['seconds']:.1f} %",
            f"{entry['load_before']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Arithmetic is the products with weights alone, counted as they ran, at the rate measured in the same process (without attention, norms, "
        "activations, sorting): what it leaves is everything else. Waiting is the share of looks from outside (every 50 ms) at which the first thread "
        "was in state D, or any was while none ran. Waiting for a core is the first thread's (schedstat): others had the machine; it is in the two bounds that processor time gives. Threads that read ahead or write behind count in the bound of state D.",
        "",
        "Where the memory goes at the highest look:",
        "",
        "| | process before | one block's weights, fp32 | its gradient statistics | a score (largest matrix) | mapped files | rest |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, entry in entries.items():
        memory, high = entry["memory"], entry["memory"]["highest"]
        weights, largest = memory["of"]["one block's weights"], memory["of"]["largest matrix"]
        gathered = memory["of"]["one block's matrices"] if method != "wanda" else 0
        files = max(0, high["RssFile"] - memory["before"]["RssFile"])
        rest = high["VmRSS"] - memory["before"]["VmRSS"] - weights - gathered - largest - files
        cells = [_gib(size) for size in (memory["before"]["VmRSS"], weights, gathered, largest, files, rest)]
        lines.append(f"| {METHODS[method][0]} | " + " | ".join(cells) + " |")
    for method, entry in entries.items():
        arithmetic = entry["arithmetic"]
        said = ", ".join(
            f"{kind} {rate / 1e9:.0f} and {after / 1e9:.0f}"
            for (kind, rate), after in zip(arithmetic["rates"][0].items(), arithmetic["rates"][1].values(), strict=True)
        )
        products = sum(arithmetic["products"].values())
        lines += [
            "",
            f"{METHODS[method][0]} ({entry['date']}): {products / 1e12:.1f} T multiply-adds; rates before and after the run in G multiply-adds a second: "
            f"{said}.",
            "",
            "| stage | seconds | of it waiting | highest memory | read from disk |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {stage['part']} | {stage['seconds']:.1f} | {stage['waited']:.1f} | {_gib(stage['highest'])} | {_gib(stage['read_bytes'])} |"
            for stage in entry["stages"]
        ]
        lines += ["", "| what the main thread was at | seconds | share |", "|---|---|---|"]
        lines += [
            f"| {part} | {seconds:.1f} | {100 * seconds / entry['seconds']:.1f} % |"
            for part, seconds in entry["parts"].items()
        ]
    return "\n".join(lines) + "\n"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
