"""What a run reached, counted from the written files and from nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint.matrices import BlockMatrix
from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.console import track
from secateur.errors import StructureError
from secateur.quantities import NofM
from secateur.structure import OUTSIDE, UnitGroup, find_all_units


@dataclass(frozen=True)
class Count:
    """Counted in a folder of weights.

    Attributes:
        parameters: numbers stored.
        bytes: of tensor data.
        nonzero: numbers stored that are not zero, of all tensors.
        zeros: exact zeros in the prunable matrices.
        prunable: numbers in the prunable matrices.
        units: structured units left, by kind, over all blocks.
        valid_n_of_m: whether every group of M inputs of every prunable matrix keeps at most N; None where not asked.
    """

    parameters: int
    bytes: int
    nonzero: int
    zeros: int
    prunable: int
    units: dict[str, int] = field(default_factory=dict)
    valid_n_of_m: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def count_folder(
    folder: Path,
    groups: Sequence[UnitGroup] | None = None,
    n_of_m: NofM | None = None,
    blocks: range | None = None,
    trust_remote_code: bool = False,
    kept: Sequence[int] | None = None,
) -> Count:
    """Open ``folder`` anew and count."""
    return count_checkpoint(open_checkpoint(str(folder), trust_remote_code), groups, n_of_m, blocks, kept)


def count_checkpoint(
    checkpoint: Checkpoint,
    groups: Sequence[UnitGroup] | None = None,
    n_of_m: NofM | None = None,
    blocks: range | None = None,
    kept: Sequence[int] | None = None,
) -> Count:
    """Count what ``checkpoint`` stores; one tensor in memory.

    Args:
        groups: the dense model's units, whose widths tell how many are left; None finds the model's own.
        n_of_m: a pattern to check, in ``blocks`` (None: everywhere).
        kept: where blocks have left, the dense numbers of those that stay; ``groups`` and ``blocks`` use these.
    """
    skeleton = checkpoint.skeleton
    kept = range(len(skeleton.blocks)) if kept is None else kept
    zeros = prunable = 0
    inside: set[str] = set()
    valid = None if n_of_m is None else True
    for index in track(range(len(skeleton.blocks)), "Counting what was written"):
        matrices = _prunable(checkpoint, index)
        inside |= {skeleton.block_prefix(index) + matrix.parameter for matrix in matrices}
        for weight_OI in _weights(checkpoint, index, matrices):
            prunable += weight_OI.numel()
            zeros += weight_OI.numel() - int(weight_OI.count_nonzero())
            if n_of_m is not None and (blocks is None or kept[index] in blocks):
                valid = valid and _keeps_at_most(weight_OI, n_of_m.keep, n_of_m.group)
    return Count(
        parameters=checkpoint.parameters(),
        bytes=sum(tensor.bytes for tensor in checkpoint.stored()),
        nonzero=prunable - zeros + _nonzero(checkpoint, inside),
        zeros=zeros,
        prunable=prunable,
        units=_units(checkpoint, groups, kept),
        valid_n_of_m=valid,
    )


def _nonzero(checkpoint: Checkpoint, inside: set[str]) -> int:
    """Numbers that are not zero in what is stored outside the prunable matrices; one tensor in memory at a time."""
    names = [name for name, tensor in checkpoint.tensors.items() if tensor.origin.sources and name not in inside]
    return sum(int(checkpoint.read([name])[name].count_nonzero()) for name in names)


def _weights(checkpoint: Checkpoint, index: int, matrices: list[BlockMatrix]) -> Iterator[torch.Tensor]:
    """The weights ``(O, I)`` of ``matrices`` of one block; one parameter in memory at a time."""
    by_parameter: dict[str, list[BlockMatrix]] = {}
    for matrix in matrices:
        by_parameter.setdefault(matrix.parameter, []).append(matrix)
    prefix = checkpoint.skeleton.block_prefix(index)
    for parameter, views in by_parameter.items():
        tensors = {parameter: checkpoint.read([prefix + parameter])[prefix + parameter]}
        for matrix in views:
            yield matrix.of(tensors)


def _prunable(checkpoint: Checkpoint, index: int) -> list[BlockMatrix]:
    try:
        return list(checkpoint.skeleton.prunable(index).values())
    except StructureError:
        return []


def _keeps_at_most(weight_OI: torch.Tensor, keep: int, group: int) -> bool:
    return weight_OI.shape[1] % group == 0 and int((weight_OI.reshape(-1, group) != 0).sum(dim=1).max()) <= keep


def _units(checkpoint: Checkpoint, groups: Sequence[UnitGroup] | None, kept: Sequence[int]) -> dict[str, int]:
    """Units by kind, from the stored shapes: a unit's narrowest member is owned by nothing but the unit."""
    skeleton = checkpoint.skeleton
    if groups is None:
        try:
            groups = find_all_units(skeleton.model, skeleton.blocks_name).units
        except StructureError:  # masks need no structure: a model that cannot be traced can still be masked
            return {}
    counts: Counter[str] = Counter()
    for group in groups:
        if group.kind == "block":
            counts["block"] = len(kept)
        elif group.block == OUTSIDE or (group.kind != "hidden" and group.block in kept):  # hidden: once for all
            prefix = "" if group.block == OUTSIDE else skeleton.block_prefix(kept.index(group.block))
            narrowest = min(group.members, key=lambda member: member.index_UC.shape[1])
            stored = checkpoint.tensors[prefix + narrowest.parameter]
            counts[group.kind] += stored.shape[narrowest.dim] // narrowest.index_UC.shape[1]
    return dict(counts)
