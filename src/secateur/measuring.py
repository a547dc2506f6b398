"""The evaluation stage: open what the user names, and set a pruned model beside the one it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.reader import open_checkpoint
from secateur.console import log
from secateur.errors import SecateurError
from secateur.evaluation import Evaluation, evaluate
from secateur.loading import load
from secateur.origin import pruned_from


def evaluate_models(
    specs: Sequence[str],
    text: str = "python-docs",
    window_length: int | None = None,
    max_windows: int | None = 32,
    alone: bool = False,
    speed: bool = True,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Measure every model of ``specs`` on the same windows; the first is the yardstick.

    A single pruned folder is measured beside the model it was made from, unless ``alone`` or that model is not here.

    Raises:
        SecateurError: a model or the text cannot be opened.
    """
    folders = {spec: open_checkpoint(spec, trust_remote_code).folder for spec in dict.fromkeys(specs)}
    if len(folders) == 1 and not alone:
        folders = _original(next(iter(folders.values()))) | folders
    return evaluate(
        _short_names(folders),
        text=text,
        window_length=window_length,
        max_windows=max_windows,
        load=_loader(trust_remote_code),
        speed=speed,
    )


def _loader(trust_remote_code: bool) -> Any:
    return lambda folder: load(folder, **({"trust_remote_code": True} if trust_remote_code else {}))


def _original(folder: Path) -> dict[str, Path]:
    spec = pruned_from(folder)
    if spec is None:
        return {}
    try:
        return {spec: open_checkpoint(spec).folder}
    except SecateurError:
        log.warning("The model it was pruned from (%s) is not here; measuring it alone.", spec)
        return {}


def _short_names(folders: dict[str, Path]) -> dict[str, Path]:
    """Last parts of paths as column heads, where they are all different."""
    short = {Path(spec).name or spec: folder for spec, folder in folders.items()}
    return short if len(short) == len(folders) else folders
