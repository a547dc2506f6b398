"""Reading a folder of safetensors: which tensor is where, whether they fit the config, and their bytes on demand."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secateur.checkpoint.manifest import check_manifest
from secateur.checkpoint.skeleton import Skeleton, build_skeleton, load_config
from secateur.checkpoint.source import ModelSource, resolve_model
from secateur.console import track
from secateur.errors import ModelError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
NOT_WEIGHTS = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", ".attn.bias", ".attn.masked_bias")
"""Buffers that older checkpoints stored and the model computes itself."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies, and what it is."""

    file: Path
    stored_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """A model folder opened for reading: its config, its weightless model and its tensors by the model's names."""

    def __init__(self, source: ModelSource, skeleton: Skeleton, tensors: dict[str, StoredTensor]) -> None:
        self.source = source
        self.skeleton = skeleton
        self.tensors = tensors

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def config(self) -> Any:
        return self.skeleton.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        counts: dict[torch.dtype, int] = defaultdict(int)
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.bytes
        return max(counts, key=lambda dtype: counts[dtype])

    def parameters(self) -> int:
        """How many numbers the model stores (tied tensors once)."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors by name, in the dtype they are stored in; files are closed before returning.

        Raises:
            ModelError: a file cannot be read.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.tensors[name].file].append(name)
        found = {}
        for file, members in by_file.items():
            with _opened(file) as stream:
                for name in members:
                    found[name] = stream.get_tensor(self.tensors[name].stored_name)
        return found

    def block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Block ``index``'s tensors as stored, by their names inside the block."""
        prefix = self.skeleton.block_prefix(index)
        names = [prefix + name for name in self.skeleton.block_names(index)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.read(names).items()}

    def outer_names(self) -> list[str]:
        """Names of the stored tensors outside the blocks: embeddings, final norm, head."""
        inside = self.skeleton.blocks_name + "."
        return [name for name in self.tensors if not name.startswith(inside)]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and bytes and over the config; equal for a re-sharded copy.

        The same pass looks at every number, once.

        Raises:
            ModelError: a weight is NaN or infinite.
        """
        names = sorted(self.tensors)
        with ThreadPoolExecutor(max_workers=2) as pool:
            digests = list(track(pool.map(self._tensor_digest, names), "Reading the weights", total=len(names)))
        config = {k: v for k, v in self.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, digest in zip(names, digests, strict=True):
            total.update(f"{name}\n{digest}\n".encode())
        return total.hexdigest()

    def _tensor_digest(self, name: str) -> str:
        tensor = self.read([name])[name]
        if not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "an infinite value"
            raise ModelError(
                f"the weight '{name}' in {self.tensors[name].file} holds {kind}; the file is damaged or the model "
                "diverged in training: get it again"
            )
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        return digest.hexdigest()


def open_checkpoint(spec: str, trust_remote_code: bool = False) -> Checkpoint:
    """Open the model that ``spec`` names and check that its files are whole and fit its config.

    Raises:
        ModelError: missing, truncated, pickled, quantised or mismatched; the sentence says which and where.
    """
    source = resolve_model(spec)
    stored = _stored_tensors(source.folder)
    check_manifest(source.folder)
    skeleton = build_skeleton(load_config(source.folder, trust_remote_code), trust_remote_code)
    return Checkpoint(source, skeleton, _matched(source.folder, skeleton, stored))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing; download or copy it again") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is not a whole safetensors file ({error}); it is truncated or damaged: get it again"
        ) from error


def _check_ties(tied: dict[str, str], stored: dict[str, StoredTensor], matched: dict[str, StoredTensor]) -> None:
    """A file may hold both names of a tied weight; where their numbers differ the config is wrong about the tie."""
    for name, source in tied.items():
        if name not in stored or source not in matched or stored[name] == matched[source]:
            continue
        pair = []
        for place in (stored[name], matched[source]):
            with _opened(place.file) as stream:
                pair.append(stream.get_tensor(place.stored_name))
        if not torch.equal(*pair):
            raise ModelError(
                f"the config ties '{name}' to '{source}', but {stored[name].file} holds different numbers for them; "
                "set tie_word_embeddings to false in config.json"
            )


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    found = {}
    for file in _weight_files(folder):
        with _opened(file) as stream:
            for name in stream.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                view = stream.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise ModelError(
                        f"the tensor '{name}' in {file} is stored as {view.get_dtype()}; only fp32, fp16, bf16 and fp64 "
                        "weights are read: give the model before quantisation"
                    )
                found[name] = StoredTensor(file, name, dtype, tuple(view.get_shape()))
    return found


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / shard for shard in shards]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not a readable index of shards; download it again") from error
    for file in files:
        if not file.is_file():
            raise ModelError(f"{index} names the shard {file.name}, which is missing from {folder}; download it again")
    return files


def _matched(folder: Path, skeleton: Skeleton, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Give every tensor of the model its place in the files, checking names and shapes both ways."""
    prefix = getattr(skeleton.model, "base_model_prefix", "") + "."
    tied = skeleton.tied()
    matched, used = {}, set()
    for name, shape in skeleton.shapes().items():
        # A checkpoint of the bare model (no head) is stored without the prefix that the causal model gives its names.
        stored_name = next((n for n in (name, name.removeprefix(prefix)) if n in stored), None)
        if stored_name is not None:
            used.add(stored_name)
        if name in tied:
            continue
        if stored_name is None:
            raise ModelError(
                f"the config asks for the weight '{name}', which {folder} does not hold; they do not belong together, or transformers stores this family under other names, which is not read yet"
            )
        found = stored[stored_name]
        if found.shape != tuple(shape):
            raise ModelError(
                f"the weight '{name}' in {found.file} has shape {list(found.shape)}, but the config asks for {list(shape)}; "
                "config.json and weights do not belong together"
            )
        matched[name] = found
    _check_ties(tied, stored, matched)
    ignored = tuple(getattr(skeleton.model, "_keys_to_ignore_on_load_unexpected", None) or ())
    for name in stored.keys() - used:
        if not name.endswith(NOT_WEIGHTS) and not any(pattern in name for pattern in ignored):
            raise ModelError(
                f"{folder} holds the weight '{name}', which the config has no place for; config.json and weights do not belong together"
            )
    return matched
