"""What the benchmarks share: the machine, fresh processes with their own peak memory, results that resume."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [str(ROOT / name) for name in ("benchmarks", "tests", "src")]
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT_REFERENCE = ROOT.parent / "shared" / "reference"

BEST = "preset best"
"""What tables call ``--preset best``."""

LOOK_EVERY = 0.05
"""Seconds between two looks at a process that is watched."""

MEASURED = """
import json, sys, time
sys.path[:0] = {path!r}
started = time.perf_counter()
{code}
result = {{**dict(globals().get("result", {{}}))}}
result.setdefault("seconds", time.perf_counter() - started)
# not getrusage: its peak is handed down from the process that started this one
status = open("/proc/self/status").read()
result["peak_mib"] = int(status.split("VmHWM:")[1].split()[0]) / 1024
print("RESULT " + json.dumps(result))
"""


def fresh(
    code: str, threads: int | None = None, watch: Callable[[int], None] | None = None, **environment: str
) -> dict[str, Any]:
    """Run Python ``code`` in a process of its own; what it leaves in ``result``, its seconds and its peak memory.

    Args:
        watch: called with the process's id again and again while it runs.
    """
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(SOURCES), **environment}
    if threads:
        settings |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    script = MEASURED.format(path=SOURCES, code=code)
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as said,
    ):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=out, stderr=said, env=settings, cwd=folder)
        try:
            while watch is not None and process.poll() is None:
                watch(process.pid)
                time.sleep(LOOK_EVERY)
            process.wait()
        finally:
            process.kill()
        out.seek(0)
        said.seek(0)
        for line in out:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(said.read()[-3000:])


class Results:
    """A JSON file of finished entries; a benchmark that is stopped goes on where it was."""

    def __init__(self, name: str, command: str) -> None:
        self.path = RESULTS / f"{name}.json"
        self.content: dict[str, Any] = {"command": command, "machine": machine(), "entries": {}}
        if self.path.is_file():
            self.content["entries"] = json.loads(self.path.read_text())["entries"]

    def get(self, key: str) -> dict[str, Any] | None:
        return self.content["entries"].get(key)

    def put(self, key: str, entry: dict[str, Any]) -> None:
        if self.path.is_file():  # another process may measure other entries meanwhile
            self.content["entries"] = json.loads(self.path.read_text())["entries"]
        self.content["entries"][key] = {"date": datetime.date.today().isoformat(), **entry}
        RESULTS.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def caption(self, more: str = "") -> str:
        """What stands above a table: the command, the machine, the versions, and when it was measured."""
        machine = self.content["machine"]
        dates = sorted({entry["date"] for entry in self.content["entries"].values()})
        when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "not measured yet"
        gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
        return (
            f"`{self.content['command']}`: {gpu}{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}; {when}{more}."
        )


def machine() -> dict[str, Any]:
    import torch
    import transformers

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def lead(name: str, best: float, others: Mapping[str, float], dense: float) -> str:
    """A line on where ``--preset best`` stands in a column: how much of the distance between the next best method and dense it makes good."""
    next_best = min(others, key=others.__getitem__)
    share = (others[next_best] - best) / (others[next_best] - dense)
    where = f"{100 * share:.0f} % of the way from there to dense" if share > 0 else "**not ahead**"
    after = f"next best of {len(others)} others" if len(others) > 1 else "beside it only"
    return f"* {name}: {BEST} {best:.2f}, {after} {next_best} {others[next_best]:.2f}; {where}"
