"""The dense model that a pruned one is taught by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Teacher:
    """A model that only answers.

    Attributes:
        model: a causal language model of transformers, without gradients, in evaluation mode.
        kept: for every block of the pruned model, which of the teacher's it was; None where nobody knows.
    """

    model: Any
    kept: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()
