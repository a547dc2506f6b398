"""Where a plan's masks and new numbers lie: in memory, one file a block in a folder, or what was saved with the plan.

Masks are kept as bits, and only those of the block that is asked for are brought in: of a model of seven billion weights
all of them are 0.8 GB. The folder is at the same time the checkpoint of a run's decisions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from secateur.errors import PlanError
from secateur.files import atomic_file, sha256_of_file
from secateur.structure import OUTSIDE

ENTRY, BELONGS_TO = "entry", "belongs_to"

Bits = Mapping[str, torch.Tensor]
"""Packed masks of one block, by parameter name."""


class MaskStore(Protocol):
    """Packed masks by block."""

    def put(self, block: int, entry: str, bits: Bits) -> None:
        """Keep the decision for one block: its entry of the plan as JSON, and its masks."""

    def get(self, block: int) -> Bits:
        """The masks of one block; none where it has none."""


class InMemory:
    """Masks of a plan that lives as long as the process."""

    def __init__(self) -> None:
        self._bits: dict[int, dict[str, torch.Tensor]] = {}

    def put(self, block: int, entry: str, bits: Bits) -> None:
        self._bits[block] = dict(bits)

    def get(self, block: int) -> Bits:
        return self._bits.get(block, {})


class InFolder:
    """One file a block, there as a whole or not at all, with the block's entry of the plan in its header.

    Args:
        belongs_to: the digest of what the decisions depend on; files of another are removed.
    """

    def __init__(self, folder: Path, belongs_to: str) -> None:
        self.folder, self._belongs_to = folder, belongs_to

    def put(self, block: int, entry: str, bits: Bits) -> None:
        content = save(dict(bits), {ENTRY: entry, BELONGS_TO: self._belongs_to})
        with atomic_file(self._file(block), durable=True) as temporary:
            temporary.write_bytes(content)

    def get(self, block: int) -> Bits:
        file = self._file(block)
        return _read(file) if file.is_file() else {}

    def entries(self) -> Iterator[str]:
        """The entries of all blocks that were decided; what cannot be read or belongs to another plan is removed."""
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as stream:
                    metadata = stream.metadata() or {}
            except (SafetensorError, OSError):
                metadata = {}
            if metadata.get(BELONGS_TO) == self._belongs_to and ENTRY in metadata:
                yield metadata[ENTRY]
            else:
                file.unlink()

    def _file(self, block: int) -> Path:
        return self.folder / ("outside.safetensors" if block == OUTSIDE else f"block-{block:04d}.safetensors")


class InFile:
    """The masks file of a saved plan, its tensors named ``BLOCK.NAME``; it is never written to."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def put(self, block: int, entry: str, bits: Bits) -> None:
        raise PlanError(f"the plan of {self.file} is finished; make another to change it")

    def get(self, block: int) -> Bits:
        return _read(self.file, f"{block}.")

    def sizes(self) -> dict[str, int]:
        """How many bytes each tensor has, read from the header."""
        try:
            with safe_open(self.file, framework="pt") as stream:
                return {name: _size(stream.get_slice(name)) for name in stream.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise PlanError(f"{self.file} is damaged: {error}") from error


class Numbers(Protocol):
    """New numbers of weights, by block."""

    def put(self, block: int, tensors: Mapping[str, torch.Tensor]) -> str:
        """Keep those of one block; returns their digest."""

    def get(self, block: int, digest: str) -> dict[str, torch.Tensor]:
        """Those of one block.

        Raises:
            PlanError: they are not there, or not those that were put.
        """

    def save(self, folder: Path, blocks: Iterable[int]) -> None:
        """Have those of ``blocks`` in ``folder`` too."""


class NumbersInMemory:
    """Numbers of a plan that lives as long as the process."""

    def __init__(self) -> None:
        self._tensors: dict[int, dict[str, torch.Tensor]] = {}

    def put(self, block: int, tensors: Mapping[str, torch.Tensor]) -> str:
        self._tensors[block] = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        return hashlib.sha256(save(self._tensors[block])).hexdigest()

    def get(self, block: int, digest: str) -> dict[str, torch.Tensor]:
        return self._tensors[block]

    def save(self, folder: Path, blocks: Iterable[int]) -> None:
        target = NumbersInFolder(folder)
        for block in blocks:
            target.put(block, self._tensors[block])


class NumbersInFolder:
    """One safetensors file a block, there as a whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, block: int, tensors: Mapping[str, torch.Tensor]) -> str:
        with atomic_file(self._file(block), durable=True) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        return sha256_of_file(self._file(block))

    def get(self, block: int, digest: str) -> dict[str, torch.Tensor]:
        file = self._file(block)
        if not file.is_file():
            raise PlanError(
                f"the new weights of block {block} are not at {file}; a plan inside a finished result has none beside it (they "
                "are in the result), so make one with: secateur plan"
            )
        if sha256_of_file(file) != digest:
            raise PlanError(f"{file} is not the file that the plan was saved with; it is damaged or another plan's")
        return _read(file)

    def save(self, folder: Path, blocks: Iterable[int]) -> None:
        """They are linked where the disk is the same: a model's worth of numbers is not written twice."""
        if folder == self.folder:
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for block in blocks:
            source, target = self._file(block), NumbersInFolder(folder)._file(block)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:04d}.safetensors"


def _size(view: object) -> int:
    return torch.Size(view.get_shape()).numel() if view.get_dtype() == "U8" else -1  # type: ignore[attr-defined]


def _read(file: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Copies of the tensors whose names begin so: the file is mapped only while it is read, for mapped pages are memory."""
    try:
        with safe_open(file, framework="pt") as stream:
            names = [name for name in stream.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
            return {name.removeprefix(prefix): stream.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError) as error:
        raise PlanError(f"{file} cannot be read ({error}); make the plan again") from error


def as_text(entry: Mapping[str, object]) -> str:
    """An entry of the plan in the form that stores keep."""
    return json.dumps(entry, ensure_ascii=False)
