"""Which fields of a family's config say given sizes: found by building the family without weights, not from a list."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.checkpoint.carving import Sizes
from secateur.checkpoint.skeleton import Skeleton, build_skeleton
from secateur.errors import ModelError, StructureError

Shapes = Mapping[str, Sequence[int]]
Fields = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A class that might carry the pruned weights: its config class, its architecture and the fields it starts from.

    ``pinned`` fields must not change: narrower heads have the shapes of fewer heads, and another function.
    """

    form: str
    config_class: type
    architecture: str
    fields: Fields
    pinned: frozenset[str] = frozenset()

    def config(self, **overrides: Any) -> Any:
        config = self.config_class(**{**copy.deepcopy(self.fields), **overrides})
        config.architectures = [self.architecture]
        return config


def same(left: Shapes, right: Shapes) -> bool:
    """Whether two sets of tensors have the same names and shapes."""
    return {name: tuple(shape) for name, shape in left.items()} == {name: tuple(shape) for name, shape in right.items()}


def joined(overrides: Sequence[Fields]) -> Fields | None:
    """One set of fields for all blocks, or None where blocks want different values of one."""
    joined: Fields = {}
    for fields in overrides:
        for name, value in fields.items():
            if joined.setdefault(name, value) != value:
                return None
    return joined


def built_family(family: Family, overrides: Fields) -> Skeleton | None:
    """The family's skeleton with these fields, or None where it refuses them."""
    try:
        return build_skeleton(family.config(**overrides))
    except (ModelError, StructureError, ValueError, TypeError, ZeroDivisionError):
        return None
    except Exception as error:  # strict configs raise their own kinds; anything but a refusal of sizes is ours
        if "validat" not in type(error).__name__.lower() and "strict" not in type(error).__name__.lower():
            raise
        return None


def overrides_by_block(family: Family, plain: Skeleton, wanted: Shapes, sizes: Sequence[Sizes]) -> list[Fields] | None:
    """For each block the fields that give it its new shapes, or None where the family has none.

    They are counted from the family's plain config, whose blocks are all alike, so that a model that was uneven
    already is described anew.
    """
    found: list[Fields] = []
    solved: dict[tuple, Fields | None] = {}
    hint: tuple[str, ...] = ()
    for index in range(len(plain.blocks)):
        prefix = plain.block_prefix(index)
        old = plain.block_shapes(index)
        new = {name: tuple(wanted[prefix + name]) for name in old}
        key = (tuple(sorted(old.items())), tuple(sorted(new.items())))
        if key not in solved:
            solved[key] = {} if old == new else _solve(family, index, old, new, sizes[index], hint)
        fields = solved[key]
        if fields is None:
            return None
        hint = tuple(fields) or hint
        found.append(fields)
    return found


def _solve(family: Family, index: int, old: Shapes, new: Shapes, sizes: Sizes, hint: tuple[str, ...]) -> Fields | None:
    """Change fields that may follow the changed dimensions until the family builds the new shapes.

    First all fields at once that equal a size which changes, as nearly always is right; then the fewest that do.
    """
    known = [
        {name: after for name, value in family.fields.items() for before, after in pairs if value == before}
        for pairs in (list(sizes.values()), list(sizes.values())[::-1])
    ]
    known = [{name: value for name, value in choice.items() if name not in family.pinned} for choice in known]
    for choice in known:
        if _builds(family, choice, index, new):
            return _fewest(family, choice, index, new)
    candidates = set(_candidates(family.fields, old, new)) | {pair for choice in known for pair in choice.items()}
    chosen = [c for c in sorted(candidates) if c[0] not in family.pinned]
    chosen = [(name, value) for name, value in chosen if _matters(family, name, value, index, old)]
    choices = [
        dict(choice)
        for size in range(1, min(len(chosen), MOST_FIELDS) + 1)
        for choice in itertools.combinations(chosen, size)
        if len({name for name, _ in choice}) == size
    ]
    choices.sort(key=lambda choice: (tuple(choice) != hint, len(choice)))
    return next((choice for choice in choices if _builds(family, choice, index, new)), None)


def _builds(family: Family, choice: Fields, index: int, new: Shapes) -> bool:
    built = built_family(family, choice)
    return built is not None and index < len(built.blocks) and same(built.block_shapes(index), new)


def _fewest(family: Family, choice: Fields, index: int, new: Shapes) -> Fields:
    """``choice`` without the fields that only happen to equal a size, such as a token's number."""
    for name in list(choice):
        fewer = {key: value for key, value in choice.items() if key != name}
        if _builds(family, fewer, index, new):
            choice = fewer
    return choice


MOST_FIELDS = 5
"""How many fields one change of sizes may take: heads, KV heads, channels, hidden and experts."""


def _matters(family: Family, name: str, value: int, index: int, old: Shapes) -> bool:
    """Whether a field may have to do with the block's sizes: it changes them, or cannot change alone."""
    built = built_family(family, {name: value})
    return built is None or (index < len(built.blocks) and not same(built.block_shapes(index), old))


def _candidates(fields: Fields, old: Shapes, new: Shapes) -> list[tuple[str, int]]:
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
