"""What crosses from one block to the next: hidden states kept in memory up to a limit, on disk beyond it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


class BoundaryStore:
    """A set of float32 tensors by key; those that do not fit in ``memory`` bytes are files in ``scratch``.

    Files are written and read whole, not mapped: mapped pages would count as memory until the system takes them back.
    """

    def __init__(self, memory: int, scratch: Path) -> None:
        self.memory = memory
        self.held = 0
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self._files: dict[tuple[int, int], tuple[Path, torch.Size]] = {}
        self._scratch = scratch

    def put(self, key: tuple[int, int], tensor_BTD: torch.Tensor) -> None:
        """Keep ``tensor_BTD`` under ``key`` (block, micro-batch)."""
        size = tensor_BTD.numel() * tensor_BTD.element_size()
        if self.held + size <= self.memory:
            self._tensors[key] = tensor_BTD
            self.held += size
            return
        self._scratch.mkdir(parents=True, exist_ok=True)
        path = self._scratch / f"block-{key[0]:04d}-batch-{key[1]:05d}.f32"
        with path.open("wb") as stream:
            stream.write(tensor_BTD.contiguous().numpy().data)
        self._files[key] = (path, tensor_BTD.shape)

    def pop(self, key: tuple[int, int]) -> torch.Tensor:
        """Take the tensor under ``key`` out of the store."""
        if key in self._tensors:
            tensor = self._tensors.pop(key)
            self.held -= tensor.numel() * tensor.element_size()
            return tensor
        path, shape = self._files.pop(key)
        tensor = torch.from_numpy(np.fromfile(path, dtype=np.float32)).reshape(shape)
        path.unlink()
        return tensor

    def clear(self) -> None:
        """Forget everything and remove the files."""
        self._tensors.clear()
        self.held = 0
        for path, _ in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()
