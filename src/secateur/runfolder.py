"""The run folder: work lives in ``OUT.partial`` and becomes ``OUT`` in one rename.

``OUT.partial`` is also the checkpoint: after any death the same command goes on in it. ``started.json`` says whose it is,
``scratch/`` holds what each stage keeps, ``secateur/log.jsonl`` what each attempt did.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from secateur.checkpoint.manifest import FILES, RECORD
from secateur.console import event, log, say
from secateur.errors import (
    CalibrationError,
    ModelError,
    OutputError,
    ResourceError,
    SecateurError,
    Stopped,
    TooLargeError,
    reason_of,
)
from secateur.files import full_disk_is_an_error, remove_temporaries, sync
from secateur.lock import FolderLock
from secateur.resuming import STARTED, Settings, Start, applied, read_progress, read_start
from secateur.runlog import EVENT_LOG, TEXT_LOG, log_files

RUN_FILE = "run.json"
LOCK, MARK, SCRATCH, UNFINISHED = ".lock", ".unfinished", "scratch", "unfinished"
STALE_AFTER = 7 * 24 * 3600
"""Seconds after which unfinished work in the cache is nobody's any more."""


def is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Whether ``out`` is the finished result of exactly this run, with its weight files still there."""
    try:
        found = json.loads((out / RECORD / RUN_FILE).read_text(encoding="utf-8"))
        files = json.loads((out / RECORD / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not all((out / name).is_file() for name in files):
        return False
    return isinstance(found, dict) and _result_of(found.get("identity")) == _result_of(json.loads(json.dumps(identity)))


def _result_of(identity: Any) -> Any:
    """What a finished result is known by: not the digest of the code, which a comment changes; its version tells."""
    return {key: value for key, value in identity.items() if key != "code"} if isinstance(identity, dict) else None


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


@dataclass(frozen=True)
class Work:
    """A folder to work in, held by this process alone.

    Attributes:
        settings: those of the run's first attempt.
        goes_on: an earlier attempt has left something.
    """

    folder: Path
    settings: Settings
    goes_on: bool

    @property
    def scratch(self) -> Path:
        """What every stage keeps to go on from; removed when the run has succeeded."""
        return self.folder / SCRATCH

    @property
    def record(self) -> Path:
        return self.folder / RECORD

    def fix_micro_batch(self, micro_batch: int) -> None:
        """Note that every attempt has to run with this micro-batch: the one asked for was too large for the device."""
        start = read_start(self.folder)
        if start is not None:
            replace(start, settings=replace(start.settings, micro_batch=micro_batch)).write(self.folder)


@contextmanager
def run_folder(out: Path, start: Start, overwrite: bool = False) -> Iterator[Work]:
    """Yield ``OUT.partial``; on success it becomes ``OUT``.

    It stays where the same command can go on from it: when the process is killed or interrupted, or memory or disk is
    too little. It vanishes on an error that asks for another command.

    Raises:
        OutputError: ``out`` is occupied, cannot be written, another run is writing it, or an unfinished one began it.
    """
    check_free(out, overwrite)
    with work_folder(partial_of(out), start, overwrite) as work:
        work.record.mkdir(exist_ok=True)
        with log_files(work.record), _attempt(work), applied(work.settings):
            yield work
        check_free(out, overwrite)  # something may have appeared there meanwhile
        _replace(work.folder, out)


@contextmanager
def work_folder(folder: Path, start: Start, overwrite: bool = False) -> Iterator[Work]:
    """Hold ``folder`` and what an earlier attempt at the same run has left in it; see ``run_folder``."""
    made = _make_parents(folder)
    lock = FolderLock(folder / LOCK)
    work: Work | None = None
    try:
        if not lock.acquire():
            raise OutputError(f"another run is writing {folder}; wait for it, or give another --out")
        with full_disk_is_an_error(folder):
            work = _begin(folder, start, overwrite)
            yield work
    except BaseException as error:
        kept = work is not None and _is_kept(error, start, work)
        if kept:
            _say_kept(error, folder, start)
        elif lock.is_held and (work is not None or made[:1] == [folder]):
            _remove(folder, made)
        if kept and isinstance(error, ResourceError) and start.goes_on:
            raise type(error)(f"{error}; {KEPT.format(folder)}") from error
        raise
    finally:
        lock.release()


KEPT = "what was finished is kept in {}, and the same command goes on from there"


def _is_kept(error: BaseException, start: Start, work: Work) -> bool:
    """Whether the same command may come further after ``error``: nobody has to change what was asked for."""
    if not start.goes_on:
        return not isinstance(error, Exception)
    if isinstance(error, (CalibrationError, ModelError, TooLargeError)):
        return work.goes_on  # it was possible before: a disk or a network that is away comes back
    return isinstance(error, ResourceError) or not isinstance(error, SecateurError)


def _say_kept(error: BaseException, folder: Path, start: Start) -> None:
    if not start.goes_on:
        log.warning("Interrupted: the unfinished work is in %s; run the same command again, or remove it.", folder)
    elif not isinstance(error, ResourceError):  # whose own sentence says so
        log.warning("Interrupted: %s.", KEPT.format(folder))


@contextmanager
def _attempt(work: Work) -> Iterator[None]:
    """Note in the run's log when an attempt began and how it ended."""
    event("run started", goes_on=work.goes_on, pid=os.getpid(), settings=asdict(work.settings))
    if work.goes_on:
        say_going_on(work)
    try:
        yield
    except BaseException as error:
        how = "interrupted" if isinstance(error, (KeyboardInterrupt, Stopped)) else reason_of(error)
        event("run ended", how=how)
        raise


def say_going_on(work: Work) -> None:
    """One sentence that says how far the earlier attempts came."""
    progress = read_progress(work.scratch)
    far = progress.in_words()
    say(f"Going on with {work.folder}{': ' if far else ''}{far}.", "going on", **asdict(progress))


def _begin(folder: Path, start: Start, overwrite: bool) -> Work:
    """Go on with what is in ``folder``, or empty it and begin.

    Raises:
        OutputError: what is there is the unfinished work of another run.
    """
    left = read_start(folder)
    # A run that was begun with --overwrite goes on with it; one that was not is told by it to start over.
    afresh = left is None or not left.goes_on or (overwrite and not (left.overwrite and start.same_as(left)))
    if left is None or afresh:
        if _is_begun(folder):
            log.info("Starting over: %s was left by an unfinished run.", folder)
        (folder / STARTED).unlink(missing_ok=True)  # first: half an old run must not pass for one
        _clear(folder, keep=())
        start.write(folder)
        return Work(folder, start.settings, goes_on=False)
    start = start.going_on_from(left, folder)
    _clear(folder, keep=(STARTED, SCRATCH, RECORD, "*.safetensors*"))
    if (folder / RECORD).is_dir():
        _clear(folder / RECORD, keep=(TEXT_LOG, EVENT_LOG))
    for place in (folder / SCRATCH, *(item for item in (folder / SCRATCH).rglob("*") if item.is_dir())):
        remove_temporaries(place)
    if start.settings != left.settings:
        start.write(folder)
    return Work(folder, start.settings, goes_on=True)


def _make_parents(partial: Path) -> list[Path]:
    """Create ``partial`` and return the folders that were not there, innermost first."""
    made = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    foreign = partial.is_dir() and any(partial.iterdir()) and not (partial / MARK).is_file()
    if foreign or partial.is_symlink() or partial.is_file():
        raise OutputError(
            f"{partial} is in the way and is not the work of an unfinished run; move it, or give another --out"
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / MARK).touch()
    except OSError as error:
        raise OutputError(f"{partial} cannot be created: {error.strerror}; give another --out") from error
    return made


def _is_begun(folder: Path) -> bool:
    return any(item.name not in (LOCK, MARK) for item in folder.iterdir())


def _clear(folder: Path, keep: tuple[str, ...]) -> None:
    """Remove everything but what ``keep`` names; hidden files go, as killed writers leave them."""
    for item in folder.iterdir():
        if item.name in (LOCK, MARK) or (not item.name.startswith(".") and any(map(item.match, keep))):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def _remove(partial: Path, made: list[Path]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for folder in made[1:]:
        try:
            folder.rmdir()
        except OSError:
            break


def finished_before(out: Path, start: Start, overwrite: bool = False) -> bool:
    """Whether exactly this run is finished already, the last step of one that was killed in it included."""
    settled = _settle(out, start, overwrite)
    return settled or (not overwrite and is_complete(out, start.identity))


def _settle(out: Path, start: Start, overwrite: bool) -> bool:
    """Take the last step of a run that was killed in it: everything was written, and only the renaming was left.

    Returns:
        whether ``out`` is now the result of exactly this run.
    """
    partial, replaced = partial_of(out), _replaced(out)
    if not partial.is_dir():
        if is_complete(out, start.identity):
            _tidy(out)
        return False
    if not (partial / STARTED).is_file():
        return False
    lock = FolderLock(partial / LOCK)
    if not lock.acquire():
        return False
    try:
        if replaced.exists() and not out.exists():
            os.replace(replaced, out)  # killed between the two renames
        if not is_complete(partial, start.identity):
            return False
        check_free(out, overwrite)
        shutil.rmtree(partial / SCRATCH, ignore_errors=True)
        _replace(partial, out)
        return True
    finally:
        lock.release()


def _replaced(out: Path) -> Path:
    """Where what stood at ``out`` lies for the moment between two renames."""
    return out.with_name(f".{out.name}.replaced")


def _replace(partial: Path, out: Path) -> None:
    """Rename while the lock is held; what stood at ``out`` comes back should the rename fail."""
    old = _replaced(out)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
    try:
        os.replace(partial, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    sync(out.parent)
    _tidy(out)


def _tidy(out: Path) -> None:
    """Remove what only an unfinished run needs."""
    for name in (LOCK, MARK, STARTED):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(_replaced(out), ignore_errors=True)


# -- work that has no folder of its own


def unfinished_place(cache: Path, start: Start) -> Path:
    """Where the same command finds its unfinished work again: a folder in the cache, named by all that it depends on."""
    content = [start.identity, start.settings.bound(), start.settings.workers]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return cache / UNFINISHED / digest[:24]


@contextmanager
def cached_work(place: Path, start: Start) -> Iterator[Work]:
    """Hold a folder of ``unfinished_place``; nothing of it stays when the work has succeeded."""
    trim_unfinished(place.parent)
    with work_folder(place, start) as work, applied(work.settings):
        if work.goes_on:
            say_going_on(work)
        yield work
        _remove(place, [place, place.parent])


def trim_unfinished(folder: Path, done: Path | None = None) -> None:
    """Remove unfinished work that nobody has gone on with for a week, and what is ``done``."""
    for place in folder.glob("*"):
        with suppress(OSError, ValueError):  # another process may be trimming too
            newest = max(item.stat().st_mtime for item in place.rglob("*"))
            lock = FolderLock(place / LOCK)
            if (place == done or time.time() - newest > STALE_AFTER) and lock.acquire():
                shutil.rmtree(place, ignore_errors=True)
                lock.release()
    with suppress(OSError):
        folder.rmdir()
