"""The directions along which forward-only gradients perturb a model, drawn anew whenever they are wanted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

CHUNK = 1 << 16
"""Numbers drawn from one seed: of a matrix as many whole rows as hold about so many."""


@dataclass(frozen=True)
class Queries:
    """Along which directions the loss is measured.

    Attributes:
        count: how many.
        perturbation: the step along them, MeZO's epsilon.
        seed: from which all directions follow.
    """

    count: int = 16
    perturbation: float = 1e-3
    seed: int = 0

    def noise_RI(self, query: int, name: str, chunk: int, shape_RI: tuple[int, int]) -> torch.Tensor:
        """What ``query`` draws for one chunk of rows of the matrix called ``name`` in full."""
        digest = hashlib.sha256(f"{self.seed}:{query}:{name}:{chunk}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(shape_RI, generator=generator)


def row_chunks(shape_OI: tuple[int, int]) -> list[range]:
    """The rows of a matrix in chunks; where they end follows from its shape alone."""
    outputs, inputs = shape_OI
    rows = max(1, CHUNK // inputs)
    return [range(start, min(start + rows, outputs)) for start in range(0, outputs, rows)]
