"""``secateur inspect``: blocks, the units found in them, parameters by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.tree import Tree

from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.errors import StructureError
from secateur.files import human_bytes, human_count
from secateur.structure import Member, Structure, UnitGroup, find_all_units, parameters_per_unit


@dataclass(frozen=True)
class Inspection:
    """What is known of a model without running it."""

    spec: str
    architecture: str
    dtype: str
    blocks: int
    blocks_name: str
    parameters: dict[str, int]
    bytes: int
    units: list[dict[str, Any]]
    refused: list[str]

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def render(self) -> Group:
        """A tree of units and a table of parameters."""
        total = sum(self.parameters.values())
        tree = Tree(
            f"[bold]{self.spec}[/bold]  {self.architecture}, {human_count(total)} parameters, {self.dtype}, {human_bytes(self.bytes)}"
        )
        spans: dict[str, list[dict[str, Any]]] = {}
        for unit in self.units:
            spans.setdefault(unit["blocks"], []).append(unit)
        for blocks, units in spans.items():
            branch = tree.add(f"[bold]{self.blocks_name}[/bold] {blocks}")
            for unit in units:
                parts = ", ".join(unit["members"])
                label = f"[cyan]{unit['kind']}[/cyan] × {unit['count']} in {unit['module']}, {unit['parameters']:,} parameters each"
                branch.add(label).add(f"[dim]{parts}[/dim]")
        for reason in self.refused:
            tree.add(f"[yellow]not offered[/yellow] {reason}")
        table = Table(box=None, padding=(0, 2))
        table.add_column("parameters")
        for column in ("count", "share"):
            table.add_column(column, justify="right")
        for kind, count in self.parameters.items():
            table.add_row(kind, f"{count:,}", f"{100 * count / total:.1f} %")
        return Group(tree, "", table)


def inspect_model(spec: str, trust_remote_code: bool = False) -> Inspection:
    """Open ``spec``, trace it, and describe it.

    Raises:
        ModelError: it cannot be opened.
    """
    checkpoint = open_checkpoint(spec, trust_remote_code)
    skeleton = checkpoint.skeleton
    try:
        structure = find_all_units(skeleton.model, skeleton.blocks_name)
        refused = sorted({f"{refusal.kind} in {refusal.module}: {refusal.reason}" for refusal in structure.refused})
    except StructureError as error:
        structure, refused = Structure([], []), [str(error)]
    return Inspection(
        spec=spec,
        architecture=type(skeleton.model).__name__,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        blocks=len(skeleton.blocks),
        blocks_name=skeleton.blocks_name,
        parameters=_parameters_by_kind(checkpoint),
        bytes=sum(tensor.bytes for tensor in checkpoint.tensors.values()),
        units=_spans(checkpoint, structure),
        refused=refused,
    )


def _parameters_by_kind(checkpoint: Checkpoint) -> dict[str, int]:
    inside = checkpoint.skeleton.blocks_name + "."
    counts: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        size = torch.Size(tensor.shape).numel()
        if not name.startswith(inside):
            counts[f"{name}"] += size
        elif len(tensor.shape) >= 2:
            counts["blocks: " + ".".join(name.removeprefix(inside).split(".")[1:])] += size
        else:
            counts["blocks: norms and biases"] += size
    return dict(counts)


def _spans(checkpoint: Checkpoint, structure: Structure) -> list[dict[str, Any]]:
    """Like groups of consecutive blocks described once."""
    described = []
    for group in structure.units:
        shapes = {name: tuple(t.shape) for name, t in checkpoint.skeleton.blocks[group.block].state_dict().items()}
        described.append((group.block, _describe(group, parameters_per_unit(group, shapes))))
    by_block = [
        (block, [entry for _, entry in entries]) for block, entries in groupby(described, key=lambda item: item[0])
    ]
    spans = []
    for _, run in groupby(by_block, key=lambda item: item[1]):
        members = list(run)
        blocks = f"{members[0][0]}:{members[-1][0] + 1}"
        spans += [{"blocks": blocks, **entry} for entry in members[0][1]]
    return spans


def _describe(group: UnitGroup, parameters: int) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "module": group.module,
        "count": group.count,
        "families": group.families,
        "parameters": parameters,
        "members": [_describe_member(member) for member in group.members],
    }


def _describe_member(member: Member) -> str:
    count = member.index_UC.shape[1]
    axis = {0: "row", 1: "column"}.get(member.dim, f"slice of dimension {member.dim}")
    return f"{count} {axis}{'s' if count != 1 else ''} of {member.parameter}"
