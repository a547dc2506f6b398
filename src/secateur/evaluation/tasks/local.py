"""Questions in a local folder: JSON Lines, one question a line, checked before any model is opened.

``label`` is the index of the right choice (of BoolQ 0 for no and 1 for yes; its own ``answer``, true or false, will do). The columns of each task and the names its file may have are in ``KNOWN``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import TaskError


@dataclass(frozen=True)
class Known:
    """A task that comes with a definition of its questions' shape.

    Attributes:
        file: its file's name without the ending.
        text: columns of text.
        choices: how many choices a question has; 0: two or more, in as many as the row has. None: no such column.
        labels: how many labels there are where no column holds the choices; 0: there is no label.
    """

    file: str
    text: tuple[str, ...]
    choices: int | None = 0
    labels: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """All that a row has to have."""
        choices = ("choices",) if self.choices is not None else ()
        return (*self.text, *choices, *(("label",) if choices or self.labels else ()))

    @property
    def files(self) -> tuple[str, ...]:
        """The names it is looked for by."""
        return f"{self.file}.jsonl", f"{self.file.rpartition('_')[0]}.jsonl"


KNOWN = {
    "boolq": Known("boolq_val", ("passage", "question"), choices=None, labels=2),
    "piqa": Known("piqa_val", ("goal",), choices=2),
    "hellaswag": Known("hellaswag_val", ("ctx",), choices=4),
    "winogrande": Known("winogrande_val", ("sentence",), choices=2),
    "arc_easy": Known("arc_easy_test", ("question",)),
    "arc_challenge": Known("arc_challenge_test", ("question",)),
    "openbookqa": Known("openbookqa_test", ("question",)),
    "lambada_openai": Known("lambada_test", ("text",), choices=None),
}

DEFINITIONS = Path(__file__).parent / "definitions"
"""The lm-eval task files of ``KNOWN``. ``lm_eval --include_path DEFINITIONS --metadata '{"tasks_dir": "FOLDER"}'`` reads them too."""


def dataset(task: str, tasks_dir: str | None = None, **metadata: Any) -> dict[str, Any]:
    """What a definition names as its data set: the questions of ``task`` in the folder ``tasks_dir``, as split ``test``.

    Args:
        metadata: whatever else lm-eval hands over; not looked at.

    Raises:
        TaskError: the file is not there or is damaged, or a row is not of the task's shape.
    """
    from datasets import Dataset

    if tasks_dir is None:
        raise TaskError(
            f"the questions of '{task}' are read from a folder; name it with --metadata '{{\"tasks_dir\": \"FOLDER\"}}'"
        )
    return {"test": Dataset.from_list(questions(task, Path(tasks_dir)))}


def file_of(task: str, folder: Path) -> Path | None:
    """Where the questions of ``task`` are in ``folder``; None: nowhere."""
    return next((folder / name for name in KNOWN[task].files if (folder / name).is_file()), None)


def questions(task: str, folder: Path) -> list[dict[str, Any]]:
    """All rows of a known task, each with the task's columns and no others.

    Raises:
        TaskError: as ``dataset``.
    """
    known, file = KNOWN[task], file_of(task, folder)
    if file is None:
        raise TaskError(f"{folder} has no questions of '{task}'; it has to hold {' or '.join(known.files)}")
    rows = [_checked(row, task, f"{file}, line {number}") for number, row in _rows(file)]
    if not rows:
        raise TaskError(f"{file} holds no questions; each is a line of JSON with {_listed(known.columns)}")
    return rows


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise TaskError(f"{file} cannot be read: {error.strerror}; name a folder with readable files") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise TaskError(f"{file}, line {number} is not UTF-8; save the file as UTF-8") from error
        except (ValueError, RecursionError) as error:
            last = not any(rest.strip() for rest in lines[number:])
            advice = "the file looks cut off, get it again" if last else "mend or remove that line"
            raise TaskError(f"{file}, line {number} is not whole JSON; {advice}") from error


def _checked(row: Any, task: str, where: str) -> dict[str, Any]:
    known = KNOWN[task]
    if not isinstance(row, dict):
        raise TaskError(f"{where} is not an object with the columns of '{task}': {_listed(known.columns)}")
    if task == "boolq" and "label" not in row and isinstance(row.get("answer"), bool):
        row = row | {"label": int(row["answer"])}  # as the data set itself says it
    missing = [column for column in known.columns if column not in row]
    if missing:
        raise TaskError(
            f"{where} has no {_listed(missing)}; a question of '{task}' has {_listed(known.columns)}, "
            f"and this one {_listed(list(row)) or 'nothing'}"
        )
    for column in known.text:
        if not isinstance(row[column], str) or not row[column].strip():
            raise TaskError(f"{where} has a '{column}' that is not text; it has to be a string that is not empty")
    if task == "winogrande" and "_" not in row["sentence"]:
        raise TaskError(f"{where} has a 'sentence' without a gap; '_' has to stand where the choices go")
    if task == "lambada_openai" and " " not in row["text"].strip():
        raise TaskError(f"{where} has a 'text' of one word; its last word is predicted from those before")
    labels = known.labels if known.choices is None else _count_choices(row["choices"], known, where)
    if labels:
        _check_label(row["label"], labels, where)
    return {column: row[column] for column in known.columns}


def _count_choices(choices: Any, known: Known, where: str) -> int:
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise TaskError(f"{where} has 'choices' that are not a list of strings, none of them empty")
    if len(choices) != known.choices if known.choices else len(choices) < 2:
        raise TaskError(f"{where} has {len(choices)} choices; there have to be {known.choices or 'two or more'}")
    return len(choices)


def _check_label(label: Any, count: int, where: str) -> None:
    if isinstance(label, bool) or not isinstance(label, int):
        raise TaskError(f"{where} has the label {label!r}; it has to be the index of the right choice, from 0")
    if not 0 <= label < count:
        raise TaskError(f"{where} has the label {label}, and choices from 0 to {count - 1}")


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names)
