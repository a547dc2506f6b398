"""Planning one recipe in a process of its own, so that its time and its memory are its own."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.console import log
from secateur.errors import SecateurError

KEPT = re.compile(r"Using the (.+) kept from an earlier run\.")
"""What the planner says of what it found in the cache, one sentence a kind."""

NO_MEMORY_LEFT = signal.SIGKILL
"""What the system ends a process with for want of memory."""

PARENT_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG`` of Linux."""


class PlanningFailedError(SecateurError):
    """A recipe could not be planned; the sentence is the child's own."""


@dataclass(frozen=True)
class Planning:
    """What it took to plan a recipe.

    Attributes:
        seconds: of the work, from opening the model to the saved plan.
        wall_seconds: of the whole process, its start included.
        processor_seconds: of all its threads.
        peak_memory: bytes at most, mapped pages of files included.
        found: what it did not have to measure: kinds of things that an earlier recipe or run had left in the cache.
        record: what ``secateur plan --json`` printed.
    """

    seconds: float
    wall_seconds: float
    processor_seconds: float
    peak_memory: int
    found: list[str]
    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def plan_in_child(recipe: Path, plan: Path, log_file: Path) -> Planning:
    """Run ``secateur plan`` on the ``recipe`` file; the plan goes to ``plan``, what it says to ``log_file`` and to our log.

    The child dies with this process, however that dies; the next call goes on from what it has finished.

    Raises:
        PlanningFailedError: it could not be planned.
    """
    words = ["plan", "--recipe", str(recipe), "--out", str(plan), "--overwrite", "--json"]
    printed = log_file.with_suffix(".out")
    started = time.monotonic()
    with log_file.open("a", encoding="utf-8") as kept, printed.open("w+", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "secateur", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            preexec_fn=_dying_with(os.getpid()),
        )
        try:
            assert child.stderr is not None
            said = []
            for line in child.stderr:
                said.append(line.rstrip())
                kept.write(line)
                kept.flush()
                log.info("  %s", said[-1])
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            _end(child)
        output.seek(0)
        text = output.read()
    printed.unlink()
    if child.returncode != 0:
        raise PlanningFailedError(_reason(child.returncode, said, log_file))
    record = json.loads(text)
    wall = time.monotonic() - started
    return Planning(
        seconds=float(record.get("seconds", wall)),
        wall_seconds=round(wall, 2),
        processor_seconds=round(usage.ru_utime + usage.ru_stime, 2),
        peak_memory=int(record["peak_memory"]),  # the child's own: what the system says of it begins with ours
        found=[match[1] for line in said if (match := KEPT.fullmatch(line))],
        record=record,
    )


def _reason(code: int, said: list[str], log_file: Path) -> str:
    """Why it failed, in one sentence."""
    if code == -NO_MEMORY_LEFT:
        return "the system killed its process, most likely for want of memory; give a smaller --memory or --micro-batch"
    last = next((line for line in reversed(said) if line), "it said nothing")
    if code == 2 and last.startswith("secateur: "):
        return last.removeprefix("secateur: ")
    how = f"signal {-code} ended its process" if code < 0 else f"its process ended with {last!r}"
    return f"{how}; see {log_file} (please report this)"


def _end(child: subprocess.Popen[str]) -> None:
    """Leave no child behind when this process is told to stop."""
    if child.stderr is not None:
        child.stderr.close()
    if child.returncode is None and child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _dying_with(parent: int) -> Callable[[], None] | None:
    """What the child does before it begins: ask the system to be killed when ``parent`` dies, even by ``kill -9``.

    Left alone it would hold the lock on its unfinished work, and the same command could not go on with it.
    """
    ask = _prctl()
    if ask is None:
        return None

    def prepare() -> None:
        ask(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return prepare


@functools.cache
def _prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "prctl", None)
