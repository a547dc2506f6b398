"""The evaluation stage: open what the user names, and set a pruned model beside the one it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.reader import open_checkpoint
from secateur.console import log
from secateur.errors import SecateurError
from secateur.evaluation import Evaluation, evaluate
from secateur.evaluation.tasks import TaskEvaluation, evaluate_tasks
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
    return evaluate(
        _folders(specs, alone, trust_remote_code),
        text=text,
        window_length=window_length,
        max_windows=max_windows,
        load=_loader(trust_remote_code),
        speed=speed,
    )


def evaluate_models_on_tasks(
    specs: Sequence[str],
    tasks: str | Sequence[str],
    tasks_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    alone: bool = False,
    trust_remote_code: bool = False,
) -> TaskEvaluation:
    """Put lm-eval's tasks to every model of ``specs``, in the dtype it is stored in; the first is the yardstick.

    Args:
        specs: models; a single pruned folder is measured beside its origin, as in ``evaluate_models``.
        tasks: their names, in a list or with commas between.
        tasks_dir: a folder with questions as JSON Lines, task files of lm-eval, or both; None: lm-eval's own, from the hub.
        limit: the first so many questions of each task, the same for every model.
        batch_size: requests at once.
        alone: do not set a pruned model beside its origin.
        trust_remote_code: run code that comes with a model, or that a task file names.

    Raises:
        SecateurError: a model, a task or its questions cannot be had or used; in one sentence.
    """
    return evaluate_tasks(
        _folders(specs, alone, trust_remote_code),
        tasks,
        load=_loader(trust_remote_code, dtype="auto"),
        folder=tasks_dir,
        limit=limit,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )


def _folders(specs: Sequence[str], alone: bool, trust_remote_code: bool) -> dict[str, Path]:
    folders = {spec: open_checkpoint(spec, trust_remote_code).folder for spec in dict.fromkeys(specs)}
    if len(folders) == 1 and not alone:
        folders = _original(next(iter(folders.values()))) | folders
    return _short_names(folders)


def _loader(trust_remote_code: bool, **options: Any) -> Any:
    return lambda folder: load(folder, **options, **({"trust_remote_code": True} if trust_remote_code else {}))


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
