"""``secateur inspect``: blocks, the units found in them, parameters by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.tree import Tree

from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.checkpoint.skeleton import Skeleton
from secateur.console import track
from secateur.errors import StructureError
from secateur.files import human_bytes, human_count
from secateur.proof import Proof, prove_all
from secateur.structure import OUTSIDE, Member, Structure, UnitGroup, find_all_units, parameters_per_unit


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
            place = "the whole model" if blocks == "all" else f"{self.blocks_name} {blocks}"
            branch = tree.add(f"[bold]{place}[/bold]")
            for unit in units:
                branch.add(_label(unit)).add(f"[dim]{', '.join(unit['members'])}[/dim]")
        for reason in self.refused:
            tree.add(f"[yellow]not offered[/yellow] {reason}")
        table = Table(box=None, padding=(0, 2))
        table.add_column("parameters")
        for column in ("count", "share"):
            table.add_column(column, justify="right")
        for kind, count in self.parameters.items():
            table.add_row(kind, f"{count:,}", f"{100 * count / total:.1f} %")
        return Group(tree, "", table)


def _label(unit: dict[str, Any]) -> str:
    shared = f" in {unit['families']} groups" if unit["families"] > 1 else ""
    return (
        f"[cyan]{unit['kind']}[/cyan] × {unit['count']}{shared} in {unit['module'] or 'the block'}, "
        f"{unit['parameters']:,} parameters each"
    )


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


def prove_model(spec: str, trust_remote_code: bool = False) -> list[Proof]:
    """Prove every kind of unit of ``spec`` on a small instance of its config.

    Raises:
        ModelError: it cannot be opened.
        StructureError: it cannot be traced, or has no small instance.
    """
    skeleton = open_checkpoint(spec, trust_remote_code).skeleton
    structure = find_all_units(skeleton.model, skeleton.blocks_name)
    return list(track(prove_all(skeleton, structure), "Proving the units"))


def check_proofs(proofs: Sequence[Proof]) -> None:
    """Refuse a model of which some units did not prove.

    Raises:
        StructureError: it names them.
    """
    failed = [
        f"{proof.kind} in {proof.module or 'the whole model'} ({proof.case})" for proof in proofs if not proof.holds
    ]
    if failed:
        raise StructureError(
            f"cut and masked out differ, or cannot be written, for: {', '.join(failed)}; prune other units (please report this)"
        )


def proof_table(proofs: Sequence[Proof]) -> Table:
    """What was cut on a small instance, in which form it can be written, and how far cut and masked are apart."""
    table = Table(box=None, padding=(0, 1))
    for column in ("unit", "where", "cut", "written as", "difference"):
        table.add_column(column, no_wrap=column != "difference")
    for proof in proofs:
        outcome = f"[green]{proof.difference:.0e}[/green]" if proof.holds else f"[red]{proof.problem}[/red]"
        table.add_row(proof.kind, proof.module or "whole model", proof.case, proof.form, outcome)
    return table


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
    """Like groups of consecutive blocks described once; then the units that span the model."""
    skeleton = checkpoint.skeleton
    described = [
        (group.block, _describe(group, parameters_per_unit(group, skeleton.block_shapes(group.block))))
        for group in structure.units
        if group.kind not in ("hidden", "block")
    ]
    described.sort(key=lambda item: item[0])
    by_block = [
        (block, [entry for _, entry in entries]) for block, entries in groupby(described, key=lambda item: item[0])
    ]
    spans = []
    for _, run in groupby(by_block, key=lambda item: item[1]):
        members = list(run)
        blocks = f"{members[0][0]}:{members[-1][0] + 1}"
        spans += [{"blocks": blocks, **entry} for entry in members[0][1]]
    return spans + _spanning(skeleton, structure)


def _spanning(skeleton: Skeleton, structure: Structure) -> list[dict[str, Any]]:
    """Hidden channels, which all blocks and what stands outside share, and whole blocks."""
    found = []
    hidden = [group for group in structure.units if group.kind == "hidden"]
    if hidden:
        shapes = {name: shape for name, shape in skeleton.shapes().items() if name not in skeleton.tied()}
        each = sum(_own_parameters(group, skeleton, shapes) for group in hidden)
        outside = next(group for group in hidden if group.block == OUTSIDE)
        members = [
            *(_describe_member(member) for member in outside.members),
            "every block's share of the residual stream",
        ]
        found.append({"blocks": "all", **_described("hidden", "the residual stream", outside.count, 1, each, members)})
    for group in structure.units:
        if group.kind == "block":
            sizes = [sum(prod(shape) for shape in skeleton.block_shapes(i).values()) for i in range(group.count)]
            members = ["everything in it; its input is handed on"]
            found.append({"blocks": "all", **_described("block", group.module, group.count, 1, max(sizes), members)})
    return found


def _own_parameters(group: UnitGroup, skeleton: Skeleton, outer: dict[str, Any]) -> int:
    """Parameters of one unit in this group; of tied tensors one."""
    if group.block != OUTSIDE:
        return parameters_per_unit(group, skeleton.block_shapes(group.block))
    stored = tuple(member for member in group.members if member.parameter in outer)
    return parameters_per_unit(replace(group, members=stored), outer)


def _describe(group: UnitGroup, parameters: int) -> dict[str, Any]:
    members = [_describe_member(member) for member in group.members]
    members += [f"statistics of {norm.module}" for norm in group.norms]
    members += [f"entries of the constant {argument.path}" for argument in group.arguments]
    return _described(group.kind, group.module, group.count, group.families, parameters, members)


def _described(
    kind: str, module: str, count: int, families: int, parameters: int, members: list[str]
) -> dict[str, Any]:
    return {
        "kind": kind,
        "module": module,
        "count": count,
        "families": families,
        "parameters": parameters,
        "members": members,
    }


def _describe_member(member: Member) -> str:
    count = member.index_UC.shape[1]
    axis = {0: "row", 1: "column"}.get(member.dim, f"slice of dimension {member.dim}")
    return f"{count} {axis}{'s' if count != 1 else ''} of {member.parameter}"
