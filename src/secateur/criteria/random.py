"""Random scores: the floor that every criterion has to beat."""

from __future__ import annotations

import hashlib

import torch

from secateur.criteria.base import Criterion, Matrix


class Random(Criterion):
    """Uniform in [0, 1), drawn for each matrix from the run's seed and the matrix's name alone."""

    name = "random"

    def score_OI(self, matrix: Matrix) -> torch.Tensor:
        digest = hashlib.sha256(f"{matrix.seed}:{matrix.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(matrix.weight_OI.shape, generator=generator)
