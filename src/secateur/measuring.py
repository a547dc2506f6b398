"""The evaluation stage: open what the user names, and set a pruned model beside the one it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.checkpoint.reader import open_checkpoint
from secateur.console import log
from secateur.errors import SecateurError
from secateur.evaluation import PROMPT, Evaluation, evaluate
from secateur.evaluation.tasks import TaskEvaluation, evaluate_tasks
from secateur.loading import load
from secateur.origin import pruned_from, recovered_from
from secateur.report.card import refresh_card
from secateur.report.measured import PERPLEXITY, TASKS, note_measured
from secateur.report.page import write_run_page
from secateur.workers import alone as in_one_process


def evaluate_models(
    specs: Sequence[str],
    text: str = "python-docs",
    window_length: int | None = None,
    max_windows: int | None = 32,
    alone: bool = False,
    speed: bool = True,
    trust_remote_code: bool = False,
    prompts: Sequence[str] = (PROMPT,),
) -> Evaluation:
    """Measure every model of ``specs`` on the same windows; the first is the yardstick.

    A single pruned folder is measured beside the model it was made from, a recovered one beside the pruned one too, unless
    ``alone`` or these are not here. The figures go into the page and the card of every folder that Secateur wrote.

    Args:
        prompts: beginnings that every model continues, to be read side by side on the page.

    Raises:
        SecateurError: a model or the text cannot be opened.
    """
    in_one_process("evaluate")
    folders = _folders(specs, alone, trust_remote_code)
    evaluation = evaluate(
        folders,
        text=text,
        window_length=window_length,
        max_windows=max_windows,
        load=_loader(trust_remote_code),
        speed=speed,
        prompts=prompts,
    )
    note_everywhere(folders, PERPLEXITY, evaluation.to_json())
    return evaluation


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
    in_one_process("evaluate")
    folders = _folders(specs, alone, trust_remote_code)
    evaluation = evaluate_tasks(
        folders,
        tasks,
        load=_loader(trust_remote_code, dtype="auto"),
        folder=tasks_dir,
        limit=limit,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
    note_everywhere(folders, TASKS, evaluation.to_json())
    return evaluation


def note_everywhere(folders: Mapping[str, Path], part: str, evaluation: Mapping[str, Any]) -> None:
    """Put what was measured into the page and the card of every folder among ``folders`` that Secateur wrote."""
    origins = {name: _opened(pruned_from(folder)) for name, folder in folders.items()}
    for name, folder in folders.items():
        dense = next((other for other, place in folders.items() if place == origins[name]), None)
        if note_measured(folder, part, {**evaluation, "roles": {"own": name, "dense": dense}}):
            refresh_card(folder)
            log.info("The figures are in %s too.", write_run_page(folder))


def _folders(specs: Sequence[str], alone: bool, trust_remote_code: bool) -> dict[str, Path]:
    folders = {spec: open_checkpoint(spec, trust_remote_code).folder for spec in dict.fromkeys(specs)}
    if len(folders) == 1 and not alone:
        folders = _origins(next(iter(folders.values()))) | folders
    return _short_names(folders)


def _loader(trust_remote_code: bool, **options: Any) -> Any:
    return lambda folder: load(folder, **options, **({"trust_remote_code": True} if trust_remote_code else {}))


def _origins(folder: Path) -> dict[str, Path]:
    """The dense model that a folder was pruned from and, if it was recovered, the pruned one, as far as they are here."""
    spec, found = pruned_from(folder), dict[str, Path]()
    if spec is None:
        return found
    dense = _opened(spec)
    if dense is None:
        log.warning("The model it was pruned from (%s) is not here; measuring it alone.", spec)
        return found
    found[spec] = dense
    before = recovered_from(folder)
    tuned = _opened(before)
    if before is not None and tuned is not None:
        found[before] = tuned
    return found


def _opened(spec: str | None) -> Path | None:
    try:
        return open_checkpoint(spec).folder if spec is not None else None
    except SecateurError:
        return None


def _short_names(folders: dict[str, Path]) -> dict[str, Path]:
    """Last parts of paths as column heads, where they are all different."""
    short = {Path(spec).name or spec: folder for spec, folder in folders.items()}
    return short if len(short) == len(folders) else folders
