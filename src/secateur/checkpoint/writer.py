"""Writing a model folder: each tensor at its place in its shard, each block let go once it is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from secateur.checkpoint.progress import Progress
from secateur.checkpoint.tensorfile import SAFETENSORS_NAMES, TensorFile, TensorSpec
from secateur.files import sync

SHARD_BYTES = 5 * 1000**3
"""The size above which a folder is split, as transformers does."""

CARRIED_OVER = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
TEMPLATES = "additional_chat_templates"
INDEX = "model.safetensors.index.json"
LEFT_BEHIND = ("config.json", INDEX, "README.md")


class ShardWriter:
    """Writes the tensors of ``specs`` into shards, in any order, a piece at a time.

    With ``work`` a piece is on disk for good when ``write`` returns, and a writer for the same tensors and the same
    ``identity`` goes on from there; so several processes can write their part each, and any of them can be killed.

    Args:
        work: where progress is noted, apart from what is shipped; None begins anew and notes nothing.
        identity: of what the bytes are made from; leftovers of another are not gone on from.
        rank: of this process, where several write.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        shard_bytes: int = SHARD_BYTES,
        *,
        work: Path | None = None,
        identity: str = "",
        rank: int = 0,
    ) -> None:
        self.folder, self.specs = folder, list(specs)
        shards = list(_split(specs, shard_bytes))
        self._files = [
            TensorFile(folder / _shard_name(number, len(shards)), shard, {"format": "pt"})
            for number, shard in enumerate(shards)
        ]
        self._home = {name: file for file in self._files for name in file.specs}
        self._progress = Progress(work, self._digest(identity), rank, self._files) if work is not None else None
        if self._progress is None:
            for file in self._files:
                file.create()
        self._written = self._progress.finished() if self._progress else set[str]()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.abandon()

    def holds(self, names: Iterable[str]) -> bool:
        """Whether all of these tensors are written, by this process or before it began."""
        return self._written.issuperset(names)

    def remaining(self) -> int:
        """How many bytes are still to be written."""
        return sum(spec.bytes for spec in self.specs if spec.name not in self._written)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one piece: ``tensors``, each at its place."""
        for name, tensor in tensors.items():
            if name not in self._home:
                raise ValueError(f"{name} is not among the tensors to be written")
            self._home[name].put(name, tensor)
        if self._progress is not None:
            for file in dict.fromkeys(self._home[name] for name in tensors):
                file.sync()  # first the bytes, then the word that they are there
            self._progress.note(tensors)
        self._written.update(tensors)

    def close(self) -> list[Path]:
        """Finish, write the index of several shards, and return the weight files."""
        if self._progress is not None:
            self._written = self._progress.finished()  # by now also what other processes have written
        if not self.holds(self._home):
            raise ValueError("not every tensor has been written")
        for file in self._files:
            file.sync()
        self.abandon()
        (self.folder / INDEX).unlink(missing_ok=True)  # a leftover's
        if len(self._files) > 1:
            self._write_index()
        sync(self.folder)
        return [file.path for file in self._files]

    def abandon(self) -> None:
        """Close what is open; the folder is the caller's to remove, or to go on with."""
        for file in self._files:
            file.close()

    def _digest(self, identity: str) -> str:
        shards = [[(s.name, s.shape, SAFETENSORS_NAMES[s.dtype]) for s in file.specs.values()] for file in self._files]
        return hashlib.sha256(json.dumps([identity, shards]).encode()).hexdigest()[:32]

    def _write_index(self) -> None:
        total = sum(spec.bytes for spec in self.specs)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file.path.name for name, file in self._home.items()},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(specs: Iterable[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if shard and size + spec.bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += spec.bytes
    if shard:
        yield shard


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def copy_companions(source: Path, target: Path, with_code: bool = False) -> None:
    """Carry over byte for byte what belongs to the model beside its weights: tokenizer, chat templates, licence.

    ``with_code``: also the model's own Python files, where the user has allowed them to run.
    """
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)
    for pattern in (*CARRIED_OVER, "*.py") if with_code else CARRIED_OVER:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in LEFT_BEHIND:
                shutil.copyfile(file, target / file.name)
