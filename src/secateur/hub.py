"""Handing a finished folder to the hub."""

from __future__ import annotations

from pathlib import Path

from secateur.console import log
from secateur.errors import OutputError, reason_of


def push_folder(folder: Path, repository: str) -> None:
    """Upload a finished folder with huggingface_hub.

    Raises:
        OutputError: the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:
        reason = reason_of(error)
        raise OutputError(f"{folder} is finished, but could not be pushed to {repository}: {reason}") from error
    log.info("Pushed to https://huggingface.co/%s", repository)
