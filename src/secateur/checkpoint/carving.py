"""The carved form: the family's model in its dense sizes, resized tensor by tensor.

Code that repeats a size beside its weights (``num_heads``, ``split_size``) has to learn the new one. Which attributes those
are is found by trying: an integer attribute that equals a size which changes may stand for it. Every way to read a model's
attributes so is an ``Assignment``; which of them computes the right function is for a proof with numbers to say.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.checkpoint.carved import record_of
from secateur.checkpoint.skeleton import Skeleton
from secateur.structure.cutting import ModelCut, Removal
from secateur.structure.units import OUTSIDE, Structure, UnitGroup

Key = tuple[bool, str, str]
"""Whether the module stands in a block, its name there (or in the model), and the attribute."""

Assignment = Mapping[Key, str]
"""For attributes that say a size the size they say, as ``changed_sizes`` names it."""

Sizes = Mapping[str, tuple[int, int]]

TOLD = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
"""Modules that ``uneven.carve`` tells their sizes itself."""

MOST_ASSIGNMENTS = 128


def changed_sizes(removals: Sequence[Removal], groups: Sequence[UnitGroup]) -> dict[str, tuple[int, int]]:
    """Every size that removals change, by name: before and after.

    ``groups`` are all unit groups of the same block: query heads leave with their KV head. Names hold no numbers, so that
    they are the same for a small model of the same family.
    """
    removed = {(group.kind, group.module): len(set(units)) for group, units in removals}
    sizes: dict[str, tuple[int, int]] = {}
    for group in groups:
        gone = removed.get((group.kind, group.module), 0)
        families = group.families
        if group.kind == "query":
            families -= removed.get(("head", group.module), 0)
        each = group.count // group.families
        each_left = each - gone // group.families
        left = each_left * families
        name = f"{group.kind}@{group.module}"
        sizes[name] = (group.count, left)
        sizes[f"{name}/families"] = (each, each_left)
        for number, width in enumerate(sorted({member.index_UC.shape[1] for member in group.members})):
            sizes[f"{name}*{number}"] = (group.count * width, left * width)
    return {name: size for name, size in sizes.items() if size[0] != size[1]}


def assignments(skeleton: Skeleton, cut: ModelCut, structure: Structure) -> Iterator[dict[Key, str]]:
    """Ways to read attributes as sizes that change; the first takes every attribute that can be read so."""
    options: dict[Key, list[str | None]] = {}
    for inside, module, sizes, removals in _parts(skeleton, cut, structure):
        resized = [member.parameter for group, units in removals if len(units) for member in group.members]
        for name, part in module.named_modules():
            if isinstance(part, TOLD) or (not inside and f"{name}.".startswith(f"{skeleton.blocks_name}.")):
                continue
            if name and not any(parameter.startswith(f"{name}.") for parameter in resized):
                continue  # a module that holds nothing that changes says no size that does: rotary tables, positions
            for attribute, value in vars(part).items():
                if type(value) is int and not attribute.startswith("_"):
                    readings = _readings(name, value, sizes)
                    if readings:
                        options.setdefault((inside, name, attribute), [*readings, None])
    for choice in itertools.islice(itertools.product(*options.values()), MOST_ASSIGNMENTS):
        yield {key: reading for key, reading in zip(options, choice, strict=True) if reading is not None}


def carved_record(
    skeleton: Skeleton,
    plain: Skeleton,
    cut: ModelCut,
    structure: Structure,
    wanted: Mapping[str, Sequence[int]],
    assignment: Assignment,
) -> dict[str, Any] | None:
    """What ``uneven.carve`` needs to bring ``plain`` (the family's own sizes, the blocks that stay) into the ``wanted`` ones.

    None where a computed buffer would have to be cut: transformers computes those anew when it loads.
    """
    before = plain.shapes()
    if before.keys() != wanted.keys():
        return None
    earlier = record_of(skeleton.config)
    attributes: dict[str, dict[str, int]] = {
        new: dict(values)
        for name, values in earlier.get("attributes", {}).items()
        if (new := cut.new_name(name, skeleton.blocks_name))
    }
    arguments: dict[str, Any] = {}
    for number, old in enumerate(cut.kept()):
        block = f"{plain.blocks_name}.{number}"
        cuts = _cut_arguments(cut.blocks[old], earlier.get("arguments", {}).get(f"{plain.blocks_name}.{old}", {}))
        if cuts is None:
            return None
        if cuts:
            arguments[block] = cuts
        sizes = changed_sizes(cut.blocks[old], structure.of_block(old))
        for (inside, module, attribute), name in assignment.items():
            if inside and name in sizes and attribute in _attributes(plain.blocks[number], module):
                attributes.setdefault(f"{block}.{module}".rstrip("."), {})[attribute] = sizes[name][1]
    sizes = changed_sizes(cut.outside, structure.of_block(OUTSIDE))
    for (inside, module, attribute), name in assignment.items():
        if not inside and name in sizes:
            attributes.setdefault(module, {})[attribute] = sizes[name][1]
    shapes = {name: list(shape) for name, shape in wanted.items() if tuple(before[name]) != tuple(shape)}
    record = {"shapes": shapes, "attributes": attributes, "arguments": arguments}
    return {key: value for key, value in record.items() if value}


def _attributes(block: nn.Module, module: str) -> dict[str, Any]:
    """The attributes of a module that blocks of this kind may not have."""
    found = dict(block.named_modules()).get(module)
    return dict(vars(found)) if found is not None else {}


def _parts(
    skeleton: Skeleton, cut: ModelCut, structure: Structure
) -> Iterator[tuple[bool, nn.Module, Sizes, Sequence[Removal]]]:
    """Every block that loses something, and the model around them, each with the sizes that change in it."""
    for index in cut.kept():
        sizes = changed_sizes(cut.blocks[index], structure.of_block(index))
        if sizes:
            yield True, skeleton.blocks[index], sizes, cut.blocks[index]
    sizes = changed_sizes(cut.outside, structure.of_block(OUTSIDE))
    if sizes:
        yield False, skeleton.model, sizes, cut.outside


def _readings(module: str, value: int, sizes: Sizes) -> list[str | None]:
    """The sizes an attribute of ``module`` may stand for: equal ones of units in it or around it, each outcome once."""
    found: dict[int, str] = {}
    for name, (before, after) in sizes.items():
        place = name.partition("@")[2].partition("*")[0].partition("/")[0]
        near = f"{module}.".startswith(f"{place}.") or f"{place}.".startswith(f"{module}.") or not place or not module
        if before == value and near:
            found.setdefault(after, name)
    return list(found.values())


def _cut_arguments(removals: Sequence[Removal], earlier: Mapping[str, Any]) -> dict[str, Any] | None:
    """For each constant that enters the block: its dimension, its period, and what is kept of each period."""
    cuts: dict[str, Any] = dict(earlier)
    for group, units in removals:
        for argument in group.arguments if len(units) else ():
            if argument.path.startswith("buffer:"):
                return None
            gone = argument.index_UC[np.asarray(sorted(set(units)), dtype=np.int64)].reshape(-1)
            stays = np.setdiff1d(np.arange(argument.period), gone).tolist()
            if argument.path in earlier:
                _, period, before = earlier[argument.path]
                cuts[argument.path] = [argument.dim, period, [before[index] for index in stays]]
            else:
                cuts[argument.path] = [argument.dim, argument.period, stays]
    return cuts
