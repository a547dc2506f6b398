"""The record that a written folder carries: hashes of its weight files, so that even one flipped bit is seen later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from secateur.errors import ModelError
from secateur.files import sha256_of_file, write_json

RECORD = "secateur"
"""The subfolder for plan, masks, recipe and log, where no loader mistakes them for weights."""

FILES = "files.json"


def write_manifest(folder: Path, files: Sequence[Path]) -> None:
    """Record the hashes of the weight files of ``folder``."""
    (folder / RECORD).mkdir(exist_ok=True)
    write_json(folder / RECORD / FILES, {file.name: sha256_of_file(file) for file in files})


def check_manifest(folder: Path) -> None:
    """Compare the weight files with the record, where there is one.

    Raises:
        ModelError: a file has changed since it was written.
    """
    manifest = folder / RECORD / FILES
    if not manifest.is_file():
        return
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))
        named = [(folder / name, digest) for name, digest in expected.items()]
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{manifest} is damaged; write the model again, or remove it to skip the check") from error
    for file, digest in named:
        if file.is_file() and sha256_of_file(file) != digest:
            raise ModelError(
                f"{file} has changed since Secateur wrote it (its bytes no longer match {manifest}); write it again, or "
                "remove that record where the change was meant"
            )
