"""What is compared: recipes with short names, made to agree on the calibration text they share.

A recipe is a YAML file, or a few words: ``wanda``, ``"gblm:norm=l2 unit=2:4"``, ``"criterion=taylor ratio=0.3"``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.console import log
from secateur.criteria.random import Random
from secateur.errors import RecipeError
from secateur.recipe import Recipe, recipe_from
from secateur.statistics import gradient_kinds
from secateur.yamlfile import read_yaml

SHARED = ("calibration", "windows", "window_length", "seed")
"""Fields that have to be the same in all recipes: a comparison on different text would compare the text."""

RECIPE_SUFFIXES = (".yaml", ".yml")

LONGEST_NAME = 80
"""Characters of a folder's name; a longer one ends in a digest."""


@dataclass(frozen=True)
class Entry:
    """One recipe of a comparison.

    Attributes:
        name: a file's stem, or the words as given.
        recipe: complete, with the model and everything shared filled in.
    """

    name: str
    recipe: Recipe

    @property
    def folder_name(self) -> str:
        """The name as that of a folder."""
        plain = re.sub(r"[^\w.,=+-]+", "_", self.name).strip("._") or "recipe"
        if len(plain) <= LONGEST_NAME:
            return plain
        return f"{plain[: LONGEST_NAME - 9]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    def depends_on_seed(self, windows_are_drawn: bool) -> bool:
        """Whether another seed can give another plan: by random scores or directions, or by other windows."""
        criterion = self.recipe.parsed_criterion()
        drawn = windows_are_drawn and self.recipe.reads_text
        return drawn or isinstance(criterion, Random) or self.recipe.gradient == "forward"

    def measures(self, blocks: int) -> tuple[Any, ...]:
        """What it measures, as a key by which recipes are sorted, so that those that share stand together.

        Among these the one that measures most of the ``blocks`` comes first: the others then find all they need.
        """
        recipe, needs = self.recipe, self.recipe.needs()
        gradients = sorted(kind.name for kind in gradient_kinds(needs))
        names = sorted(kind.name for kind in needs)
        try:
            pruned = len(recipe.block_range(blocks))
        except RecipeError:  # it fails by itself, and says why
            pruned = 0
        scored = (recipe.criterion, recipe.masks_weights, recipe.cut_kinds)
        return (
            gradients,
            str(recipe.gradient),
            str(recipe.propagate),
            names,
            -pruned,
            *scored,
        )


def read_entries(model: str, recipes: Sequence[str | Path], given: Mapping[str, Any]) -> list[Entry]:
    """The recipes of a comparison, each for ``model``.

    Args:
        recipes: YAML files, or words.
        given: fields that hold for all of them, whatever they say; None where a recipe's own holds.

    Raises:
        RecipeError: there are none, one cannot be read, is for another model, two have one name, or they disagree on a
            field that has to be shared.
    """
    if not recipes:
        raise RecipeError("there is nothing to compare; name recipes with --recipes, for example --recipes wanda gblm")
    fields = {}
    for text in map(str, recipes):
        name, content = _read(text)
        if name in fields:
            raise RecipeError(f"two recipes are called '{name}'; rename one of the files, or leave one out")
        fields[name] = _for_model(name, content, model)
    shared = _agreed(fields, given)
    entries = [_entry(name, content | shared) for name, content in fields.items()]
    _check_folders(entries)
    return entries


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """A recipe's name, and the fields it gives."""
    if text.startswith("-"):  # what follows --recipes is its first recipe, whatever it looks like
        raise RecipeError(f"--recipes names no recipe before {text}; give some, for example --recipes wanda gblm")
    path = Path(text).expanduser()
    if path.suffix.lower() in RECIPE_SUFFIXES or path.is_file():
        return path.stem, read_yaml(path)
    words = text.split()
    if not words:
        raise RecipeError(
            "a recipe is empty; give a YAML file, a criterion such as wanda, or words such as 'gblm unit=2:4'"
        )
    content: dict[str, Any] = {}
    for place, word in enumerate(words):
        field, equals, value = word.partition("=")
        if place == 0 and (not equals or ":" in field):  # a criterion's own options have equals signs too
            field, equals, value = "criterion", "=", word
        if not equals or not value:
            raise RecipeError(f"'{word}' in the recipe '{text}' is not of the form field=value, such as unit=2:4")
        field = field.replace("-", "_")
        if field in content:
            raise RecipeError(f"the recipe '{text}' gives '{field}' twice; leave one out")
        content[field] = value
    return " ".join(words), content


def _for_model(name: str, content: dict[str, Any], model: str) -> dict[str, Any]:
    named = content.get("model", model)
    if named != model and not _same_place(str(named), model):
        raise RecipeError(f"the recipe '{name}' is for the model {named}, not for {model}; leave its model out")
    return content | {"model": model}


def _same_place(one: str, other: str) -> bool:
    return Path(one).exists() and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _agreed(fields: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for all: what is given, and of the shared fields what every recipe says that says any.

    Raises:
        RecipeError: two recipes say different things.
    """
    agreed = {field: value for field, value in given.items() if value is not None}
    for name, content in fields.items():
        for field in sorted(agreed.keys() & content.keys()):
            if content[field] is not None and str(content[field]) != str(agreed[field]):
                log.info("'%s' says %s %s; here it is %s for all.", name, field, content[field], agreed[field])
    for field in SHARED:
        if field in agreed:
            continue
        said = [(name, content[field]) for name, content in fields.items() if content.get(field) is not None]
        other = next((entry for entry in said if str(entry[1]) != str(said[0][1])), None)
        if other is not None:
            flag = f"--{field.replace('_', '-')}"
            raise RecipeError(
                f"'{said[0][0]}' says {flag} {said[0][1]} and '{other[0]}' says {other[1]}; a comparison has to be on the same "
                f"windows, so give {flag} for all"
            )
        if said:
            agreed[field] = said[0][1]
    return agreed


def _entry(name: str, content: Mapping[str, Any]) -> Entry:
    try:
        return Entry(name, recipe_from(**content))
    except RecipeError as error:
        raise RecipeError(f"the recipe '{name}' cannot be used: {error}") from error
    except TypeError as error:  # a YAML key that is no word
        raise RecipeError(f"the recipe '{name}' has a field that is no word; see secateur plan --help") from error


def _check_folders(entries: Sequence[Entry]) -> None:
    taken: dict[str, str] = {}
    for entry in entries:
        place = entry.folder_name.casefold()  # some disks take both for one
        if place in taken:
            raise RecipeError(
                f"the recipes '{taken[place]}' and '{entry.name}' would lie in one folder '{entry.folder_name}'; "
                "write one into a file of another name"
            )
        taken[place] = entry.name
