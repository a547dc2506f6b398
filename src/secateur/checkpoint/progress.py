"""What of a folder of weights has been written already: kept beside the work, so that a run that was killed goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from secateur.checkpoint.tensorfile import TensorFile
from secateur.files import sync
from secateur.lock import FolderLock

FILES, LOCK = "files.json", ".written.lock"


class Progress:
    """The names of the tensors whose bytes are on disk; one file a process, one line a piece.

    A folder named by ``digest`` stands for its weight files: it comes into being after they have, and is believed only
    while every one of them still has its header and its length. Leftovers of another digest are removed with it.

    Args:
        work: outlives the process, and is not shipped.
        digest: of everything that the bytes depend on.
        rank: of this process, where several write.
    """

    def __init__(self, work: Path, digest: str, rank: int, files: Sequence[TensorFile]) -> None:
        self._folder = work / f"written-{digest}"
        self._own = self._folder / f"{rank:04d}.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(work / LOCK)
        lock.wait()  # the first of several processes begins, the others find it begun
        try:
            if not (self._folder.is_dir() and all(file.is_begun() for file in files)):
                self._begin(work, files)
        finally:
            lock.release()

    def finished(self) -> set[str]:
        """Everything that any process has noted; a line that was cut off while it was written is not."""
        names: set[str] = set()
        for file in sorted(self._folder.glob("*.jsonl")):
            for line in file.read_bytes().split(b"\n")[:-1]:
                names.update(_names(line))
        return names

    def note(self, names: Iterable[str]) -> None:
        """Record durably that these tensors are on disk; call it when they are."""
        line = json.dumps(list(names)).encode() + b"\n"
        with self._own.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else b"\n" + line  # a line that a crash cut off ends here
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        sync(self._folder)

    def _begin(self, work: Path, files: Sequence[TensorFile]) -> None:
        for leftover in (*work.glob("written-*"), *work.glob(".written-*/")):
            _remove(leftover, files)
        for file in files:
            file.create()
            file.sync()
            file.close()
        for folder in {file.path.parent for file in files}:
            sync(folder)
        # The folder's name appears in one step: a crash before it begins anew, one after it goes on.
        unnamed = work / f".{self._folder.name}"
        unnamed.mkdir()
        (unnamed / FILES).write_text(json.dumps([file.path.name for file in files]), encoding="utf-8")
        os.replace(unnamed, self._folder)
        sync(work)


def _names(line: bytes) -> list[str]:
    try:
        found = json.loads(line)
    except ValueError:
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _remove(leftover: Path, files: Sequence[TensorFile]) -> None:
    """Drop what an earlier, different run noted, and the weight files that it began in the same folder."""
    listed = leftover / FILES
    begun = _names(listed.read_bytes()) if listed.is_file() else []
    for folder in {file.path.parent for file in files}:
        for name in begun:
            (folder / Path(name).name).unlink(missing_ok=True)
    shutil.rmtree(leftover)
