"""Opening a model for a recipe whose removal writes biases: those that are missing are given to it, as zeros.

Which switches of a family's config give it biases is found by trying, on the small instance on which units are proved: one
that adds nothing but biases, and with these zero changes no logit, does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from secateur.checkpoint.biases import BiasedCheckpoint, added_biases, bias_of
from secateur.checkpoint.fields import Family, Fields, built_family
from secateur.checkpoint.matrices import BlockMatrix
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.shapes import plain_fields
from secateur.checkpoint.skeleton import Skeleton, build_skeleton
from secateur.console import log
from secateur.errors import ModelError, RecipeError
from secateur.proof import TOLERANCE, small_logits
from secateur.recipe import Recipe
from secateur.small import SmallModel, small_model
from secateur.structure import Structure, find_all_units


def with_biases(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint with every bias that the recipe's removal may write; itself where nothing is missing.

    Raises:
        RecipeError: the family has no such bias; the sentence names a matrix and what to do.
    """
    removal, skeleton = recipe.parsed_removal(), checkpoint.skeleton
    if not removal.writes_biases:
        return checkpoint
    structure = find_all_units(skeleton.model, skeleton.blocks_name) if recipe.cut_kinds else Structure([], [])
    if not recipe.masks_weights and not any(group.kind in recipe.cut_kinds for group in structure.units):
        return checkpoint  # it has no such units, which is said where they are chosen
    missing = _missing(skeleton, structure, recipe)
    if not missing:
        return checkpoint
    fields = _switches(skeleton, missing)
    biased, names = _switched(skeleton, fields, recipe.trust_remote_code) if fields else (skeleton, frozenset[str]())
    left = _missing(biased, structure, recipe)
    if left:
        matrix = next(iter(left))
        raise RecipeError(
            f"--removal bias puts what leaves into biases, and {type(skeleton.model).__name__} has none at '{matrix}' and no "
            "switch in its config that adds one; give --removal mask, or choose units whose readers have biases"
        )
    said = ", ".join(f"{name} = {value}" for name, value in fields.items())
    log.info("The config is given biases (%s); %d tensors, zero but for what --removal bias writes.", said, len(names))
    return BiasedCheckpoint(checkpoint, biased, names)


def _missing(skeleton: Skeleton, structure: Structure, recipe: Recipe) -> dict[str, str | None]:
    """Matrices out of which inputs may leave and that have no bias, by full name -> the bias's name, if there could be one.

    Raises:
        RecipeError: no matrix loses any input.
    """
    found: dict[str, str | None] = {}
    anything = False
    for index in recipe.block_range(len(skeleton.blocks)):
        block, prefix, shapes = skeleton.blocks[index], skeleton.block_prefix(index), skeleton.block_shapes(index)
        for matrix in _losing(skeleton.prunable(index), structure, index, recipe):
            anything = True
            bias = bias_of(block, matrix)
            if bias is None or bias not in shapes:
                found[prefix + matrix.name] = prefix + bias if bias else None
    if not anything:
        raise RecipeError(
            f"no matrix of a block loses inputs when {','.join(recipe.unit)} units leave, so there is nothing for --removal "
            "bias to make good; leave it out"
        )
    return found


def _losing(
    matrices: Mapping[str, BlockMatrix], structure: Structure, index: int, recipe: Recipe
) -> Iterator[BlockMatrix]:
    """The matrices of one block whose inputs leave."""
    cut = {
        (member.parameter, member.dim)
        for group in structure.of_block(index)
        if group.kind in recipe.cut_kinds
        for member in group.members
        if member.role == "consumer"
    }
    for matrix in matrices.values():
        packed = matrix.expert is not None
        if recipe.masks_weights or (matrix.parameter, packed + (not matrix.transposed)) in cut:
            yield matrix


def _switches(skeleton: Skeleton, missing: Mapping[str, str | None]) -> Fields:
    """The fields of the config, each set to true or to its opposite, that together add what is missing, as far as any do."""
    small = small_model(skeleton, find_all_units(skeleton.model, skeleton.blocks_name))
    fields = plain_fields(small.skeleton.config)
    wanted = {bias.removeprefix(f"{skeleton.blocks_name}.").partition(".")[2] for bias in missing.values() if bias}
    chosen: Fields = {}
    for name, value in fields.items():
        if value is not None and not isinstance(value, bool):
            continue
        added = _added(small, fields | chosen, {name: not value})
        if added and any(bias.endswith(f".{own}") for own in wanted for bias in added):
            chosen[name] = not value
    return chosen


def _added(small: SmallModel, fields: Fields, switch: Fields) -> frozenset[str]:
    """The biases that ``switch`` adds to the small model with these ``fields``; none where it changes anything else."""
    plain, other = _built(small, fields), _built(small, fields | switch)
    added = added_biases(plain.shapes(), other) if plain is not None and other is not None else None
    if not added or other is None:
        return frozenset()
    state = dict(small.skeleton.model.state_dict())
    zeros = {name: torch.zeros(shape) for name, shape in other.shapes().items() if name not in state}
    try:
        other.model.load_state_dict(state | zeros, assign=True)
        other.model.tie_weights()
        expected, found = small_logits(small.skeleton), small_logits(other)
    except Exception:  # whatever the family's code says to a field that means something else
        return frozenset()
    same = expected.shape == found.shape and float((expected - found).abs().max()) <= TOLERANCE
    return added if same else frozenset()


def _built(small: SmallModel, fields: Fields) -> Skeleton | None:
    config = small.skeleton.config
    architecture = (config.architectures or [type(small.skeleton.model).__name__])[0]
    try:
        return built_family(Family("biased", type(config), architecture, fields), {})
    except Exception:  # a config class may say anything to a value it did not expect
        return None


def _switched(skeleton: Skeleton, fields: Fields, trust_remote_code: bool) -> tuple[Skeleton, frozenset[str]]:
    """The model with these fields and the biases that it has beside its own; as it was where that does not work out."""
    config: Any = copy.deepcopy(skeleton.config)
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        built = build_skeleton(config, trust_remote_code)
    except ModelError:
        return skeleton, frozenset()
    added = added_biases(skeleton.shapes(), built)
    return (built, added) if added else (skeleton, frozenset())
