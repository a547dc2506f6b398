"""What crosses from one block to the next: kept in memory up to a limit, on disk beyond it, and there again after a kill.

A boundary is everything that stands before one block: the hidden states of all micro-batches, or the gradients that
come back to it. Tensors keep their dtype. Files are written and read whole, not mapped: mapped pages would count as
memory until the system takes them back.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from secateur.files import atomic_file

Key = tuple[int, int]
"""Boundary (the number of the block after it) and micro-batch."""

COMMIT_SHARE = 0.03
"""The largest share of the time that goes into making boundaries safe; a kill costs the blocks since the last."""


ROOM = 1 << 30
"""Bytes that making boundaries safe leaves free on the disk."""


class DamagedBoundaryError(Exception):
    """What an earlier process left is not what it wrote; it has to be computed again."""


class Budget:
    """Bytes that several stores may hold together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes, if they are there."""
        if self.held + size > self.limit:
            return False
        self.held += size
        return True


@dataclass(frozen=True)
class _Place:
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + torch.Size(self.shape).numel() * self.dtype.itemsize


class BoundaryStore:
    """Tensors by (boundary, micro-batch). One file a boundary holds those that did not fit, or all once it is committed.

    One thread of its own writes and reads ahead, so that the disk works while a block computes.

    Args:
        budget: what may be held in memory; several stores can share it. A number makes one for this store.
        folder: where the files lie. What an earlier process committed there is found again.
    """

    def __init__(self, budget: Budget | int, folder: Path) -> None:
        self.budget = budget if isinstance(budget, Budget) else Budget(budget)
        self.folder = folder
        self._held: dict[Key, torch.Tensor] = {}
        self._places: dict[int, dict[int, _Place]] = {}
        self._files: dict[int, BinaryIO] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="boundaries")
        self._writing: dict[Key, tuple[torch.Tensor, Future[None]]] = {}
        for mark in folder.glob("boundary-*.json"):
            places = _read_mark(mark)
            if places is None:
                mark.unlink()
            else:
                self._places[int(mark.stem.split("-")[1])] = places
        self._committed = set(self._places)

    # -- one tensor

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Keep ``tensor`` under ``key``; it must not change afterwards."""
        tensor = tensor.detach().cpu()
        if self.budget.take(_bytes(tensor)):
            self._held[key] = tensor
            return
        self._wait_for_writing()  # one tensor at a time waits for the disk
        self._writing[key] = (tensor, self._worker.submit(self._write, key, tensor.contiguous()))

    def stream(
        self,
        boundary: int,
        batches: Sequence[int],
        arrive: Callable[[torch.Tensor], torch.Tensor],
        keep: bool = False,
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Pop the micro-batches of ``boundary`` in order; the next one is fetched while the caller works on this one.

        Args:
            arrive: brings a tensor to where it is computed on; called in the reading thread.
            keep: they stay, to be streamed once more.
        """
        coming: Future[torch.Tensor] | None = None
        for place, batch in enumerate(batches):
            tensor = self._fetch((boundary, batch), arrive, keep).result() if coming is None else coming.result()
            more = place + 1 < len(batches)
            coming = self._fetch((boundary, batches[place + 1]), arrive, keep) if more else None
            yield batch, tensor

    def _fetch(self, key: Key, arrive: Callable[[torch.Tensor], torch.Tensor], keep: bool) -> Future[torch.Tensor]:
        if key in self._held:
            tensor = self._held[key]
            if not keep:
                del self._held[key]
                self.budget.held -= _bytes(tensor)
            return self._worker.submit(arrive, tensor)
        return self._worker.submit(lambda: arrive(self._read(key)))  # after what is being written: one thread

    # -- one boundary

    def commit(self, boundary: int) -> None:
        """Make ``boundary`` safe: all of it on disk, so that another process can go on from it."""
        self._wait_for_writing()
        for (own, batch), tensor in self._held.items():
            if own == boundary and batch not in self._places.get(boundary, {}):
                self._worker.submit(self._write, (own, batch), tensor.contiguous()).result()
        stream = self._file(boundary)
        stream.flush()
        os.fsync(stream.fileno())
        with atomic_file(self._mark(boundary), durable=True) as temporary:
            temporary.write_text(_mark_text(self._places[boundary]), encoding="utf-8")
        self._committed.add(boundary)

    def has_room(self) -> bool:
        """Whether the disk has room for what is held in memory, and some to spare: it is a convenience to be safe."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free > sum(map(_bytes, self._held.values())) + ROOM

    def committed(self) -> set[int]:
        """The boundaries that are safe."""
        return set(self._committed)

    def drop(self, boundaries: Callable[[int], bool]) -> None:
        """Forget the boundaries for which ``boundaries`` is true, on disk and in memory."""
        self._wait_for_writing()
        for key in [key for key in self._held if boundaries(key[0])]:
            self.budget.held -= _bytes(self._held.pop(key))
        for boundary in [boundary for boundary in self._places if boundaries(boundary)]:
            self._mark(boundary).unlink(missing_ok=True)  # first the mark: a file without one is nothing
            self._committed.discard(boundary)
            if boundary in self._files:
                self._files.pop(boundary).close()
            self._data(boundary).unlink(missing_ok=True)
            del self._places[boundary]

    def drop_behind(self, boundary: int, forward: bool) -> None:
        """A walk stands at ``boundary``: forget those behind it, but for the last that is safe."""
        safe = (max if forward else min)(self._committed, default=boundary)
        self.drop(lambda other: other != safe and (other < boundary if forward else other > boundary))

    def close(self) -> None:
        """Stop the thread and close files; what is committed stays on disk."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._writing.clear()
        for stream in self._files.values():
            stream.close()
        self._files.clear()
        self._held.clear()

    def clear(self) -> None:
        """Forget everything and remove the files."""
        self.close()
        self._places.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()  # where nothing else is in it

    # -- files

    def _data(self, boundary: int) -> Path:
        return self.folder / f"boundary-{boundary:04d}.bin"

    def _mark(self, boundary: int) -> Path:
        return self.folder / f"boundary-{boundary:04d}.json"

    def _file(self, boundary: int) -> BinaryIO:
        if boundary not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = boundary in self._places
            self._files[boundary] = self._data(boundary).open("r+b" if known else "w+b")
            self._places.setdefault(boundary, {})
        return self._files[boundary]

    def _write(self, key: Key, tensor: torch.Tensor) -> None:
        boundary, batch = key
        stream = self._file(boundary)
        offset = stream.seek(0, os.SEEK_END)
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        stream.write(content)
        self._places[boundary][batch] = _Place(offset, tuple(tensor.shape), tensor.dtype, zlib.crc32(content))

    def _read(self, key: Key) -> torch.Tensor:
        boundary, batch = key
        place = self._places[boundary][batch]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        stream = self._file(boundary)
        stream.seek(place.offset)
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        read = stream.readinto(content)  # type: ignore[attr-defined]
        if read != _bytes(tensor) or zlib.crc32(content) != place.checksum:
            raise DamagedBoundaryError(self._data(boundary))
        return tensor

    def _wait_for_writing(self) -> None:
        for _, future in self._writing.values():
            future.result()
        self._writing.clear()


class Committing:
    """Says when a boundary is to be made safe, so that this takes a small share of the time."""

    def __init__(self) -> None:
        self._last, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._cost / COMMIT_SHARE

    def done(self, seconds: float) -> None:
        self._last, self._cost = time.monotonic(), seconds


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mark_text(places: dict[int, _Place]) -> str:
    return json.dumps(
        {str(b): [p.offset, list(p.shape), str(p.dtype).removeprefix("torch."), p.checksum] for b, p in places.items()}
    )


def _read_mark(mark: Path) -> dict[int, _Place] | None:
    """What a mark says of its file; None where either is damaged."""
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
        places = {int(b): _Place(o, tuple(s), getattr(torch, d), c) for b, (o, s, d, c) in content.items()}
        size = mark.with_suffix(".bin").stat().st_size
        return places if max(place.end for place in places.values()) <= size else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None
