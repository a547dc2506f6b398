"""What the machine has to give: the memory that this process may still take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that can be had without swapping: the machine's, or what the process's control groups leave of them."""
    return max(0, min([_available(), *_left_in_groups()]))


def _available() -> int:
    try:
        for line in (PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # a system without /proc: all there is


def _left_in_groups() -> Iterator[int]:
    """For every control group that the process is in: its limit less what is used; cached files can be taken back."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, limit, used, cached = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # every group above limits too; in a container only the root is seen
            left = _left(folder, limit, used, cached)
            if left is not None:
                yield left
            if folder == root:
                break


def _left(folder: Path, limit: str, used: str, cached: str) -> int | None:
    try:
        allowed, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
        if allowed == "max":
            return None
        reclaimable = 0
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(f"{cached} "):
                reclaimable = int(line.split()[1])
        return int(allowed) - taken + reclaimable
    except (OSError, ValueError):
        return None
