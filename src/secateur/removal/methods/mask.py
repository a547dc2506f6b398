"""Zeroed, and nothing else."""

from __future__ import annotations

from secateur.removal.methods.base import Removal, Removed, Task


class Mask(Removal):
    """What the criterion's scores ask for becomes zero; what stays is as it was, bit for bit."""

    name = "mask"

    def remove(self, task: Task) -> Removed:
        return Removed(task.choose())
