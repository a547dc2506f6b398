"""``name:option=value,...``: how criteria, allocations and removals are named, and how their options ride on the name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.errors import RecipeError, suggest


class Options(BaseModel):
    """Base of all options: unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Named:
    """Something that is called by its name and takes options.

    Attributes:
        name: how users call it.
        flag: the flag that it is given to, for messages.
        options_type: the options that ride on the name.
    """

    name: ClassVar[str]
    flag: ClassVar[str]
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, options: Options | None = None) -> None:
        self.options: Any = options if options is not None else self.options_type()

    def __str__(self) -> str:
        given = {key: value for key, value in self.options.model_dump().items() if value != ""}
        chosen = ",".join(f"{key}={_text(value)}" for key, value in given.items())
        return f"{self.name}:{chosen}" if chosen else self.name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


Kind = TypeVar("Kind", bound=Named)


def parse_named(text: str, known: Mapping[str, type[Kind]], also: tuple[str, ...] = ()) -> Kind:
    """Read ``"name:option=value,option=value"``.

    Args:
        also: names that are known and read elsewhere, for the suggestion.

    Raises:
        RecipeError: unknown name, option or value; the nearest known one is suggested.
    """
    flag = next(iter(known.values())).flag
    name, _, rest = text.strip().partition(":")
    if name in also:
        raise RecipeError(f"the {flag} {name} has no options; leave ':{rest}' out")
    if name not in known:
        raise RecipeError(f"there is no {flag} '{name}'{suggest(name, [*also, *known])}")
    kind = known[name]
    given: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise RecipeError(f"'{part}' in --{flag} {text} is not of the form option=value")
        if key not in kind.options_type.model_fields:
            fields = kind.options_type.model_fields
            there = suggest(key, fields) if fields else " (it has none)"
            raise RecipeError(f"the {flag} {name} has no option '{key}'{there}")
        if key in given:
            raise RecipeError(f"--{flag} {text} gives the option '{key}' twice")
        given[key] = value
    try:
        return kind(kind.options_type(**given))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(
            f"the option {name}:{'.'.join(map(str, first['loc']))} cannot be '{first['input']}': {first['msg'].lower()}"
        ) from error
