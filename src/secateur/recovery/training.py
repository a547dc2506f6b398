"""The training loop of a recovery: the transformers ``Trainer``, kept silent and given the order of the data.

Importing this file imports the Trainer, so ``lora.py`` does it late.

Shape legend: ``N`` windows, ``T`` tokens, ``V`` vocabulary, ``S`` optimiser steps times windows a step.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from secateur.console import progress
from secateur.errors import ModelError, SecateurError

OnStep = Callable[[int, int, float], None]


def next_token_loss(model: Any, ids_NT: Tensor) -> Tensor:
    """Mean next-token cross-entropy of a batch of windows; scalar. The same for every family, whatever its own loss."""
    logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
    # The last position has no next token. Ignoring it, not slicing it off, spares a copy of the logits.
    next_NT = F.pad(ids_NT[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits_NTV.flatten(0, 1).float(), next_NT.flatten(), ignore_index=-100)


@torch.no_grad()
def held_out_loss(model: Any, ids_NT: Tensor, micro_batch: int, advice: str) -> float | None:
    """Mean next-token cross-entropy over all windows, in evaluation mode; None without windows.

    Raises:
        ModelError: it is not finite; ``advice`` ends the sentence.
    """
    if not len(ids_NT):
        return None
    training, device = model.training, next(model.parameters()).device
    model.eval()
    parts = ids_NT.split(micro_batch)
    loss = sum(next_token_loss(model, part_NT.to(device)).item() * len(part_NT) for part_NT in parts) / len(ids_NT)
    model.train(training)
    if not math.isfinite(loss):
        raise ModelError(f"the model's loss on held-out windows is {loss} {advice}")
    return loss


def training_arguments(
    folder: str, steps: int, micro_batch: int, accumulation: int, warmup: int, learning_rate: float, seed: int
) -> Any:
    """AdamW with a linear schedule and gradients clipped to norm 1, as LLM-Pruner's recovery has it (methods §14.5)."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        seed=seed,
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


class _WindowTrainer(Trainer):
    """Takes the windows in the order given and computes the plain loss."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        return next_token_loss(model, inputs["input_ids"])


class _Watch(TrainerCallback):
    """Collects the loss of every optimiser step and stops at the first that is not finite."""

    def __init__(self, shown: Any, on_step: OnStep | None) -> None:
        self.losses: list[float] = []
        self.shown, self.on_step = shown, on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise SecateurError(
                f"the loss became {loss} in recovery step {state.global_step} of {state.max_steps}, so the model is "
                f"left as it was; lower the learning rate (now {args.learning_rate:g}) and run again"
            )
        self.losses.append(loss)
        self.shown(note=f"loss {loss:.3f}")
        if self.on_step is not None:
            self.on_step(state.global_step, state.max_steps, loss)


def train(
    model: Any,
    ordered_ST: Tensor,
    steps: int,
    micro_batch: int,
    accumulation: int,
    warmup: int,
    learning_rate: float,
    seed: int,
    on_step: OnStep | None,
) -> list[float]:
    """Train whatever requires gradients in ``model`` and return the loss of every optimiser step.

    Args:
        model: a ``PeftModel``.
        ordered_ST: int64 windows in the order they are used, exactly ``steps * micro_batch * accumulation`` of them.

    Raises:
        SecateurError: a loss is NaN or infinite.
    """
    dataset = [{"input_ids": window_T} for window_T in ordered_ST]
    with tempfile.TemporaryDirectory() as folder, progress("recovering", steps) as shown:
        watch = _Watch(shown, on_step)
        arguments = training_arguments(folder, steps, micro_batch, accumulation, warmup, learning_rate, seed)
        trainer = _WindowTrainer(model=model, args=arguments, train_dataset=dataset, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
        trainer.train()
    return watch.losses
