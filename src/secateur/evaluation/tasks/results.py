"""What several models made of the same tasks: scores, their mean, and the share of the first model's that was kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.calibration.tokenise import load_tokenizer
from secateur.checkpoint.architecture import is_causal
from secateur.console import log
from secateur.errors import RecipeError, SecateurError
from secateur.evaluation.tasks.finding import Tasks, chosen_tasks, open_tasks
from secateur.evaluation.tasks.harness import RawScores, score

ACCURACY, NORMALISED = "acc", "acc_norm"


@dataclass(frozen=True)
class Score:
    """One figure of one task.

    Attributes:
        value: as lm-eval gives it; accuracies are shares from 0 to 1.
        standard_error: of ``value``; None where lm-eval has none.
        higher_is_better: whether more is better.
    """

    value: float
    standard_error: float | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskScores:
    """What one model made of the tasks.

    Attributes:
        folder: the model's.
        dtype: in which it computed, the one that it is stored in.
        scores: by task and metric.
        means: of ``acc`` and ``acc_norm`` over the tasks. Of a task without ``acc_norm`` its ``acc`` counts there.
        kept: of each mean the share of the first model's; empty for the first.
        cut: requests longer than the model's positions, which lost their beginning.
    """

    folder: str
    dtype: str
    scores: dict[str, dict[str, Score]]
    means: dict[str, Score]
    kept: dict[str, float]
    cut: int


@dataclass(frozen=True)
class TaskEvaluation:
    """Models by name, in the order given; the first is the yardstick.

    Attributes:
        models: the scores of each.
        questions: how many each task had, the same ones for every model.
        versions: of the tasks' definitions.
        protocol: what was asked and how, for people.
    """

    models: dict[str, TaskScores]
    questions: dict[str, int]
    versions: dict[str, Any]
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """Everything as plain dicts, strings and numbers."""
        return asdict(self)

    def table(self) -> Any:
        """The scores for people."""
        from secateur.report.tasks import tasks_table

        return tasks_table(self)


def evaluate_tasks(
    models: Mapping[str, Path],
    tasks: str | Sequence[str],
    *,
    load: Callable[[Path], nn.Module],
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    trust_remote_code: bool = False,
) -> TaskEvaluation:
    """Put the same questions to every model, one model in memory at a time.

    Args:
        models: name to folder; the first is what the others are compared with.
        tasks: names of lm-eval tasks; ``lambada`` is ``lambada_openai``.
        load: turns a folder into a model, in the dtype it is stored in.
        folder: local questions and task files; None: lm-eval's own tasks, from the hub or its cache.
        limit: the first so many questions of each task.
        batch_size: requests at once.
        trust_remote_code: run code that comes with a tokenizer, or that a task file in ``folder`` names.

    Raises:
        CalibrationError: a model has no tokenizer.
        ModelError: a model does not load.
        RecipeError: no task, or a limit or batch below 1.
        SecateurError: there is no model, or one that does not write text.
        TaskError: a task is unknown, or its questions cannot be had or are damaged.
    """
    if not models:
        raise SecateurError("there is no model to evaluate; name at least one")
    for flag, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise RecipeError(f"{flag} has to be at least 1, not {value}")
    opened = open_tasks(chosen_tasks(tasks), folder, trust_remote_code)
    for model_folder in models.values():
        load_tokenizer(model_folder, trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured: dict[str, TaskScores] = {}
    for name, model_folder in models.items():
        model = load(model_folder).to(device)
        if not is_causal(model.config):
            raise SecateurError(
                f"{name} is a {type(model).__name__}, which does not write text, so tasks cannot be put to it; "
                "evaluate a causal language model"
            )
        raw = score(model, model_folder, opened, limit, batch_size, name, trust_remote_code)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        del model
        if raw.cut:
            log.warning("%s: %d requests were longer than its positions and lost their beginning.", name, raw.cut)
        first = next(iter(measured.values()), None)
        measured[name] = _scores(raw, opened, str(model_folder), dtype, first)
    counts = {task: raw.counts[task] for task in opened.names if task in raw.counts}
    versions = {task: raw.versions[task] for task in opened.names if task in raw.versions}
    return TaskEvaluation(measured, counts, versions, _protocol(measured, opened, limit, batch_size))


def _scores(raw: RawScores, tasks: Tasks, folder: str, dtype: str, first: TaskScores | None) -> TaskScores:
    scores = {task: _figures(raw.results[task], raw.higher_is_better.get(task, {})) for task in tasks.names}
    means = _means(list(scores.values()))
    kept = {}
    if first is not None:
        kept = {
            metric: mean.value / first.means[metric].value
            for metric, mean in means.items()
            if first.means[metric].value
        }
    return TaskScores(folder, dtype, scores, means, kept, raw.cut)


def _figures(figures: Mapping[str, Any], higher_is_better: Mapping[str, bool]) -> dict[str, Score]:
    """lm-eval's ``metric,filter`` and ``metric_stderr,filter`` as scores; the filter is named where it is not ``none``."""
    scores = {}
    for key, value in figures.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{filtered}")
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        known = float(error) if isinstance(error, int | float) else None
        scores[name] = Score(float(value), known, bool(higher_is_better.get(metric, True)))
    return scores


def _means(tasks: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    means = {}
    plain = [scores[ACCURACY] for scores in tasks if ACCURACY in scores]
    if plain:
        means[ACCURACY] = mean_of(plain)
    if any(NORMALISED in scores for scores in tasks):
        means[NORMALISED] = mean_of(
            [
                scores.get(NORMALISED) or scores[ACCURACY]
                for scores in tasks
                if NORMALISED in scores or ACCURACY in scores
            ]
        )
    return means


def mean_of(scores: Sequence[Score]) -> Score:
    """The mean of tasks' scores, each task counting alike; its standard error is that of independent tasks."""
    errors = [score.standard_error for score in scores]
    known = [error for error in errors if error is not None]
    error = math.sqrt(sum(error**2 for error in known)) / len(known) if len(known) == len(errors) else None
    return Score(sum(score.value for score in scores) / len(scores), error)


def _protocol(models: Mapping[str, TaskScores], tasks: Tasks, limit: int | None, batch_size: int) -> str:
    from importlib.metadata import version

    dtypes = " / ".join(dict.fromkeys(scores.dtype for scores in models.values()))
    asked = f"the first {limit} questions of each task" if limit else "all questions"
    text = (
        f"lm-eval {version('lm-eval')}, {asked}, from {tasks.source}; no examples before a question, no chat template, "
        f"batch {batch_size}, {dtypes}. ± is one standard error."
    )
    scored = [scores for scores in next(iter(models.values())).scores.values() if {ACCURACY, NORMALISED} & set(scores)]
    if len(scored) > 1:
        text += f" Means are over {len(scored)} tasks; in acc_norm's, a task without it counts with its acc."
    if limit:
        text += " A part of the questions is for a quick look and not for comparison with published figures."
    return text
