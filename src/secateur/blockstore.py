"""Per-block results kept on disk under a key: dense scores and gradient statistics, for the next run to use."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from secateur.console import log
from secateur.files import atomic_file, human_bytes, remove_temporaries

FORMAT = 1
LIMIT = 20 * 1024**3
"""How much the cache of scores and statistics may hold; the least recently used go first."""
ABANDONED_AFTER = 24 * 3600
"""Seconds after which a file that was never finished is one that a killed process left."""


class BlockStore:
    """One safetensors file a block, written atomically, in a folder named by what the contents depend on."""

    def __init__(self, root: Path, kind: str, key: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()
        self.folder = root / kind / digest[:24]

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"

    def has(self, block: int) -> bool:
        return self._file(block).is_file()

    def put(self, block: int, tensors: dict[str, torch.Tensor]) -> None:
        with atomic_file(self._file(block)) as temporary:
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            except SafetensorError as error:  # what the system said is in its text
                raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error

    def get(self, block: int) -> dict[str, torch.Tensor]:
        """What was put for ``block``; a damaged file is removed and raises ``KeyError`` so that it is made again."""
        file = self._file(block)
        try:
            os.utime(self.folder)
            return load_file(file)
        except (SafetensorError, OSError) as error:
            file.unlink(missing_ok=True)
            raise KeyError(block) from error

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # where others are in it
            self.folder.parent.rmdir()

    def missing(self, blocks: range) -> list[int]:
        """The blocks whose contents are not there yet; truncated ones are found and dropped."""
        absent = []
        for block in blocks:
            if self.has(block):
                try:
                    with safe_open(self._file(block), framework="pt"):  # checks header and length
                        continue
                except (SafetensorError, OSError):
                    log.info("The kept scores of block %d were damaged and are made again.", block)
                    self._file(block).unlink(missing_ok=True)
            absent.append(block)
        return absent


def trim_cache(root: Path, limit: int = LIMIT) -> None:
    """Remove the least recently used stores until the rest fit in ``limit`` bytes, and what killed processes left."""
    for folder in (root, *(item for item in root.rglob("*") if item.is_dir())):
        remove_temporaries(folder, older_than=ABANDONED_AFTER)
    ages, sizes = {}, {}
    for folder in (folder for kind in ("scores", "gradients") for folder in (root / kind).glob("*")):
        with contextlib.suppress(FileNotFoundError):  # another run may be writing or trimming
            sizes[folder] = sum(file.stat().st_size for file in folder.glob("*"))
            ages[folder] = folder.stat().st_mtime
    total = sum(sizes.values())
    for folder in sorted(ages, key=lambda item: ages[item])[:-1]:  # the newest is the one just made
        if total <= limit:
            return
        log.info(
            "Removing scores kept from earlier runs (%s) to stay within the cache's limit.", human_bytes(sizes[folder])
        )
        shutil.rmtree(folder, ignore_errors=True)
        total -= sizes[folder]
