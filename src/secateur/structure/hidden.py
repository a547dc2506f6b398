"""Hidden channels: the residual stream, which every block, every norm, the embeddings and the head share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from secateur.errors import StructureError
from secateur.structure.axes import LabelArray
from secateur.structure.grouping import OBSTACLES
from secateur.structure.record import Trace
from secateur.structure.units import OUTSIDE, Member, Norm, Role, UnitGroup


def hidden_units(outside: Trace, blocks: Sequence[Trace]) -> list[UnitGroup]:
    """Return the part of the hidden channels in every block, and the part outside.

    Raises:
        StructureError: something is tied to single channels, or works on them in an order; the sentence says what.
    """
    alike = {number: _group(trace) for number, trace in {id(trace): trace for trace in blocks}.items()}
    groups = [replace(alike[id(trace)], block=number) for number, trace in enumerate(blocks)]
    groups.append(_group(outside))
    if len({group.count for group in groups}) != 1:
        raise StructureError("the blocks have residual streams of different widths")
    return groups


def _group(trace: Trace) -> UnitGroup:
    hidden = trace.labels.find(trace.hidden)
    if len(hidden) < 2:
        raise StructureError("what a block returns is not what it was given plus something")
    if len(np.unique(hidden)) != len(hidden) or any(trace.labels.is_product(root) for root in hidden.tolist()):
        raise StructureError(
            "the residual stream is seen as several dimensions, or its channels are tied to each other"
        )
    _refuse_obstacles(trace, set(hidden.tolist()))
    consumed = {label for mark in trace.marks if mark.kind == "consumed" for label in mark.labels.tolist()}
    members: list[Member] = []
    for name in trace.used:
        for dim, labels in enumerate(trace.parameters[name]):
            index_UC = _owned(trace, labels, hidden, f"dimension {dim} of {name}")
            if index_UC is not None:
                same = [name, *(alias for alias, first in trace.aliases.items() if first == name)]
                role: Role = "producer" if consumed.isdisjoint(labels.tolist()) else "consumer"
                members += [Member(each, dim, role, index_UC) for each in same]
    norms = []
    for name in sorted({mark.module for mark in trace.marks if mark.kind == "reduced"} & trace.norms.keys()):
        index_UC = _owned(trace, trace.norms[name], hidden, name)
        if index_UC is not None:
            norms.append(Norm(name, index_UC))
    return UnitGroup("hidden", OUTSIDE, "", len(hidden), 1, tuple(members), tuple(norms))


def _refuse_obstacles(trace: Trace, hidden: set[int]) -> None:
    for mark in trace.marks:
        if mark.kind not in (*OBSTACLES, "batched") or (mark.kind == "reduced" and mark.module in trace.norms):
            continue
        if hidden & trace.labels.all_atoms(mark.labels):
            raise StructureError(mark.reason.format("the hidden channels"))


def _owned(trace: Trace, labels: LabelArray, hidden: LabelArray, where: str) -> LabelArray | None:
    """For every channel (``hidden`` are their roots) the indices of this dimension that belong to it, or None."""
    roots = trace.labels.find(labels)
    order = np.argsort(hidden)
    place = np.minimum(np.searchsorted(hidden[order], roots), len(hidden) - 1)
    belongs = hidden[order][place] == roots
    if not belongs.any():
        return None
    if not belongs.all():
        raise StructureError(f"only a part of {where} belongs to the residual stream")
    owners = order[place]
    if len(np.unique(np.bincount(owners, minlength=len(hidden)))) != 1:
        raise StructureError(f"{where} belongs to the channels of the residual stream in unequal parts")
    return np.argsort(owners, kind="stable").reshape(len(hidden), -1)
