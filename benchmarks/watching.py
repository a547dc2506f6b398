"""A process watched from outside, and from inside a clock for its parts: what large.py measures with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

KIB = 1024


class Watch:
    """Looks at a process again and again by /proc alone; give it to ``common.fresh``.

    A moment counts as waiting for the disk where a thread sleeps uninterruptibly (state D: a page fault or a read that the disk
    has not answered) while no thread runs, or where the thread in D is the first, which all arithmetic waits for.

    Attributes:
        samples: of each look the time (CLOCK_MONOTONIC, the same in all processes), memory, and whether it waited.
    """

    def __init__(self) -> None:
        self.samples: list[dict[str, Any]] = []

    def __call__(self, pid: int) -> None:
        with suppress(OSError, KeyError, ValueError, IndexError):
            folder = Path("/proc", str(pid))
            memory = _fields(folder / "status")
            states = {task.name: _stat(task / "stat")[0] for task in (folder / "task").iterdir()}
            stat, moved = _stat(folder / "stat"), _fields(folder / "io")
            children = (folder / "task" / str(pid) / "children").read_text().split()
            self.samples.append(
                {
                    "time": time.monotonic(),
                    **{name: memory[name] * KIB for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")},
                    "children": sum(
                        _fields(Path("/proc", child, "status")).get("VmRSS", 0) * KIB for child in children
                    ),
                    "waits": states[str(pid)] == "D" or ("D" in states.values() and "R" not in states.values()),
                    "any_waits": "D" in states.values(),
                    "major_faults": int(stat[9]),
                    # of the first thread: nanoseconds in which it could have run, and others had the core
                    "queued": int((folder / "task" / str(pid) / "schedstat").read_text().split()[1]),
                    "cpu_ticks": int(stat[11]) + int(stat[12]),
                    "read_bytes": moved["read_bytes"],
                    "write_bytes": moved["write_bytes"],
                }
            )

    def between(self, began: float, ended: float) -> list[dict[str, Any]]:
        return [sample for sample in self.samples if began <= sample["time"] <= ended]

    def waited(self, began: float, ended: float, what: str = "waits") -> float:
        """Seconds of waiting for the disk: each look stands for the time until the next one.

        ``what``: ``any_waits`` counts every moment at which any thread was in D, those that read ahead too: an upper bound.
        """
        looks = self.between(began, ended)
        return sum((after["time"] - before["time"]) * before[what] for before, after in pairwise(looks))


def _stat(file: Path) -> list[str]:
    """The fields of a ``stat`` file from the third (state) on; the name before may hold spaces."""
    return file.read_text().rpartition(")")[2].split()


def _fields(file: Path) -> dict[str, int]:
    fields = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.split()[:1] and value.split()[0].isdigit():
            fields[name] = int(value.split()[0])
    return fields


class Clock:
    """Wall time of the main thread by what it was at: a part's seconds are its own, without those of parts within it.

    Attributes:
        seconds: by part.
        history: when which part began or was come back to.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.history: list[tuple[float, str]] = []
        self._stack: list[str] = []
        self._since = time.monotonic()
        self._home = threading.get_ident()

    def start(self) -> None:
        """Begin with nothing."""
        self._since = time.monotonic()
        self.seconds.clear()

    def enter(self, name: str) -> None:
        self._settle()
        self._stack.append(name)
        self.history.append((self._since, name))

    def leave(self) -> None:
        self._settle()
        self._stack.pop()
        self.history.append((self._since, self._now))

    def inside(self, name: str) -> bool:
        return name in self._stack

    @property
    def _now(self) -> str:
        return self._stack[-1] if self._stack else "rest"

    def _settle(self) -> None:
        now = time.monotonic()
        self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._since = now

    def finish(self) -> dict[str, float]:
        self._settle()
        return dict(self.seconds)

    def timed(self, work: Callable[..., Any], name: str | Callable[..., str]) -> Callable[..., Any]:
        """``work`` under the clock; in other threads it runs as it is."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._home:
                return work(*args, **kwargs)
            self.enter(name if isinstance(name, str) else name(*args, **kwargs))
            try:
                return work(*args, **kwargs)
            finally:
                self.leave()

        return run

    def watch(self, place: Any, attribute: str, name: str | Callable[..., str]) -> None:
        """From now on ``place.attribute`` runs under the clock."""
        setattr(place, attribute, self.timed(getattr(place, attribute), name))
