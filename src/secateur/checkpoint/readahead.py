"""Reading the next block while this one computes: its bytes are brought into the system's cache, not into our memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from secateur.checkpoint.conversion import StoredTensor

PIECE = 4 << 20
"""Bytes read at once."""


class Readahead:
    """One thread that reads what will be wanted soon and throws it away: the second reading finds it in the page cache."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="readahead")
        self._running: Future[None] | None = None

    def start(self, tensors: Iterable[StoredTensor]) -> None:
        """Begin with ``tensors``, unless the last ones are still being read: then the disk is the slower part anyway."""
        if self._running is None or self._running.done():
            self._running = self._thread.submit(_read, sorted({(t.file, t.offset, t.bytes) for t in tensors}))


def _read(ranges: list[tuple[Path, int, int]]) -> None:
    piece = bytearray(PIECE)
    for file, offset, size in ranges:
        try:
            with file.open("rb", buffering=0) as stream:
                os.lseek(stream.fileno(), offset, os.SEEK_SET)
                while size > 0:
                    read = stream.readinto(memoryview(piece)[: min(size, PIECE)])
                    if not read:
                        break
                    size -= read
        except OSError:
            return  # whoever reads it next says what is wrong with it
