"""A lock on a folder that dies with its holder, however that dies."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

from secateur.console import log

PAUSE = 0.02
"""Seconds between two tries."""

_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """An exclusive ``flock`` on one file; the system lets go of it when its process ends, even by ``kill -9``.

    A forked child would keep its copy of the descriptor, and with it the lock, after its parent's death; so children close
    theirs at birth. (``filelock``, which was here before, leaves it open.) Programs that are started close it by themselves.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock without waiting; False where another run has it, or has just removed or renamed the folder."""
        try:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return False
                raise
            log.warning("%s lies on a disk without locks; see to it that only one run writes there.", self.file.parent)
        if not _is_still(self.file, descriptor):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        _held.add(self)
        return True

    def wait(self) -> None:
        """Take the lock when it is free; for moments in which processes of one run would step on each other's toes."""
        while not self.acquire():
            time.sleep(PAUSE)

    def release(self) -> None:
        """Let go; the file stays, because removing it would let two others lock different files of the same name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None


def _is_still(file: Path, descriptor: int) -> bool:
    """Whether the locked file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)
