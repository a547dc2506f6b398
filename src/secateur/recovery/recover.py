"""Recovery: tune the pruned model by one of several methods, and fold what was learnt into its weights.

The model that comes back is the model that went in, with other numbers in its blocks: same modules, names, shapes and
dtypes, and zeros exactly where its masks have them.

Shape legend: ``N`` windows, ``T`` tokens, ``I`` input features, ``O`` output features.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from secateur.console import log
from secateur.errors import CalibrationError, PlanError, RecipeError
from secateur.recovery.lending import lent
from secateur.recovery.losses import held_out_loss
from secateur.recovery.merging import replace_weights, rounded
from secateur.recovery.methods import Task
from secateur.recovery.settings import RecoveryLog, RecoverySettings, Schedule, schedule
from secateur.recovery.sharding import lead
from secateur.recovery.teacher import Teacher
from secateur.structure import Structure
from secateur.workers import ALONE, Workers


def recover_model(
    model: Any,
    ids_NT: Tensor,
    settings: RecoverySettings | None = None,
    masks: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    folder: Path | None = None,
    teacher: Teacher | None = None,
    structure: Structure | None = None,
    workers: Workers = ALONE,
) -> RecoveryLog:
    """Train a model by ``settings.method`` and fold what was learnt into its weights, in place.

    Masters are float32, and so is the arithmetic but for products on accelerators that have bfloat16; each weight then
    returns to its own dtype. The same model, windows, settings and machine give the same bits, interrupted or not.
    Whatever goes wrong, the model is left as it came.

    Args:
        model: a causal language model of transformers.
        ids_NT: int64 token windows, ``(N, T)``.
        settings: defaults to ``RecoverySettings()``, which is LoRA.
        masks: by parameter name, true or 1 where a weight is kept. The update is masked in training and merge alike. A
            parameter without a mask is trained, and merged, densely.
        on_step: called with (step, steps, loss) after every optimiser step.
        folder: where checkpoints go, so that the same call goes on after an interruption; None keeps nothing.
        teacher: the dense model, for a method that needs one.
        structure: the model's units, for a method that lets some leave. They are silenced here (what reads them is zeroed), and
            ``RecoveryLog.removed`` names them, so that a caller can cut.
        workers: processes that share the windows of every step, and the weights if they say so; each calls this with the same
            arguments and gets the same model.

    Raises:
        CalibrationError: the windows are too few, too short or hold unknown tokens.
        PlanError: a mask does not fit its weight.
        ModelError: the model's loss is not finite to begin with.
        StructureError: the method finds nothing to train in the blocks.
        SecateurError: training diverged, and no state before was better than the start.

    Source: the schedule is that of LLM-Pruner's recovery stage (arXiv 2305.11627; methods §14.5).
    """
    settings = settings or RecoverySettings()
    method = settings.parsed_method()
    method.check(model)
    kept = _checked_masks(model, masks or {})
    held_out_NT, train_NT = _split(_checked_windows(model, ids_NT), settings)
    plan = schedule(settings, len(train_NT), workers.size)
    from secateur.recovery.training import autocast_here, train

    log.info(
        f"recovering by {method.title}: {plan.steps} steps of {plan.batch_size} x {ids_NT.shape[1]} "
        f"tokens, warm-up {plan.warmup}, {len(held_out_NT)} of {len(ids_NT)} windows held out"
    )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    task = Task(model, kept, dtypes, settings, teacher, structure, workers)
    with _own_randomness(settings.seed):
        # Lent anew for each: where weights are shared out, what computes in 16 bits for training does so in float32 to measure.
        with lent(model, workers):
            before = held_out_loss(
                model, held_out_NT, plan.micro_batch, "before recovery; look for NaN or Inf in its weights"
            )
        ordered_ST = train_NT[_order(len(train_NT), plan, settings.seed)]
        place = nullcontext(str(folder)) if folder is not None else tempfile.TemporaryDirectory()
        with lent(model, workers, torch.bfloat16 if autocast_here() else None):
            with place as name, method.student(task) as student:
                for note in task.notes:
                    log.info(note)
                trainable = sum(parameter.numel() for parameter in student.trained().values())
                if workers.shards:
                    lead(student)
                trained = train(student, ordered_ST, held_out_NT, plan, settings, Path(name), on_step, workers)
                new, silenced = student.merged(), student.silenced()
                removed = [(group.block, group.kind, group.module, units) for group, units in student.removed()]
            new = rounded(model, new, dtypes, kept)
        replaced = replace_weights(model, new)
        del new
        try:
            for name, columns in silenced.items():
                weight_OI = model.get_parameter(name).data
                weight_OI[:, columns.to(weight_OI.device)] = 0
            with lent(model, workers):
                after = held_out_loss(model, held_out_NT, plan.micro_batch, "after recovery; lower the learning rate")
        except BaseException:
            replace_weights(model, replaced)
            raise
    if before is not None and after is not None and after > before:
        log.warning(f"recovery did not help: the held-out loss went from {before:.4f} to {after:.4f}")
    return RecoveryLog(
        method=settings.method,
        steps=plan.steps,
        batch_size=plan.batch_size,
        warmup=plan.warmup,
        windows=len(train_NT),
        held_out_windows=len(held_out_NT),
        trainable_parameters=trainable,
        tokens=len(trained.losses) * plan.batch_size * ids_NT.shape[1],
        losses=trained.losses,
        looks=trained.looks,
        kept_step=trained.kept_step,
        stopped=trained.stopped,
        held_out_before=before,
        held_out_after=after,
        notes=task.notes,
        removed=removed,
    )


def _checked_windows(model: Any, ids_NT: Tensor) -> Tensor:
    if ids_NT.dim() != 2 or ids_NT.dtype != torch.int64:
        raise CalibrationError(
            f"recovery needs token windows as int64 of shape (N, T), but got {ids_NT.dtype} of shape {tuple(ids_NT.shape)}"
        )
    if len(ids_NT) < 1 or ids_NT.shape[1] < 2:
        raise CalibrationError(
            f"recovery needs at least one window of two tokens, but got {ids_NT.shape[0]} x {ids_NT.shape[1]}; "
            "give more text"
        )
    vocabulary = model.get_input_embeddings().num_embeddings
    if ids_NT.min() < 0 or ids_NT.max() >= vocabulary:
        raise CalibrationError(
            f"a recovery window holds token {int(ids_NT.max() if ids_NT.min() >= 0 else ids_NT.min())}, outside the "
            f"model's vocabulary of {vocabulary}; use windows made with this model's tokenizer"
        )
    return ids_NT.cpu()


def _checked_masks(model: Any, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks as booleans, after checking that each fits a parameter that is already zero where it should be."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    checked = {}
    for name, mask_OI in masks.items():
        if name not in parameters:
            raise PlanError(
                f"there is a mask for '{name}', which this model does not have; use the masks that belong to this model"
            )
        weight_OI = parameters[name]
        if mask_OI.shape != weight_OI.shape:
            raise PlanError(
                f"the mask of {name} is {tuple(mask_OI.shape)} but the weight is {tuple(weight_OI.shape)}; "
                "use the masks that belong to this model"
            )
        checked[name] = mask_OI.bool()
        if weight_OI.data[~checked[name].to(weight_OI.device)].any():
            raise PlanError(f"{name} is not zero where its mask says pruned; apply the masks before recovering")
    return checked


def _split(ids_NT: Tensor, settings: RecoverySettings) -> tuple[Tensor, Tensor]:
    """Windows held out and windows to train on, chosen by the seed, each in their given order."""
    windows = len(ids_NT)
    held_out = settings.held_out
    if held_out is None:
        held_out = max(1, windows // 20) if windows > 1 else 0
    if held_out >= windows:
        raise RecipeError(
            f"{held_out} of {windows} windows are to be held out, which leaves none to train on; hold out fewer"
        )
    chosen = torch.zeros(windows, dtype=torch.bool)
    chosen[torch.randperm(windows, generator=torch.Generator().manual_seed(settings.seed))[:held_out]] = True
    return ids_NT[chosen], ids_NT[~chosen]


def _order(windows: int, plan: Schedule, seed: int) -> Tensor:
    """Indices of the windows in training order: one shuffle after another, so every step has a full batch."""
    generator = torch.Generator().manual_seed(seed)
    needed = plan.steps * plan.batch_size
    return torch.cat([torch.randperm(windows, generator=generator) for _ in range(-(-needed // windows))])[:needed]


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed everything, and give the caller's random state back afterwards: the Trainer reseeds all generators."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
