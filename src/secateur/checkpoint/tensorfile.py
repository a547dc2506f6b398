"""One safetensors file whose header is known beforehand: tensors are written at their place, in any order.

The library's own writer wants all tensors of a file in memory at once; the format itself is a length, a JSON header and
the bytes, so each tensor has its offset before any is there. Several processes may write one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.checkpoint.reader import OTHER_DTYPES, WEIGHT_DTYPES

SAFETENSORS_NAMES = {dtype: name for name, dtype in (WEIGHT_DTYPES | OTHER_DTYPES).items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFile:
    """A file of these tensors in this order; nothing is written before ``create``.

    Args:
        metadata: what the header says beside the tensors.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path, self.specs = path, {spec.name: spec for spec in specs}
        self._head = _header(specs, metadata)
        self._offsets: dict[str, int] = {}
        end = len(self._head)
        for spec in specs:
            self._offsets[spec.name] = end
            end += spec.bytes
        self.bytes = end
        self._handle = -1

    def create(self) -> None:
        """Begin anew: header and full length, without the bytes."""
        self.close()
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        _write_at(self._handle, memoryview(self._head), 0)
        os.ftruncate(self._handle, self.bytes)

    def is_begun(self) -> bool:
        """Whether the file is there with this very header and length; what it holds is another question."""
        try:
            with self.path.open("rb") as stream:
                return stream.read(len(self._head)) == self._head and os.fstat(stream.fileno()).st_size == self.bytes
        except OSError:
            return False

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place.

        Raises:
            ValueError: it is not the tensor that the header announces.
        """
        spec = self.specs.get(name)
        if spec is None or (spec.shape, spec.dtype) != (tuple(tensor.shape), tensor.dtype):
            raise ValueError(f"expected {spec}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        if self._handle < 0:
            self._handle = os.open(self.path, os.O_RDWR)
        if tensor.numel():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            _write_at(self._handle, data, self._offsets[name])

    def sync(self) -> None:
        """Return once everything put so far is on the disk itself."""
        if self._handle >= 0:
            os.fsync(self._handle)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while len(data):  # the system takes at most 2 GiB at once
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
