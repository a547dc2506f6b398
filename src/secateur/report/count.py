"""What a run reached, counted from the written files and from nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.console import track
from secateur.errors import StructureError
from secateur.structure import find_all_units


@dataclass(frozen=True)
class Count:
    """Counted in a folder of weights.

    Attributes:
        parameters: numbers stored.
        bytes: of tensor data.
        zeros: exact zeros in the prunable matrices.
        prunable: numbers in the prunable matrices.
        units: structured units left, by kind, over all blocks.
        valid_n_of_m: whether every group of M inputs of every prunable matrix keeps at most N; None where not asked.
    """

    parameters: int
    bytes: int
    zeros: int
    prunable: int
    units: dict[str, int] = field(default_factory=dict)
    valid_n_of_m: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def count_folder(
    folder: Path, n_of_m: tuple[int, int] | None = None, blocks: range | None = None, trust: bool = False
) -> Count:
    """Open ``folder`` anew and count. ``blocks``: where N:M was asked for."""
    return count_checkpoint(open_checkpoint(str(folder), trust), n_of_m, blocks)


def count_checkpoint(
    checkpoint: Checkpoint, n_of_m: tuple[int, int] | None = None, blocks: range | None = None
) -> Count:
    """Count what ``checkpoint`` stores; one block in memory."""
    skeleton = checkpoint.skeleton
    zeros = prunable = 0
    valid = None if n_of_m is None else True
    for index in track(range(len(skeleton.blocks)), "Counting what was written"):
        names = [skeleton.block_prefix(index) + name for name in _prunable(checkpoint, index)]
        for weight_OI in checkpoint.read(names).values():
            prunable += weight_OI.numel()
            zeros += int((weight_OI == 0).sum())
            if n_of_m is not None and (blocks is None or index in blocks):
                valid = valid and _keeps_at_most(weight_OI, *n_of_m)
    return Count(
        parameters=checkpoint.parameters(),
        bytes=sum(tensor.bytes for tensor in checkpoint.tensors.values()),
        zeros=zeros,
        prunable=prunable,
        units=_units(checkpoint),
        valid_n_of_m=valid,
    )


def _prunable(checkpoint: Checkpoint, index: int) -> list[str]:
    try:
        return list(checkpoint.skeleton.prunable(index))
    except StructureError:
        return []


def _keeps_at_most(weight_OI: torch.Tensor, keep: int, group: int) -> bool:
    return weight_OI.shape[1] % group == 0 and int((weight_OI.reshape(-1, group) != 0).sum(dim=1).max()) <= keep


def _units(checkpoint: Checkpoint) -> dict[str, int]:
    try:
        structure = find_all_units(checkpoint.skeleton.model, checkpoint.skeleton.blocks_name)
    except StructureError:  # masks need no structure: a model that cannot be traced can still be masked
        return {}
    counts: Counter[str] = Counter()
    for group in structure.units:
        counts[group.kind] += group.count
    return dict(counts)
