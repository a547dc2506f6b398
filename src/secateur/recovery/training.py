"""The training loop: transformers' Trainer, with windows in a fixed order, looks at held-out windows, and checkpoints.

Shape legend: ``N`` windows, ``T`` tokens, ``S`` optimiser steps times windows a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from secateur.console import log, progress
from secateur.errors import SecateurError
from secateur.recovery.checkpoints import BEST, Checkpoints, read_state, write_state
from secateur.recovery.losses import mean_loss
from secateur.recovery.methods import Student
from secateur.recovery.settings import RecoverySettings, Schedule
from secateur.recovery.sharding import average_copies, clip
from secateur.workers import ALONE, Workers

OnStep = Callable[[int, int, float], None]

LOOKS = 10
"""How many times in a run the held-out windows are looked at."""


@dataclass(frozen=True)
class Trained:
    """How training went; see ``RecoveryLog``."""

    losses: list[float]
    looks: list[tuple[int, float]]
    kept_step: int
    stopped: str | None


class _DivergedError(Exception):
    """The loss, or the held-out loss, is not a number any more."""

    def __init__(self, loss: float, step: int) -> None:
        super().__init__(f"the loss became {loss} in recovery step {step}")


def autocast_here() -> bool:
    """Whether products are computed in bfloat16: on accelerators that have it. On a CPU float32 is no slower, and exact."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def training_arguments(folder: Path, plan: Schedule, settings: RecoverySettings, workers: int = 1) -> Any:
    """AdamW with a linear schedule and gradients clipped to norm 1, as LLM-Pruner's recovery has it (methods §14.5)."""
    bf16 = autocast_here()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation // workers,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=plan.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=settings.seed,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,  # otherwise a NaN loss is shown as the previous one
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would split each batch over all GPUs and change what a step means
    return arguments


class _StudentTrainer(Checkpoints, Trainer):
    """Takes the windows in the order given and lets the student's own loss go down."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        loss: Tensor = model(inputs["input_ids"])
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        parameters = self.student.trained().values()
        if self.workers.shards:
            average_copies(parameters, self.workers)
        self.student.before_update(self.state.global_step + 1, self.state.max_steps)
        if self.workers.shards:
            return clip(parameters, self.args.max_grad_norm, self.workers)
        return super()._clip_grad_norm(model)

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """It is there; parts of weights cannot be moved."""


class _Watch(TrainerCallback):
    """Looks at the held-out windows, stops at what is not finite or does not get better, and asks for checkpoints."""

    def __init__(self, trainer: _StudentTrainer, held_out_NT: Tensor, settings: RecoverySettings) -> None:
        self.trainer, self.held_out_NT, self.settings = trainer, held_out_NT, settings
        self.shown: Any = None
        self.on_step: OnStep | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._look(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss, step = float(logs["loss"]), state.global_step
        if not math.isfinite(loss):
            raise _DivergedError(loss, step)
        if step % math.ceil(state.max_steps / LOOKS) == 0 or step == state.max_steps:
            self._look(args, state)
        control.should_save = self.trainer.is_checkpoint_due()
        control.should_training_stop |= gave_up(looks_in(state), self.settings.patience)
        self.shown(note=f"loss {loss:.3f}")
        if self.on_step is not None:
            self.on_step(step, state.max_steps, loss)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = False

    def _look(self, args: Any, state: Any) -> None:
        if not len(self.held_out_NT):
            return
        student = self.trainer.student
        found = mean_loss(student, student, self.held_out_NT, args.per_device_train_batch_size)
        if not math.isfinite(found):
            raise _DivergedError(found, state.global_step)
        looks = looks_in(state)
        is_best = bool(looks) and (len(looks) == 1 or found < min(loss for _, loss in looks[1:]))
        if is_best and self.trainer.writes:
            write_state(Path(args.output_dir) / self.trainer.own(BEST), student.state())
        state.log_history.append({"step": state.global_step, "held_out": found})


def looks_in(state: Any) -> list[tuple[int, float]]:
    """Every look so far: (step, loss on the held-out windows)."""
    return [(entry["step"], entry["held_out"]) for entry in state.log_history if "held_out" in entry]


def losses_in(state: Any) -> list[float]:
    """The loss of every optimiser step so far; not that of one it ended at because it was none."""
    return [entry["loss"] for entry in state.log_history if math.isfinite(entry.get("loss", math.inf))]


def gave_up(looks: list[tuple[int, float]], patience: int | None) -> bool:
    """Whether the last ``patience`` looks were all no better than an earlier one."""
    if patience is None or len(looks) <= patience:
        return False
    return min(loss for _, loss in looks[:-patience]) <= min(loss for _, loss in looks[-patience:])


def train(
    student: Student,
    ordered_ST: Tensor,
    held_out_NT: Tensor,
    plan: Schedule,
    settings: RecoverySettings,
    folder: Path,
    on_step: OnStep | None,
    workers: Workers = ALONE,
) -> Trained:
    """Train ``student`` and leave it in the state that is kept.

    Args:
        ordered_ST: int64 windows in the order they are used, exactly ``plan.steps * plan.batch_size`` of them.
        held_out_NT: windows to look at; there may be none.
        folder: where checkpoints go; what an interrupted call with the same arguments left there is gone on from.
        on_step: called with (step, steps, loss) after every optimiser step.
        workers: they take the micro-batches of a step in turn, and average gradients (DistributedDataParallel, or FSDP where
            they share out weights).

    Raises:
        SecateurError: a loss is NaN or infinite, and no state before it was better than the start.
    """
    dataset = [{"input_ids": window_T} for window_T in ordered_ST]
    arguments = training_arguments(folder, plan, settings, workers.size)
    trainer = _StudentTrainer(model=student, args=arguments, train_dataset=dataset)
    trainer.begin(student, folder, workers)
    if workers.shards:
        # For autocast alone: DistributedDataParallel takes no parts of weights, and a move would tear them from their places.
        prepare = trainer.accelerator.prepare_model
        trainer.accelerator.prepare_model = lambda model, **_: prepare(
            model, device_placement=False, evaluation_mode=True
        )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    watch = _Watch(trainer, held_out_NT, settings)
    trainer.add_callback(watch)
    found = trainer.found()
    stopped, done = None, found.global_step if found is not None else 0
    if found is not None:
        log.info(f"Going on after step {done} of {plan.steps}.")
    with progress("recovering", plan.steps, done=done) as watch.shown:
        watch.on_step = on_step
        try:
            if found is not None and (done == plan.steps or gave_up(looks_in(found), settings.patience)):
                trainer.state = found  # it was killed after its last step
                student.take(trainer.found_state())
            else:
                trainer.train(resume_from_checkpoint=trainer.found_folder())
        except _DivergedError as error:
            stopped = str(error)
    workers.wait()
    return _kept(trainer, settings, folder, stopped)


def _kept(trainer: _StudentTrainer, settings: RecoverySettings, folder: Path, stopped: str | None) -> Trained:
    """Choose the state that is kept, and bring it back into the student."""
    state, student = trainer.state, trainer.student
    losses, looks = losses_in(state), looks_in(state)
    if stopped is not None:
        best = min(looks[1:], key=lambda look: look[1], default=None)
        if best is None or best[1] >= looks[0][1] or student.finishes:
            raise SecateurError(
                f"{stopped} of {state.max_steps}, so the model is left as it was; "
                f"lower the learning rate (now {settings.learning_rate:g}) and run again"
            )
        log.warning(
            f"{stopped[0].upper()}{stopped[1:]} of {state.max_steps}; training ended there, and the state of step {best[0]} is kept, whose held-out loss was "
            f"{best[1]:.4f}. A lower learning rate (now {settings.learning_rate:g}) may go further."
        )
    elif settings.patience is not None and len(looks) > 1:
        best = min(looks[1:], key=lambda look: look[1])
        if state.global_step < state.max_steps:
            stopped = f"no better on held-out windows in {settings.patience} looks"
            log.info(f"Stopped after step {state.global_step} of {state.max_steps}: {stopped}.")
    else:
        return Trained(losses, looks, state.global_step, None)
    if best[0] != state.global_step or stopped is not None:
        student.take(read_state(folder / trainer.own(BEST)))
    return Trained(losses, looks, best[0], stopped)
