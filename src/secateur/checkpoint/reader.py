"""Reading a folder of safetensors: which tensor is where, whether they fit the config, and their bytes on demand."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from secateur.checkpoint.carved import check_runs
from secateur.checkpoint.conversion import Origin, StoredTensor, find_origins, usual_name
from secateur.checkpoint.manifest import check_manifest
from secateur.checkpoint.readahead import Readahead
from secateur.checkpoint.skeleton import Skeleton, build_skeleton, load_config
from secateur.checkpoint.source import ModelSource, resolve_model
from secateur.console import log, track
from secateur.errors import ModelError, reason_of

WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
OTHER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
"""Of indices and flags that some families keep beside their weights; as weights they would be quantised ones."""

NOT_WEIGHTS = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", ".attn.bias", ".attn.masked_bias")
"""Buffers that older checkpoints stored and the model computes itself."""


PART_BYTES = 1 << 25
"""Of a tensor, looked at together when all weights are read through: an embedding alone may have a gigabyte."""


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of the model as it will be read, and what it is made of."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    origin: Origin

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """A model folder opened for reading: its config, its weightless model and its tensors by the model's names."""

    def __init__(self, source: ModelSource, skeleton: Skeleton, tensors: dict[str, ModelTensor]) -> None:
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
            counts[tensor.dtype] += tensor.bytes * tensor.dtype.is_floating_point
        return max(counts, key=lambda dtype: counts[dtype])

    def parameters(self) -> int:
        """How many numbers the model stores (tied tensors once)."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.stored())

    def stored(self) -> list[ModelTensor]:
        """The tensors that files hold."""
        return [tensor for tensor in self.tensors.values() if tensor.origin.sources]

    @property
    def computed_hash(self) -> str:
        """What names all that is measured of it: adding a bias of zero takes another kernel, whose sums may round otherwise."""
        added = sorted(name for name, tensor in self.tensors.items() if not tensor.origin.sources)
        return f"{self.content_hash} with {' '.join(added)}" if added else self.content_hash

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors by name, in the dtype they are stored in; files are closed before returning.

        Raises:
            ModelError: a file cannot be read.
        """
        names = list(names)
        found: dict[str, torch.Tensor] = {}
        with _Files() as files:
            for name in names:
                if name not in found:  # several may come from one stored tensor
                    found |= self.tensors[name].origin.make(self.skeleton.model, files.get)
        return {name: found[name] for name in names}

    def block_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Block ``index``'s tensors as stored, by their names inside the block."""
        prefix = self.skeleton.block_prefix(index)
        names = [prefix + name for name in self.skeleton.block_names(index)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.read(names).items()}

    def read_ahead(self, index: int) -> None:
        """Have block ``index`` brought near while another computes."""
        prefix = self.skeleton.block_prefix(index)
        names = (prefix + name for name in self.skeleton.block_names(index))
        self._readahead.start(source for name in names for source in self.tensors[name].origin.sources)

    @cached_property
    def _readahead(self) -> Readahead:
        return Readahead()

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

    def take_hash(self, digest: str) -> None:
        """Believe another worker, which has read every number of the same files."""
        self.__dict__["content_hash"] = digest

    def _tensor_digest(self, name: str) -> str:
        tensor = self.tensors[name]
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in self._parts(name):
            if not torch.isfinite(part).all():
                raise ModelError(self._damaged(name))
            digest.update(part.reshape(-1).view(torch.uint8).numpy().data if part.numel() else b"")
        return digest.hexdigest()

    def _parts(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's numbers in order, some at a time; its file is mapped no longer than a part is looked at."""
        tensor = self.tensors[name]
        if tensor.origin.converter is None and tensor.shape:
            rows = max(1, PART_BYTES * tensor.shape[0] // max(1, tensor.bytes))
            for start in range(0, tensor.shape[0], rows):
                with _Files() as files:
                    yield files.rows(tensor.origin.sources[0], start, start + rows)
        else:
            whole = self.read([name])[name]
            yield from whole.reshape(-1).split(max(1, PART_BYTES // whole.element_size()))

    def _damaged(self, name: str) -> str:
        """Which stored tensor behind ``name`` is not finite."""
        with _Files() as files:
            for source in self.tensors[name].origin.sources:
                tensor = files.get(source)
                if not torch.isfinite(tensor).all():
                    kind = "NaN" if torch.isnan(tensor).any() else "an infinite value"
                    return (
                        f"the weight '{source.stored_name}' in {source.file} holds {kind}; the file is damaged or the "
                        "model diverged in training: get it again"
                    )
        return f"the weight '{name}' is not finite once transformers has converted it; get the model again"


def open_checkpoint(spec: str, trust_remote_code: bool = False) -> Checkpoint:
    """Open the model that ``spec`` names and check that its files are whole and fit its config.

    Raises:
        ModelError: missing, truncated, pickled, quantised or mismatched; the sentence says which and where.
    """
    source = resolve_model(spec)
    stored = _stored_tensors(source.folder)
    check_manifest(source.folder)
    skeleton = build_skeleton(load_config(source.folder, trust_remote_code), trust_remote_code)
    matched = _matched(source.folder, skeleton, stored)
    check_runs(skeleton.model, source.folder)
    return Checkpoint(source, skeleton, matched)


class _Files:
    """Safetensors files, opened when first read from and closed together."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._streams: dict[Path, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def stream(self, file: Path) -> Any:
        if file not in self._streams:
            with _unreadable_is_an_error(file):
                self._streams[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        return self._streams[file]

    def get(self, place: StoredTensor) -> torch.Tensor:
        with _unreadable_is_an_error(place.file):
            return self.stream(place.file).get_tensor(place.stored_name)

    def rows(self, place: StoredTensor, start: int, stop: int) -> torch.Tensor:
        """Some entries of the first dimension."""
        with _unreadable_is_an_error(place.file):
            part: torch.Tensor = self.stream(place.file).get_slice(place.stored_name)[start:stop]
            return part


@contextmanager
def _unreadable_is_an_error(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing; download or copy it again") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is not a whole safetensors file ({error}); it is truncated or damaged: get it again"
        ) from error


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    found = {}
    with _Files() as files:
        for file in _weight_files(folder):
            stream, offsets = files.stream(file), _offsets(file)
            for name in stream.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                view = stream.get_slice(name)
                dtype = (WEIGHT_DTYPES | OTHER_DTYPES).get(view.get_dtype())
                if dtype is None:
                    raise ModelError(_wrong_dtype(name, file, view.get_dtype()))
                found[name] = StoredTensor(file, name, dtype, tuple(view.get_shape()), offsets[name])
    return found


def _offsets(file: Path) -> dict[str, int]:
    """Where each tensor begins: the header of a file that safetensors has accepted says so."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _wrong_dtype(name: str, file: Path, dtype: str) -> str:
    return (
        f"the tensor '{name}' in {file} is stored as {dtype}; only fp32, fp16, bf16 and fp64 "
        "weights are read: give the model before quantisation"
    )


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


def _matched(folder: Path, skeleton: Skeleton, stored: dict[str, StoredTensor]) -> dict[str, ModelTensor]:
    """Give every tensor of the model its place in the files, checking names and shapes both ways."""
    model, tied = skeleton.model, skeleton.tied()
    origins = find_origins(model, stored)
    found = {name: tensor for origin in origins for name, tensor in _described(model, origin).items()}
    for name, source in tied.items():
        if source not in found and name in found:  # of a tie either name may be the one that is stored
            found[source] = replace(found[name], origin=replace(found[name].origin, name=source))
    matched = {}
    for name, wanted in model.state_dict().items():
        if name not in found and name not in tied:
            raise ModelError(
                f"the config asks for the weight '{usual_name(model, name)}', which {folder} does not hold; "
                "config.json and weights do not belong together"
            )
        if name in found:
            _check_fit(found[name], wanted)
            matched[name] = found[name]
    _check_ties(skeleton, matched)
    used = {source.stored_name for origin in origins for source in origin.sources}
    _check_left_over(folder, skeleton, sorted(stored.keys() - used))
    return {name: tensor for name, tensor in matched.items() if name not in tied}


def _described(model: Any, origin: Origin) -> dict[str, ModelTensor]:
    """What ``origin`` makes, found by letting transformers convert tensors without numbers."""

    def weightless(source: StoredTensor) -> torch.Tensor:
        return torch.empty(source.shape, dtype=source.dtype, device="meta")

    try:
        made = origin.make(model, weightless)
    except Exception as error:
        raise ModelError(
            f"the weights {origin.describe()} cannot be joined into '{origin.name}' ({reason_of(error)}); one of them "
            "is missing or has another shape: get the model again"
        ) from error
    return {name: ModelTensor(tensor.dtype, tuple(tensor.shape), origin) for name, tensor in made.items()}


def _check_fit(found: ModelTensor, wanted: torch.Tensor) -> None:
    if found.shape != tuple(wanted.shape):
        raise ModelError(
            f"the weight {found.origin.describe()} has shape {list(found.shape)}, but the config asks for "
            f"{list(wanted.shape)}; config.json and weights do not belong together"
        )
    for source in found.origin.sources:
        if source.dtype.is_floating_point != wanted.dtype.is_floating_point:
            raise ModelError(_wrong_dtype(source.stored_name, source.file, str(source.dtype).removeprefix("torch.")))


def _check_ties(skeleton: Skeleton, matched: dict[str, ModelTensor]) -> None:
    """A file may hold both names of a tied weight; where their numbers differ the config is wrong about the tie."""
    for name, source in skeleton.tied().items():
        if name not in matched or matched[name].origin.sources == matched[source].origin.sources:
            continue
        with _Files() as files:
            left, right = (matched[n].origin.make(skeleton.model, files.get)[n] for n in (name, source))
        if not torch.equal(left, right):
            held = matched[name].origin.sources[0]
            raise ModelError(
                f"the config ties '{held.stored_name}' to '{matched[source].origin.sources[0].stored_name}', but "
                f"{held.file} holds different numbers for them; set tie_word_embeddings to false in config.json"
            )


def _check_left_over(folder: Path, skeleton: Skeleton, names: list[str]) -> None:
    """Stored tensors without a place are an error, save what the model computes itself and heads that it lacks."""
    model = skeleton.model
    ignored = tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    computed = {name for name, _ in model.named_buffers()}
    prefix, modules = f"{model.base_model_prefix}.", {name for name, _ in model.named_modules()}
    heads = []
    for name in names:
        full = {name, prefix + name}
        if name.endswith(NOT_WEIGHTS) or full & computed or any(re.search(pattern, name) for pattern in ignored):
            continue
        inside = any(n.startswith(f"{skeleton.blocks_name}.") for n in full)
        if inside or any(n.rpartition(".")[0] in modules for n in full):
            raise ModelError(
                f"{folder} holds the weight '{name}', which the config has no place for; config.json and weights do not belong together"
            )
        heads.append(name)
    if heads:
        log.warning(
            "%d stored weights belong to a head that %s does not have, and are left out: %s.",
            len(heads),
            type(model).__name__,
            ", ".join(heads[:4]) + (", ..." if len(heads) > 4 else ""),
        )
