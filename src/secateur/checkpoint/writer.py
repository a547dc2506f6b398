"""Writing a model folder: tensors streamed into shards in order, each block let go once it is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from secateur.checkpoint.reader import OTHER_DTYPES, WEIGHT_DTYPES

SAFETENSORS_NAMES = {dtype: name for name, dtype in (WEIGHT_DTYPES | OTHER_DTYPES).items()}
SHARD_BYTES = 5 * 1000**3
"""The size above which a folder is split, as transformers does."""

CARRIED_OVER = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
TEMPLATES = "additional_chat_templates"
LEFT_BEHIND = ("config.json", "model.safetensors.index.json", "README.md")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """Writes safetensors whose headers are known beforehand, one tensor after the other, in the order of ``specs``.

    The library's own writer wants all tensors of a file in memory at once; the format itself is a length, a JSON
    header and the bytes, so they can be appended as they come.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self._shards = list(_split(specs, shard_bytes))
        self._files = [_shard_name(number, len(self._shards)) for number in range(len(self._shards))]
        self._order: Iterator[tuple[int, TensorSpec]] = (
            (number, spec) for number, shard in enumerate(self._shards) for spec in shard
        )
        self._stream: BinaryIO | None = None
        self._open_shard = -1

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append ``tensors``, which have to be the next ones in order."""
        for name, tensor in tensors.items():
            number, spec = next(self._order)
            if (spec.name, spec.shape, spec.dtype) != (name, tuple(tensor.shape), tensor.dtype):
                raise ValueError(f"expected {spec}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
            if number != self._open_shard:
                self._start(number)
            assert self._stream is not None
            self._stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> list[Path]:
        """Finish, write the index of several shards, and return the weight files."""
        if next(self._order, None) is not None:
            raise ValueError("not every tensor has been written")
        self._finish()
        if len(self._shards) > 1:
            self._write_index()
        return [self.folder / name for name in self._files]

    def _start(self, number: int) -> None:
        self._finish()
        self._open_shard = number
        self._stream = (self.folder / self._files[number]).open("wb")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in self._shards[number]:
            header[spec.name] = {
                "dtype": SAFETENSORS_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.bytes],
            }
            offset += spec.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of eight bytes
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def abandon(self) -> None:
        """Close what is open; the folder is the caller's to remove."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write_index(self) -> None:
        total = sum(spec.bytes for shard in self._shards for spec in shard)
        places = {spec.name: self._files[number] for number, shard in enumerate(self._shards) for spec in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
