"""The run folder: work lives in ``OUT.partial`` and becomes ``OUT`` in one rename, or leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur.checkpoint.manifest import FILES, RECORD
from secateur.console import log, log_file
from secateur.errors import OutputError, Stopped
from secateur.files import full_disk_is_an_error

RUN_FILE = "run.json"
LOCK, MARK = ".lock", ".unfinished"


def is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Whether ``out`` is the finished result of exactly this run, with its weight files still there."""
    try:
        found = json.loads((out / RECORD / RUN_FILE).read_text(encoding="utf-8"))
        files = json.loads((out / RECORD / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not all((out / name).is_file() for name in files):
        return False
    return isinstance(found, dict) and found.get("identity") == json.loads(json.dumps(identity))


def absolute(out: Path) -> Path:
    """``out`` without ``.``, ``..`` and trailing slashes, so that ``OUT.partial`` can stand beside it.

    Raises:
        OutputError: it is the root of a disk.
    """
    whole = Path(os.path.realpath(out.expanduser()))
    if not whole.name:
        raise OutputError(f"{out} cannot be a result's folder; give a folder that does not exist yet")
    return whole


def check_apart(out: Path, model: Path, *texts: str | None) -> None:
    """Refuse an ``out`` that is, holds, or lies in the model's own folder, or holds a text: replacing it would destroy them.

    Raises:
        OutputError: they overlap.
    """
    model = model.resolve()
    places = {out, partial_of(out)}
    if places & {model, *model.parents} or out in places & set(model.parents) or model in out.parents:
        raise OutputError(f"--out {out} overlaps with the model's own folder {model}; give a folder apart from it")
    for text in filter(None, texts):
        file = Path(text).expanduser().resolve()
        if file.exists() and places & {file, *file.parents}:
            raise OutputError(f"--out {out} holds {file}, which this run reads; give a folder apart from it")


def partial_of(out: Path) -> Path:
    """Where the work for ``out`` lives."""
    return out.with_name(out.name + ".partial")


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse an occupied ``out`` before any work.

    Raises:
        OutputError: ``out`` is a file, or a folder with something in it and ``overwrite`` is not given.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; give a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(
            f"{out} is not empty and is not the result of this very run; give another --out, or --overwrite"
        )


@contextmanager
def run_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield ``OUT.partial``; on success it becomes ``OUT``, on an error it vanishes, on an interruption it stays.

    Raises:
        OutputError: ``out`` is occupied, cannot be written, or another run is writing it.
    """
    check_free(out, overwrite)
    partial = partial_of(out)
    made: list[Path] = []
    lock = FileLock(partial / LOCK, timeout=0)
    try:
        made = _make_parents(partial)
        _acquire(lock, partial)
        with full_disk_is_an_error(partial):
            _clear(partial)
            (partial / RECORD).mkdir()
            with log_file(partial / RECORD / "log.txt"):
                yield partial
            check_free(out, overwrite)  # something may have appeared there meanwhile
            _replace(partial, out)
        lock.release()
    except (KeyboardInterrupt, Stopped):
        lock.release()
        log.warning("Interrupted: the unfinished work is in %s; run the same command again, or remove it.", partial)
        raise
    except BaseException:
        if lock.is_locked:  # otherwise the folder is another run's
            lock.release()
            _remove(partial, made)
        raise


def _acquire(lock: FileLock, partial: Path) -> None:
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"another run is writing {partial}; wait for it, or give another --out") from error


def _make_parents(partial: Path) -> list[Path]:
    """Create ``partial`` and return the folders that were not there, innermost first."""
    made = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    if partial.is_dir() and any(partial.iterdir()):
        if partial.is_symlink() or not (partial / MARK).is_file():
            raise OutputError(
                f"{partial} is in the way and is not the work of an unfinished run; move it, or give another --out"
            )
        log.info("Starting over: %s was left by an unfinished run.", partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / MARK).touch()
    except OSError as error:
        raise OutputError(f"{partial} cannot be created: {error.strerror}; give another --out") from error
    return made


def _clear(partial: Path) -> None:
    for item in partial.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name not in (LOCK, MARK):
            item.unlink()


def _remove(partial: Path, made: list[Path]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for folder in made[1:]:
        try:
            folder.rmdir()
        except OSError:
            break


def _replace(partial: Path, out: Path) -> None:
    """Rename while the lock is held; what stood at ``out`` comes back should the rename fail."""
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}") if out.exists() else None
    if old is not None:
        os.replace(out, old)
    try:
        os.replace(partial, out)
    except OSError:
        if old is not None:
            os.replace(old, out)
        raise
    for name in (LOCK, MARK):
        (out / name).unlink(missing_ok=True)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
