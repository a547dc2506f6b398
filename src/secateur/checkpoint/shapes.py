"""The config of the pruned model: which fields say the new sizes is found by asking the family, not from a list.

There are four forms, tried in this order: the family's own config; a native class that computes the same function, where
the family's own validation refuses the sizes (Llama wants hidden_size to be a multiple of its heads); transformers'
``per_layer_config`` where blocks differ; and ``carved`` (see ``uneven.py``) where no field says it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.checkpoint.architecture import automatic_class
from secateur.checkpoint.carved import record_of
from secateur.checkpoint.carving import Assignment, Sizes, assignments, carved_record, changed_sizes
from secateur.checkpoint.depth import block_signature, fields_without_blocks
from secateur.checkpoint.fields import Family, Fields, Shapes, built_family, joined, overrides_by_block, same
from secateur.checkpoint.skeleton import REMOTE_CLASS, Skeleton, build_skeleton, is_uneven
from secateur.errors import ModelError, StructureError
from secateur.structure.cutting import ModelCut
from secateur.structure.units import Structure

NOT_CARRIED_OVER = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "per_layer_config",
    "carved",
    "allow_global_per_layer_attribute_access",
)


@dataclass(frozen=True)
class OutputShape:
    """The config to write.

    Attributes:
        config: of the pruned model.
        architecture: the class of transformers that it is for.
        uneven: whether it needs the bundled modelling file.
        form: ``own``, the name of a native twin class, ``per layer`` or ``carved``.
    """

    config: Any
    architecture: str
    uneven: bool
    form: str


def output_shape(
    skeleton: Skeleton,
    cut: ModelCut,
    structure: Structure,
    accept: Callable[[str], bool] = lambda form: True,
    assignment: Assignment | None = None,
) -> OutputShape:
    """Find a config that says the sizes which ``cut`` leaves of ``skeleton``.

    Args:
        structure: all units of the model.
        accept: whether a form (see ``OutputShape``) may be used; a proof knows which compute the right function.
        assignment: for the carved form, which attributes say sizes; None reads all that may as such.

    Raises:
        StructureError: no form can say these sizes.
    """
    for found in native_shapes(skeleton, cut, structure):
        if accept(found.form):
            return found
    reading = assignment if assignment is not None else next(assignments(skeleton, cut, structure))
    for found in carved_shapes(skeleton, cut, structure, reading):
        if accept(found.form):
            return found
    raise StructureError(
        f"no config of transformers says the sizes that this plan leaves of {_architecture(skeleton)}; "
        "choose another --unit, or a --ratio that keeps sizes the family accepts"
    )


def native_shapes(skeleton: Skeleton, cut: ModelCut, structure: Structure) -> Iterator[OutputShape]:
    """Every form that says the sizes with transformers' own fields, best first."""
    config, architecture = skeleton.config, _architecture(skeleton)
    wanted = _wanted(skeleton, cut)
    if wanted == _wanted(skeleton, ModelCut(((),) * len(cut.blocks))):
        form = "own" if not is_uneven(config) else "per layer" if is_per_layer(config) else "carved"
        yield OutputShape(copy.deepcopy(config), architecture, is_uneven(config), form)
    elif not record_of(config):
        signatures = [block_signature(skeleton.blocks[index]) for index in cut.kept()]
        fields = fields_without_blocks(skeleton, cut, plain_fields(config))
        sizes = [changed_sizes(cut.blocks[index], structure.of_block(index)) for index in cut.kept()]
        for family in _families(config, architecture, fields, _head_width(cut, structure)):
            yield from _native(family, wanted, signatures, sizes)


def carved_shapes(
    skeleton: Skeleton, cut: ModelCut, structure: Structure, assignment: Assignment
) -> Iterator[OutputShape]:
    """The carved form with this reading of attributes, where it can say the sizes."""
    wanted = _wanted(skeleton, cut)
    if is_per_layer(skeleton.config) or wanted == _wanted(skeleton, ModelCut(((),) * len(cut.blocks))):
        return
    fields = fields_without_blocks(skeleton, cut, plain_fields(skeleton.config))
    family = Family("carved", type(skeleton.config), _architecture(skeleton), fields)
    plain = built_family(family, {})
    record = carved_record(skeleton, plain, cut, structure, wanted, assignment) if plain is not None else None
    if record is None:
        return
    config = family.config(carved=record)
    config.auto_map = {automatic_class(config): REMOTE_CLASS}
    try:
        built = build_skeleton(config)
    except ModelError:  # this reading takes something for a size that is none in another block
        return
    if same(built.shapes(), wanted):
        yield OutputShape(config, family.architecture, uneven=True, form="carved")


def _wanted(skeleton: Skeleton, cut: ModelCut) -> dict[str, tuple[int, ...]]:
    return cut.shapes({name: tuple(shape) for name, shape in skeleton.shapes().items()}, skeleton.blocks_name)


def is_per_layer(config: Any) -> bool:
    """Whether ``config`` gives single layers sizes of their own."""
    return bool(config.to_dict().get("per_layer_config"))


def _architecture(skeleton: Skeleton) -> str:
    """The family's class; an uneven model's own class is made on the fly, its config names the family's."""
    return (skeleton.config.architectures or [""])[0] if is_uneven(skeleton.config) else type(skeleton.model).__name__


def _head_width(cut: ModelCut, structure: Structure) -> int | None:
    """The width of an attention head, where heads or hidden channels leave: it must not follow their number."""
    kinds = {group.kind for removals in cut.blocks for group, removed in removals if len(removed)}
    heads = [group for group in structure.units if group.kind in ("head", "query")]
    widths = [min(member.index_UC.shape[1] for member in group.members) for group in heads]
    return min(widths, default=None) if kinds & {"head", "query", "hidden"} else None


def plain_fields(config: Any) -> Fields:
    return {key: value for key, value in config.to_dict().items() if key not in NOT_CARRIED_OVER}


def _families(config: Any, architecture: str, fields: Fields, head_dim: int | None) -> list[Family]:
    """The model's own family, then native classes that compute the same when told to."""
    from transformers import GraniteConfig, MistralConfig

    if head_dim is not None and "head_dim" not in fields and hasattr(config, "head_dim"):
        head_dim = None  # the family computes it from others
    if head_dim is not None and fields.get("head_dim") is None:
        fields = fields | {"head_dim": head_dim}
    pinned = frozenset({"head_dim"})
    families = [Family("own", type(config), architecture, fields, pinned)]
    if config.model_type == "llama":  # the only family known to refuse sizes that a twin accepts
        width = fields.get("head_dim") or config.head_dim
        twin = fields | {"head_dim": width}
        mistral = twin | {"sliding_window": None}
        families.append(Family("MistralForCausalLM", MistralConfig, "MistralForCausalLM", mistral, pinned))
        neutral = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
        granite = twin | neutral | {"attention_multiplier": float(width) ** -0.5}
        families.append(Family("GraniteForCausalLM", GraniteConfig, "GraniteForCausalLM", granite, pinned))
    return families


def _native(family: Family, wanted: Shapes, signatures: Sequence[Any], sizes: Sequence[Sizes]) -> Iterator[OutputShape]:
    """The form with the family's own fields, then the one with ``per_layer_config``."""
    plain = built_family(family, {})
    if plain is None or plain.shapes().keys() != wanted.keys():
        return  # a twin without these biases
    asked = overrides_by_block(family, plain, wanted, sizes)
    if asked is None:
        return
    together = joined(asked)
    if together is not None:
        built = built_family(family, together)
        if built is not None and same(built.shapes(), wanted) and _alike(built, signatures, family):
            yield OutputShape(family.config(**together), family.architecture, uneven=False, form=family.form)
    common = {name: value for name, value in asked[0].items() if all(fields.get(name) == value for fields in asked)}
    own = [{name: value for name, value in fields.items() if name not in common} for fields in asked]
    per_layer = {index: fields for index, fields in enumerate(own) if fields}
    if not per_layer:
        return
    try:
        uneven = family.config(**common, per_layer_config=per_layer, allow_global_per_layer_attribute_access=True)
        uneven.auto_map = {automatic_class(uneven): REMOTE_CLASS}
        built = build_skeleton(uneven)
    except Exception:  # this family refuses these sizes; another form may not
        return
    if same(built.shapes(), wanted) and _alike(built, signatures, family):
        yield OutputShape(uneven, family.architecture, uneven=True, form="per layer")


def _alike(built: Skeleton, signatures: Sequence[Any], family: Family) -> bool:
    """Whether the blocks behave as those that were kept: a family may treat blocks differently by their number."""
    if family.form != "own":
        return len(built.blocks) == len(signatures)  # a twin's modules have other names; the proof judges it
    return [block_signature(block) for block in built.blocks] == list(signatures)
