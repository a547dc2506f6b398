"""How much memory this process has, has had at most, and may still take."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from secateur.errors import TooLargeError
from secateur.files import human_bytes

LOOK_EVERY = 0.002
"""Seconds between two looks at the memory."""

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def memory_now() -> int:
    """Bytes of this process in memory now (at most so far, where the system does not say)."""
    return _status("VmRSS") or _usage()


def memory_peak() -> int:
    """Bytes of this process in memory at most so far."""
    return _status("VmHWM") or _usage()


def peak_of(work: Callable[[], None]) -> int:
    """Bytes that ``work`` takes at most beside what the process has already, by looking often."""
    before, highest, done = memory_now(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(LOOK_EVERY):
            highest = max(highest, memory_now())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(0, highest - before)


def memory_available() -> int | None:
    """Bytes that can still be taken before the system swaps or its control groups end the process; None: unknown."""
    fields = _fields(PROC / "meminfo")
    bounds = [fields["MemAvailable"]] if "MemAvailable" in fields else []
    return min([*bounds, *_left_in_groups()], default=None)


def require_memory(needed: int, what: str, instead: str, limit: int | None = None) -> None:
    """Refuse what would take more memory than there is.

    Args:
        needed: bytes.
        what: needs them; begins the sentence.
        instead: what to do; ends it.
        limit: bytes that may be taken; None: what is free.

    Raises:
        TooLargeError: it is more.
    """
    there = memory_available() if limit is None else limit
    if there is not None and needed > there:
        free = "are free" if limit is None else "are allowed"
        raise TooLargeError(f"{what} takes {human_bytes(needed)}, and {human_bytes(there)} {free}; {instead}")


def _status(name: str) -> int | None:
    return _fields(PROC / "self" / "status").get(name)


def _fields(file: Path) -> dict[str, int]:
    """The lines ``Name: 123 kB`` of a file under /proc, in bytes."""
    fields = {}
    for line in _text(file).splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    return fields


def _usage() -> int:
    """The peak by ``getrusage``: kibibytes on Linux, bytes on macOS; a child's begins at its parent's."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _left_in_groups() -> list[int]:
    """What each control group above this process leaves: its limit without what is in use and cannot be given back."""
    left = []
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            left += _walk(_root("unified"), path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            left += _walk(_root("memory"), path, *names)
    return left


def _root(name: str) -> Path:
    """Where one hierarchy is mounted: version 2 alone on top, both side by side in subfolders."""
    return CGROUPS / name if (CGROUPS / name).is_dir() else CGROUPS


def _walk(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> list[int]:
    """A group's limit and those of the groups around it; in a container its path may be one that only the host knows."""
    folder = root / path.lstrip("/")
    left = []
    for group in [folder, *folder.parents] if folder.is_dir() else [root]:
        allowed, used = _number(group / limit), _number(group / usage)
        if allowed is not None and used is not None:
            left.append(max(0, allowed - used + _cached(group / "memory.stat", reclaimable)))
        if group == root:
            break
    return left


def _cached(file: Path, name: str) -> int:
    """Pages of files that the system drops when it needs room."""
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None  # version 2 says "max" where there is no limit


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
