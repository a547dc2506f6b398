"""LoRA: low-rank updates beside every linear layer, folded in at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from secateur.recovery.methods.base import Method, Student, Task
from secateur.recovery.places import block_linears


class LoraStudent(Student):
    """A ``PeftModel`` whose adapters are trained."""

    def merged(self) -> dict[str, Tensor]:
        from secateur.recovery.adapters import merged

        return merged(self.model)


class LoRA(Method):
    """``W + alpha / rank * B A`` with ``W`` frozen, masked where ``W`` is sparse (arXiv 2106.09685; defaults: methods §14.5)."""

    name = "lora"
    title = "LoRA"

    def defaults(self) -> dict[str, Any]:
        return {"rank": 8, "alpha": 16, "dropout": 0.05, "learning_rate": 1e-4}

    @contextmanager
    def student(self, task: Task) -> Iterator[Student]:
        from secateur.recovery.adapters import adapted

        with adapted(task.model, block_linears(task.model), task.masks, *task.settings.low_rank()) as wrapped:
            yield LoraStudent(wrapped)
