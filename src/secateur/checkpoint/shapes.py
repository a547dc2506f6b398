"""The config of the pruned model: which fields say the new sizes is found by asking the family, not from a list.

Where the family's own validation refuses the sizes (Llama wants hidden_size to be a multiple of its heads), a native
class that computes the same function takes its place; where blocks differ, transformers' ``per_layer_config`` says how.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.checkpoint.skeleton import REMOTE_CLASS, build_skeleton, is_uneven
from secateur.errors import ModelError, StructureError

Shapes = Mapping[str, Sequence[int]]

NOT_CARRIED_OVER = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "per_layer_config",
    "allow_global_per_layer_attribute_access",
)


@dataclass(frozen=True)
class OutputShape:
    """The config to write, and whether plain transformers builds it (``uneven`` needs the bundled modelling file)."""

    config: Any
    architecture: str
    uneven: bool


@dataclass(frozen=True)
class _Family:
    """A class that might carry the pruned weights: its config class, its architecture and the fields it starts from.

    ``pinned`` fields must not change: narrower heads have the shapes of fewer heads, and another function.
    """

    config_class: type
    architecture: str
    fields: dict[str, Any]
    pinned: frozenset[str] = frozenset()

    def config(self, **overrides: Any) -> Any:
        config = self.config_class(**{**copy.deepcopy(self.fields), **overrides})
        config.architectures = [self.architecture]
        return config


def output_shape(
    config: Any, architecture: str, before: Sequence[Shapes], after: Sequence[Shapes], head_dim: int | None
) -> OutputShape:
    """Find a config whose blocks have the shapes ``after``.

    Args:
        config: the dense model's config.
        architecture: the dense model's class.
        before: for each block, parameter shapes of the dense model.
        after: for each block, parameter shapes after the cut.
        head_dim: the width of an attention head, where heads leave; it must not follow their number.

    Raises:
        StructureError: no native class can say these sizes.
    """
    if all(same(b, a) for b, a in zip(before, after, strict=True)):
        return OutputShape(copy.deepcopy(config), architecture, uneven=is_uneven(config))
    for family in _families(config, architecture, head_dim):
        overrides = _overrides(family, after)
        if overrides is None:
            continue
        if all(o == overrides[0] for o in overrides):
            return OutputShape(family.config(**overrides[0]), family.architecture, uneven=False)
        per_layer = {index: fields for index, fields in enumerate(overrides) if fields}
        try:
            uneven = family.config(per_layer_config=per_layer, allow_global_per_layer_attribute_access=True)
            uneven.auto_map = {"AutoModelForCausalLM": REMOTE_CLASS}
            built = build_skeleton(uneven)
        except Exception:  # this family refuses these sizes; the next may not
            continue
        if all(same(_block_shapes(block), wanted) for block, wanted in zip(built.blocks, after, strict=True)):
            return OutputShape(uneven, family.architecture, uneven=True)
    raise StructureError(
        f"no config of transformers says the sizes that this plan leaves of {architecture}; "
        "choose another --unit, or a --ratio that keeps sizes the family accepts"
    )


def same(left: Shapes, right: Shapes) -> bool:
    """Whether two blocks have the same parameter shapes."""
    return {name: tuple(shape) for name, shape in left.items()} == {name: tuple(shape) for name, shape in right.items()}


def _families(config: Any, architecture: str, head_dim: int | None) -> list[_Family]:
    """The model's own family, then native classes that compute the same when told to."""
    from transformers import GraniteConfig, MistralConfig

    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_CARRIED_OVER}
    pinned = frozenset({"head_dim"})
    if head_dim is not None:
        fields["head_dim"] = head_dim
    families = [_Family(type(config), architecture, fields, pinned)]
    if config.model_type == "llama":  # the only family known to refuse sizes that a twin accepts
        families.append(_Family(MistralConfig, "MistralForCausalLM", fields | {"sliding_window": None}, pinned))
        if head_dim is not None or getattr(config, "head_dim", None):
            scale = float(head_dim or config.head_dim) ** -0.5
            neutral = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
            families.append(
                _Family(GraniteConfig, "GraniteForCausalLM", fields | neutral | {"attention_multiplier": scale}, pinned)
            )
    return families


def _overrides(family: _Family, after: Sequence[Shapes]) -> list[dict[str, int]] | None:
    """For each block the config fields that give it its new shapes, or None where the family has none.

    They are counted from the family's plain config, whose blocks are all alike, so that a model that was uneven
    already is described anew.
    """
    try:
        plain = [_block_shapes(block) for block in build_skeleton(family.config()).blocks]
    except ModelError:
        return None
    if any(old.keys() != new.keys() for old, new in zip(plain, after, strict=True)):
        return None  # a twin without these biases
    found: list[dict[str, int]] = []
    solved: dict[tuple, dict[str, int] | None] = {}
    hint: tuple[str, ...] = ()
    for index, (old, new) in enumerate(zip(plain, after, strict=True)):
        key = tuple(sorted((name, tuple(shape)) for name, shape in new.items()))
        if key not in solved:
            solved[key] = {} if same(old, new) else _solve(family, index, old, new, hint)
        fields = solved[key]
        if fields is None:
            return None
        hint = tuple(fields) or hint
        found.append(fields)
    return found


def _solve(family: _Family, index: int, old: Shapes, new: Shapes, hint: tuple[str, ...]) -> dict[str, int] | None:
    """Change fields that may follow the changed dimensions, fewest first, until the family builds the new shapes."""
    candidates = [c for c in _candidates(family.fields, old, new) if c[0] not in family.pinned]
    choices = [dict(choice) for size in range(1, 4) for choice in itertools.combinations(candidates, size)]
    choices.sort(key=lambda choice: (tuple(choice) != hint, len(choice)))
    for choice in choices:
        try:
            built = build_skeleton(family.config(**choice))
        except (ModelError, StructureError, ValueError, TypeError, ZeroDivisionError):
            continue
        except Exception as error:  # strict configs raise their own kinds; anything but a refusal of sizes is ours
            if "validat" not in type(error).__name__.lower() and "strict" not in type(error).__name__.lower():
                raise
            continue
        if same(_block_shapes(built.blocks[index]), new):
            return choice
    return None


def _candidates(fields: Mapping[str, Any], old: Shapes, new: Shapes) -> list[tuple[str, int]]:
    """Integer fields that could have shrunk in the proportion in which some dimension has."""
    proportions = {
        (before, after) for name in new for before, after in zip(old[name], new[name], strict=True) if before != after
    }
    found = set()
    for field, value in fields.items():
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            for before, after in proportions:
                if before % value == 0 and (value * after) % before == 0:
                    found.add((field, value * after // before))
    return sorted(found)


def _block_shapes(block: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
