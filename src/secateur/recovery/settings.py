"""What a recovery is told, how that scales to the data, and what it reports."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import RecipeError, suggest

FEWEST_STEPS_PER_EPOCH = 8
WARMUP_SHARE, LONGEST_WARMUP = 100 / 1560, 100  # methods §14.5: 100 steps of 2 epochs x 50k windows / 64


class LoraSettings(BaseModel):
    """How to recover; the defaults are LLM-Pruner's (arXiv 2305.11627; methods §14.5), scaled to the data.

    Attributes:
        rank, alpha, dropout: of LoRA (arXiv 2106.09685); the update is ``alpha / rank * B A``.
        learning_rate: its peak; reached by a linear warm-up, followed by a linear decay.
        batch_size: windows per optimiser step, at most (see ``schedule``).
        micro_batch: windows in memory at once.
        epochs: passes over the training windows; ``steps`` overrides it.
        warmup: warm-up steps; None scales LLM-Pruner's share to the run.
        held_out: windows kept out of training to measure on; None takes a twentieth, at least one.
        seed: of the adapters, the order of the data and dropout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=8, ge=1, le=4096)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=64, ge=1)
    micro_batch: int = Field(default=4, ge=1)
    epochs: float = Field(default=2, gt=0, le=1000)
    steps: int | None = Field(default=None, ge=1)
    warmup: int | None = Field(default=None, ge=0)
    held_out: int | None = Field(default=None, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**32)


def lora_settings(**given: Any) -> LoraSettings:
    """Settings from what the user gave; None means the default.

    Raises:
        RecipeError: an unknown setting or an impossible value.
    """
    for name in given:
        if name not in LoraSettings.model_fields:
            raise RecipeError(f"recovery has no setting '{name}'{suggest(name, LoraSettings.model_fields)}")
    try:
        return LoraSettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise RecipeError(f"--{name} cannot be {first['input']}: {first['msg'].lower()}") from error


@dataclass(frozen=True)
class Schedule:
    """What a run of ``steps`` optimiser steps looks like; each takes ``micro_batch * accumulation`` windows."""

    steps: int
    micro_batch: int
    accumulation: int
    warmup: int

    @property
    def batch_size(self) -> int:
        return self.micro_batch * self.accumulation


@dataclass(frozen=True)
class RecoveryLog:
    """What a recovery did; ``to_json`` gives plain types.

    Attributes:
        losses: mean loss of each optimiser step, with dropout, in nats per token.
        held_out_before, held_out_after: loss on the windows kept out, with the weights that went in and with those that
            came out (already rounded to their dtype; the arithmetic is float32); None without such windows.
        tokens: tokens seen in training.
    """

    steps: int
    batch_size: int
    warmup: int
    windows: int
    held_out_windows: int
    trainable_parameters: int
    tokens: int
    seconds: float
    losses: list[float]
    held_out_before: float | None
    held_out_after: float | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def schedule(settings: LoraSettings, windows: int) -> Schedule:
    """Scale batch, steps and warm-up to the data.

    The batch is ``batch_size``, but at most an eighth of the training windows, so that an epoch of little data still takes
    eight optimiser steps or more; it is cut into equal micro-batches of at most ``micro_batch`` and, where that does not
    divide, is a little smaller. Steps are ``epochs * windows / batch``, rounded. The warm-up is 100/1560 of the steps, at
    most 100, and at least one when there is more than one step.
    """
    batch = min(settings.batch_size, max(1, windows // FEWEST_STEPS_PER_EPOCH))
    accumulation = math.ceil(batch / settings.micro_batch)
    micro_batch = batch // accumulation
    steps = settings.steps or max(1, round(settings.epochs * windows / (micro_batch * accumulation)))
    warmup = settings.warmup
    if warmup is None:
        warmup = max(1, min(LONGEST_WARMUP, round(WARMUP_SHARE * steps))) if steps > 1 else 0
    return Schedule(steps, micro_batch, accumulation, min(warmup, steps - 1))
