"""A model put to tasks by lm-eval's own language model and evaluator.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.console import progress
from secateur.errors import TaskError, reason_of
from secateur.evaluation.tasks.finding import Tasks
from secateur.evaluation.tasks.quiet import quiet

RESAMPLES = 1000
"""Bootstrap samples for the standard error of what is no mean, LAMBADA's perplexity; lm-eval's own 100,000 take minutes."""


@dataclass(frozen=True)
class RawScores:
    """What lm-eval gives for one model.

    Attributes:
        results: of each task or group lm-eval's own figures, by ``metric,filter`` and ``metric_stderr,filter``.
        counts: how many questions each had.
        versions: of each task's definition.
        higher_is_better: of each task's metrics.
        cut: requests that were longer than the model's positions and lost their beginning.
    """

    results: dict[str, dict[str, Any]]
    counts: dict[str, int] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    higher_is_better: dict[str, dict[str, bool]] = field(default_factory=dict)
    cut: int = 0


def score(
    model: Any, tokenizer_folder: Path, tasks: Tasks, limit: int | None, batch_size: int, name: str, trusted: bool
) -> RawScores:
    """Put the questions to ``model``, without examples before them and without a chat template, as lm-eval does by default.

    Args:
        model: a causal language model of transformers, where it is to compute.
        tokenizer_folder: the folder of its tokenizer.
        limit: ask the first so many questions of each task; None: all.
        batch_size: requests at once; beyond 1, padding may move a figure's last bits.
        name: of the model, for the progress bar.
        trusted: run code that comes with the tokenizer.

    Raises:
        TaskError: a question or task does not work with this model.
    """
    with quiet(tasks.trusted) as cut:
        from jinja2 import TemplateError
        from lm_eval.api.model import CacheHook
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        language_model = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=str(tokenizer_folder),
            batch_size=batch_size,
            trust_remote_code=trusted,
        )
        hook = _counting(CacheHook)
        language_model.set_cache_hook(hook)
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(language_model, kind, _with_progress(getattr(language_model, kind), hook, f"Tasks: {name}"))
        try:
            raw = simple_evaluate(
                language_model,
                tasks=list(tasks.objects),
                limit=limit,
                log_samples=False,
                bootstrap_iters=RESAMPLES,
                task_manager=tasks.manager,
            )
        except (ValueError, AssertionError, TemplateError) as error:
            raise TaskError(f"the tasks cannot be put to {name}: {reason_of(error)}") from error
    return RawScores(
        results={task: dict(figures) for task, figures in raw["results"].items()},
        counts={task: int(counts["effective"]) for task, counts in raw["n-samples"].items()},
        versions=dict(raw["versions"]),
        higher_is_better={task: dict(known) for task, known in raw["higher_is_better"].items()},
        cut=len(cut),
    )


def _counting(base: type) -> Any:
    """lm-eval tells its cache of every answer, which is where they can be counted."""

    class Counting(base):
        def __init__(self) -> None:
            super().__init__(None)
            self.answered: Callable[[], None] = lambda: None

        def add_partial(self, attr: str, req: Any, res: Any) -> None:
            self.answered()

    return Counting()


def _with_progress(ask: Callable[..., Any], hook: Any, description: str) -> Callable[..., Any]:
    def asking(requests: Any, *arguments: Any, **named: Any) -> Any:
        with progress(description, len(requests), "question") as advance:
            hook.answered = advance
            return ask(requests, *arguments, **named)

    return asking
