"""The folder of a comparison: one run at a time works in it, and what earlier ones have finished is used again.

``recipes/NAME/`` holds one recipe: ``recipe.yaml``, ``plan.json`` with its masks, ``log.txt``, and ``result.json``, which
says whose they are and grows with what is known: first the plan, then the figures. Other seeds lie in ``seed-S/`` below.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import OutputError
from secateur.files import full_disk_is_an_error, remove_temporaries, write_json
from secateur.lock import FolderLock
from secateur.plans import PLAN_FILE
from secateur.resuming import differences, in_words

RESULT, RECIPE, CHILD_LOG = "result.json", "recipe.yaml", "log.txt"
RECIPES, CALIBRATION, SCRATCH = "recipes", "calibration", "scratch"
COMPARISON, STARTED, DENSE, LOCK = "compare.json", "comparison.json", "dense.json", ".lock"
TABLES = ("compare.csv", "compare.md")
PAGE = "report.html"
OURS = (RECIPES, CALIBRATION, SCRATCH, COMPARISON, STARTED, DENSE, LOCK, PAGE, *TABLES)
"""Everything that a comparison writes; a folder with anything else in it is somebody's."""


class RunFolder:
    """What is kept of one recipe with one seed.

    Args:
        identity: what its plan depends on.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, name
        self.identity = json.loads(json.dumps(identity))
        self.record: dict[str, Any] = {}

    @property
    def plan_file(self) -> Path:
        return self.folder / PLAN_FILE

    def open(self) -> None:
        """Take up what earlier runs have left here; what was not finished, and belongs to another recipe, goes.

        Raises:
            OutputError: another recipe of the same name was finished here.
        """
        found = read_json(self.folder / RESULT)
        others = differences(found.get("identity", {}), self.identity)
        if found and others and "planning" in found:
            raise OutputError(
                f"{self.folder} holds the result of a recipe with {in_words(others)}; give another --out, rename the "
                "recipe, or --overwrite to start over"
            )
        if not found or others:
            self._remove_files()
            found = {}
        remove_temporaries(self.folder)
        self.record = {"identity": self.identity, **{key: found[key] for key in found if key != "identity"}}

    def note(self, **fields: Any) -> None:
        """Keep ``fields`` beside what is known."""
        self.record |= fields
        write_json(self.folder / RESULT, self.record, durable=True)

    def forget(self, *fields: str) -> None:
        """Drop what is to be found out anew."""
        for field in fields:
            self.record.pop(field, None)

    def _remove_files(self) -> None:
        for item in self.folder.glob("*") if self.folder.is_dir() else ():
            if item.is_file():  # not the folders of other seeds
                item.unlink()


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in ``file``; nothing where there is none or it is damaged, so that it is made again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def comparison_folder(out: Path, identity: Mapping[str, Any], overwrite: bool) -> Iterator[Path]:
    """Hold ``out`` for one comparison; what an earlier one of the same ``identity`` has finished stays in it.

    Raises:
        OutputError: it holds something else, cannot be written, or another comparison is writing it.
    """
    before = check_folder(out, identity, overwrite)
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be created: {error.strerror}; give another --out") from error
    lock = FolderLock(out / LOCK)
    try:
        with full_disk_is_an_error(out):
            if not lock.acquire():
                raise OutputError(f"another comparison is writing {out}; wait for it, or give another --out")
            _take_over(out, before, identity, overwrite)
            yield out
            write_json(out / STARTED, {"identity": identity, "overwriting": False}, durable=True)
    finally:
        if lock.is_held:
            shutil.rmtree(out / SCRATCH, ignore_errors=True)
            (out / LOCK).unlink(missing_ok=True)
            if new and not any(item.name != STARTED for item in out.iterdir()):
                shutil.rmtree(out, ignore_errors=True)  # nothing came of it
        lock.release()


def check_folder(out: Path, identity: Mapping[str, Any], overwrite: bool) -> dict[str, Any]:
    """What began the comparison in ``out``; nothing where there is none yet. Changes nothing.

    Raises:
        OutputError: ``out`` is a file, holds what no comparison writes, or the comparison of another model or version that is
            not to be overwritten.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder that does not exist yet")
    foreign = next((item for item in out.iterdir() if not _is_ours(item)), None) if out.is_dir() else None
    if foreign is not None:
        raise OutputError(f"{out} holds {foreign.name}, which is not of a comparison; give another --out")
    found = read_json(out / STARTED)
    if not isinstance(found.get("identity"), dict):
        return {}
    others = differences(found["identity"], identity)
    if others and not overwrite:
        raise OutputError(
            f"{out} holds a comparison with {in_words(others)}; give another --out, or --overwrite to start over"
        )
    return found


def _is_ours(item: Path) -> bool:
    return item.name in OURS or any(item.match(f".{name}.????????") for name in OURS)


def _take_over(out: Path, before: Mapping[str, Any], identity: Mapping[str, Any], overwrite: bool) -> None:
    """Go on with what is in ``out``, or empty it."""
    # A comparison that was begun with --overwrite goes on with it.
    if before.get("identity") != identity or (overwrite and not before.get("overwriting")):
        for name in OURS:
            if name != LOCK:
                _remove(out / name)
    for folder in (out, out / CALIBRATION):
        remove_temporaries(folder)
    _remove(out / SCRATCH)
    write_json(out / STARTED, {"identity": identity, "overwriting": overwrite}, durable=True)


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item)
    else:
        item.unlink(missing_ok=True)
