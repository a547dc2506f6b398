"""Task files of the user's own, lm-eval YAML in the folder named by ``--tasks-dir``: read before lm-eval reads them.

lm-eval passes over files that it cannot read, and runs the Python code that others name; here the first are refused by
file and line, and the second unless remote code is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from secateur.errors import TaskError, reason_of

CODE_TAG, CODE_KEYS = "!function", ("class",)


def task_files(folder: Path) -> dict[str, Path]:
    """The names that the folder's YAML files give to tasks, groups and tags, and the file of each.

    Raises:
        TaskError: a file is not YAML, or not a task's.
    """
    named: dict[str, Path] = {}
    for file in sorted(folder.rglob("*.yaml")):
        root = _root(file)
        if not isinstance(root, yaml.MappingNode):
            raise TaskError(f"{file} is not a task file of lm-eval: it has to be a YAML mapping with 'task' or 'group'")
        for name in (*_strings(root, "group"), *_strings(root, "task"), *_strings(root, "tag")):
            named.setdefault(name, file)
    return named


def refuse_code(file: Path, seen: frozenset[Path] = frozenset()) -> None:
    """Refuse a task file that names Python code, itself or in a file that it includes.

    Raises:
        TaskError: it does, or an included file cannot be read.
    """
    root = _root(file)
    for node in _nodes(root):
        if node.tag == CODE_TAG or (isinstance(node, yaml.MappingNode) and any(_strings(node, k) for k in CODE_KEYS)):
            raise TaskError(
                f"{file}, line {node.start_mark.line + 1} names Python code, which would run here; "
                "read it, and give --trust-remote-code if that is wanted"
            )
    if isinstance(root, yaml.MappingNode):
        for name in _strings(root, "include"):
            included = (file.parent / name).resolve()
            if included not in seen:
                refuse_code(included, seen | {included})


def _root(file: Path) -> yaml.Node | None:
    try:
        return yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise TaskError(f"{file}{where} is not YAML: {reason_of(Exception(error.problem or error.context))}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise TaskError(f"{file} is not YAML: {reason_of(error)}") from error
    except OSError as error:
        raise TaskError(f"{file} cannot be read: {error.strerror}; check that it is there") from error


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if node is None:
        return
    yield node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _nodes(key)
            yield from _nodes(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _nodes(item)


def _strings(root: yaml.MappingNode, key: str) -> list[str]:
    """The string, or the strings of the list, that ``key`` has."""
    found: list[str] = []
    for name, value in root.value:
        if isinstance(name, yaml.ScalarNode) and name.value == key:
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            found += [node.value for node in nodes if isinstance(node, yaml.ScalarNode)]
    return found
