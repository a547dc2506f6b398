"""Secateur prunes large language models and hands back a checkpoint that ordinary tools load.

The same stages as the command line::

    import secateur

    secateur.prune("smollm2", "smaller", criterion="taylor", unit="channel", ratio=0.25)
    model = secateur.load("smaller")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "compare", "evaluate", "evaluate_tasks", "load", "plan", "prune", "recover"]

if TYPE_CHECKING:
    from secateur.comparison import Comparison
    from secateur.evaluation import Evaluation
    from secateur.evaluation.tasks import TaskEvaluation
    from secateur.plans import Plan
    from secateur.run import Result

# Everything heavy is imported when it is called, so that `import secateur` and `secateur --help` stay fast.


def prune(
    model: str,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    evaluate_on: str | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    other_workers: bool = False,
    **fields: Any,
) -> Result:
    """Prune ``model`` into the folder ``out``.

    Args:
        model: folder, GGUF file, hub id or ``smollm2``.
        recipe: a YAML file with the same fields; ``fields`` win.
        evaluate_on: text to measure perplexity on, before and after.
        other_workers: go on with an interrupted run although it was begun with another number of workers.
        fields: any field of ``secateur.recipe.Recipe``: ``criterion``, ``unit``, ``ratio``, ``calibration``, ...

    Raises:
        secateur.errors.SecateurError: anything the caller can mend, in one sentence; nothing is left behind, except by too
            little memory or disk: then the same call goes on from what was finished.
    """
    from secateur import run
    from secateur.recipe import recipe_from

    chosen = recipe_from(_path(recipe), model=str(model), **fields)
    return run.prune(chosen, Path(out), overwrite, evaluate_on, push_to_hub, other_workers)


def plan(
    model: str,
    out: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    overwrite: bool = False,
    **fields: Any,
) -> Plan:
    """Decide what would leave, as ``prune`` does, and return the plan; saved to ``out`` where given."""
    from secateur import run
    from secateur.recipe import recipe_from

    chosen = recipe_from(_path(recipe), model=str(model), **fields)
    made, _ = run.make_plan(chosen, _path(out), overwrite)
    return made


def apply(
    plan: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Result:
    """Carry out a saved plan."""
    from secateur import run

    return run.apply(Path(plan), Path(out), model, overwrite, push_to_hub)


def recover(
    model: str | Path,
    out: str | Path,
    *,
    data: str = "self",
    windows: int | None = None,
    window_length: int | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    **settings: Any,
) -> Result:
    """Tune a pruned model, merge, and save it to ``out``; ``settings`` are fields of ``secateur.recovery.RecoverySettings``.

    The default method is LoRA; ``method="full"`` and others are in ``secateur.recovery.METHODS``.
    """
    from secateur.recovering import recover_folder
    from secateur.recovery import recovery_settings

    chosen = recovery_settings(**settings)
    return recover_folder(str(model), Path(out), data, windows, window_length, chosen, overwrite, push_to_hub)


def evaluate(models: str | Path | Sequence[str | Path], **options: Any) -> Evaluation:
    """Measure one model, or several side by side; ``options`` as in ``secateur.measuring.evaluate_models``."""
    from secateur.measuring import evaluate_models

    several = [models] if isinstance(models, str | Path) else models
    return evaluate_models([str(model) for model in several], **options)


def evaluate_tasks(
    models: str | Path | Sequence[str | Path], tasks: str | Sequence[str], **options: Any
) -> TaskEvaluation:
    """Put lm-eval's tasks to one model, or to several side by side; see ``secateur.measuring.evaluate_models_on_tasks``."""
    from secateur.measuring import evaluate_models_on_tasks

    several = [models] if isinstance(models, str | Path) else models
    options["tasks_dir"] = _path(options.get("tasks_dir"))
    return evaluate_models_on_tasks([str(model) for model in several], tasks, **options)


def compare(model: str | Path, recipes: Sequence[str | Path], out: str | Path, **options: Any) -> Comparison:
    """Plan several recipes on the same windows and measure them side by side; see ``secateur.comparison.compare``.

    A recipe that fails is one of ``Comparison.failed``, and its row says why.
    """
    from secateur.comparison import compare as compare_recipes

    return compare_recipes(str(model), recipes, Path(out), **options)


def load(folder: str | Path, **options: Any) -> Any:
    """Load any output of Secateur as the transformers model it is, blocks of different sizes included."""
    from secateur import loading

    return loading.load(folder, **options)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
