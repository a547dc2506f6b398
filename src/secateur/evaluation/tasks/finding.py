"""Tasks by name: lm-eval's own, those that a folder's JSON Lines are the questions of, and the user's own task files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.console import log
from secateur.errors import RecipeError, TaskError, reason_of
from secateur.evaluation.tasks.local import DEFINITIONS, KNOWN, file_of
from secateur.evaluation.tasks.own import refuse_code, task_files
from secateur.evaluation.tasks.quiet import quiet

ALIASES = {"lambada": "lambada_openai"}
"""What the field calls LAMBADA is one of the two tasks that lm-eval knows under that name."""

MOST_SUGGESTIONS = 3


def chosen_tasks(tasks: str | Sequence[str]) -> list[str]:
    """Names in the order given, each once.

    Args:
        tasks: names, or names with commas between.

    Raises:
        RecipeError: there are none.
    """
    given = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [ALIASES.get(name.strip(), name.strip()) for name in given if name.strip()]
    if not names:
        raise RecipeError(f"--tasks names no task; give some of {', '.join(KNOWN)}, with commas between")
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Tasks:
    """Tasks with their questions in memory, ready to be put to any number of models.

    Attributes:
        names: as they are reported: a group's own name, a tag's tasks.
        objects: lm-eval's.
        manager: lm-eval's index of the tasks there are; reading it takes long, so it is read once.
        source: where the questions come from, for people.
        trusted: whether code that comes with the tasks may run.
    """

    names: list[str]
    objects: list[Any]
    manager: Any
    source: str
    trusted: bool = False


def open_tasks(names: Sequence[str], folder: Path | None = None, trust_remote_code: bool = False) -> Tasks:
    """Find the tasks and read their questions, so that whatever is wrong with them is known before a model is opened.

    Args:
        folder: local questions and task files; None: lm-eval's own tasks, from the hub or its cache.
        trust_remote_code: run code that the folder's task files name.

    Raises:
        TaskError: a task is unknown, or its questions cannot be had or are damaged.
    """
    if folder is not None:
        own = _own_tasks(names, folder, trust_remote_code)
    with quiet(trust_remote_code):
        from lm_eval.tasks import TaskManager

        log.info("Reading the questions of %s.", ", ".join(names))
        if folder is None:
            manager = TaskManager()
        else:
            # Later folders win over earlier ones.
            manager = TaskManager(
                include_path=[DEFINITIONS, folder], include_defaults=False, metadata={"tasks_dir": str(folder)}
            )
        found, objects = [], []
        for name in names:
            if name not in manager.task_index:
                raise TaskError(f"there is no task '{name}'{_suggested(name, manager.all_tasks)}")
            loaded = _loaded(manager, name, folder, local=folder is not None and name not in own)
            groups = loaded.get("groups") or {}
            inside = {child for children in (loaded.get("group_map") or {}).values() for child in children}
            roots = {group: obj for group, obj in groups.items() if group not in inside}
            roots |= {task: obj for task, obj in loaded["tasks"].items() if task not in inside}
            found += list(roots)
            objects += list(roots.values())
    return Tasks(
        found, objects, manager, str(folder) if folder is not None else "the hub's data sets", trust_remote_code
    )


def _own_tasks(names: Sequence[str], folder: Path, trusted: bool) -> dict[str, Path]:
    if not folder.is_dir():
        raise TaskError(f"there is no folder {folder}; name one with questions, or leave --tasks-dir out")
    own = task_files(folder)
    for name in names:
        if name in own:
            continue
        if name not in KNOWN:
            raise TaskError(f"{folder} has no task '{name}'{_suggested(name, [*own, *_there(folder)])}")
        if file_of(name, folder) is None:
            there = _there(folder)
            has = f"; it has {', '.join(there)}" if there else ""
            raise TaskError(f"{folder} has no questions of '{name}', {' or '.join(KNOWN[name].files)}{has}")
    # A group or tag may reach any of the folder's files.
    for file in sorted(set(own.values())) if any(name in own for name in names) and not trusted else ():
        refuse_code(file)
    return own


def _there(folder: Path) -> list[str]:
    return [name for name in KNOWN if file_of(name, folder) is not None]


def _suggested(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=MOST_SUGGESTIONS, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return (
        f"; for example there are {', '.join(list(KNOWN)[:MOST_SUGGESTIONS])}"
        if len(known) > len(KNOWN)
        else (f"; it has {', '.join(known)}" if known else "; it has none")
    )


def _loaded(manager: Any, name: str, folder: Path | None, local: bool) -> Any:
    try:
        return manager.load([name])
    except TaskError:
        raise
    except Exception as error:  # data sets, templates and task files fail in as many ways as there are of them
        where = f" as {manager.task_index[name].yaml_path} says" if folder is not None else ""
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and not local:
            advice = "HF_HUB_OFFLINE is set and they may not be in the cache: give --tasks-dir FOLDER, or go online"
        elif folder is None:
            advice = "check the connection, or give --tasks-dir FOLDER with questions of your own"
        else:
            advice = "mend that file or what it names"
        raise TaskError(f"the questions of '{name}' cannot be had{where} ({reason_of(error)}); {advice}") from error
