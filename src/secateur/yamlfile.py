"""Reading a recipe's YAML as people mean it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from secateur.errors import RecipeError, reason_of


class _PlainNumbers(yaml.SafeLoader):
    """YAML 1.1 reads 4:30 and 2:4 as numbers to the base of sixty; here they are what they look like.

    A key that stands twice is an error: the library would take the last without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"'{key.value}' stands there twice", key.start_mark)
            seen.add(str(key.value))
        return dict(super().construct_mapping(node, deep))


_PlainNumbers.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainNumbers.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_PlainNumbers.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in ``file``.

    Raises:
        RecipeError: it cannot be read, or is something else.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_PlainNumbers)
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe at {file}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{file} is not readable YAML: {reason_of(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file} is not a recipe: it has to be a YAML mapping of fields such as 'model: smollm2'")
    return content
