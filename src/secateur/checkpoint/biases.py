"""Biases of a block's matrices: where they stand, and a model that is given those it could have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.checkpoint.conversion import Origin
from secateur.checkpoint.matrices import BlockMatrix
from secateur.checkpoint.reader import Checkpoint, ModelTensor
from secateur.checkpoint.skeleton import Skeleton

ADDS_ITS_BIAS = (nn.Linear, Conv1D)
"""Modules that multiply with ``weight`` and add ``bias``, where they have one."""


def bias_of(block: nn.Module, matrix: BlockMatrix) -> str | None:
    """The name inside the block of the bias that is added to the matrix's product, or would be if there were one.

    None for matrices that are no module's own, such as packed experts.
    """
    owner, _, leaf = matrix.parameter.rpartition(".")
    is_own = leaf == "weight" and matrix.expert is None
    return f"{owner}.bias" if is_own and isinstance(block.get_submodule(owner), ADDS_ITS_BIAS) else None


def added_biases(before: Mapping[str, torch.Size], skeleton: Skeleton) -> frozenset[str] | None:
    """The tensors that ``skeleton`` has beside those of ``before``; None unless they are biases and all else is alike."""
    after = skeleton.shapes()
    added = frozenset(after.keys() - before.keys())
    if any(after.get(name) != shape for name, shape in before.items()):
        return None
    for name in added:
        owner, _, leaf = name.rpartition(".")
        if leaf != "bias" or not isinstance(skeleton.model.get_submodule(owner), ADDS_ITS_BIAS):
            return None
    return added


@dataclass(frozen=True)
class _Zeros(Origin):
    """A tensor that no file holds."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def make(self, model: Any, read: Any) -> dict[str, torch.Tensor]:
        return {self.name: torch.zeros(self.shape, dtype=self.dtype)}


class BiasedCheckpoint(Checkpoint):
    """A checkpoint whose config has been given more biases; they are zero, so that it computes what it did.

    Args:
        skeleton: of that config.
        names: of the new biases, in the model.
    """

    def __init__(self, dense: Checkpoint, skeleton: Skeleton, names: Collection[str]) -> None:
        self._dense = dense
        found = dict(dense.tensors)
        for name in names:
            weight = dense.tensors[name.removesuffix("bias") + "weight"]
            shape = tuple(skeleton.shapes()[name])
            found[name] = ModelTensor(weight.dtype, shape, _Zeros(name, shape=shape, dtype=weight.dtype))
        super().__init__(dense.source, skeleton, found)

    @cached_property
    def content_hash(self) -> str:
        """That of the files."""
        return self._dense.content_hash
