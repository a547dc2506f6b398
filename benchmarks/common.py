"""What the benchmarks share: the machine, fresh processes with their own peak memory, results that resume."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DEFAULT_REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference"

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


def fresh(code: str, threads: int | None = None, **environment: str) -> dict[str, Any]:
    """Run Python ``code`` in a process of its own; what it leaves in ``result``, its seconds and its peak memory."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    if threads:
        settings |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    script = MEASURED.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")], code=code)
    with tempfile.TemporaryDirectory() as folder:
        finished = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=settings, cwd=folder, check=False
        )
    for line in finished.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(finished.stderr[-3000:])


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
        self.content["entries"][key] = {"date": datetime.date.today().isoformat(), **entry}
        RESULTS.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


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
    }
