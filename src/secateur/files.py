"""Small file helpers shared by every room: the cache folder, atomic writes, hashes, free space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import OutputError, ResourceError


def cache_folder() -> Path:
    """Where conversions, self-written windows, statistics and scores are kept: ``$SECATEUR_CACHE`` or the user's cache."""
    chosen = os.environ.get("SECATEUR_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "secateur"


@contextmanager
def atomic_file(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that becomes ``path`` in one rename, or vanishes on any failure.

    ``durable``: it also outlasts a loss of power, from when the context ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that becomes ``path`` in one rename, or vanishes on any failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        # Another process may have finished the same folder meanwhile; theirs is as good as ours.
        if not path.exists():
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any, durable: bool = False) -> None:
    """Write ``content`` as stable, readable JSON (keys as given, one trailing newline), atomically.

    ``durable``: it is on the disk when this returns, so that it outlives a loss of power.
    """
    with atomic_file(path, durable) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in ``folder`` is on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place) / name)
        sync(Path(place))


def remove_temporaries(folder: Path, name: str = "*", older_than: float = 0) -> None:
    """Remove what ``atomic_file`` and ``atomic_folder`` leave of ``name`` in ``folder`` when their process is killed.

    ``older_than``: seconds; where others may be writing, only what none of them can still be at.
    """
    for file in folder.glob(f".{name}.????????"):
        with contextlib.suppress(OSError):
            if older_than and time.time() - file.stat().st_mtime < older_than:
                continue
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse with ``ResourceError`` when the disk that holds ``folder`` has less than ``needed`` bytes free."""
    present = folder
    while not present.exists():
        present = present.parent
    free = shutil.disk_usage(present).free
    if free < needed:
        raise ResourceError(
            f"{what} needs {human_bytes(needed)} but the disk of {folder} has {human_bytes(free)} free; "
            "free some space or choose another folder"
        )


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" and "not permitted" into one sentence for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = error.filename or folder
            raise ResourceError(f"the disk filled up while writing {where}; free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"{error.filename or folder} cannot be written: {error.strerror}; choose another folder"
            ) from error
        raise


def human_bytes(count: float) -> str:
    """``1536 -> '1.5 KiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """``250 -> '4 min'``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def human_count(count: float) -> str:
    """``134515008 -> '134.5M'``."""
    for divisor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= divisor:
            return f"{count / divisor:.1f}{suffix}"
    return f"{count:.0f}"
