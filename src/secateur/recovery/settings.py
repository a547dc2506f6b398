"""What a recovery is told, how that scales to the data, and what it reports."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import RecipeError, suggest
from secateur.options import parse_named
from secateur.recovery.methods import METHODS, Method, method_from

FEWEST_STEPS_PER_EPOCH = 8
WARMUP_SHARE, LONGEST_WARMUP = 100 / 1560, 100  # methods §14.5: 100 steps of 2 epochs x 50k windows / 64


class LowRank(NamedTuple):
    """What low-rank factors are told: see ``RecoverySettings``."""

    rank: int
    alpha: int
    dropout: float


class RecoverySettings(BaseModel):
    """How to recover. What is not given is the method's own default; the schedule is LLM-Pruner's (methods §14.5), scaled.

    Attributes:
        method: ``name`` or ``name:option=value,...`` of ``secateur.recovery.methods``.
        rank, alpha, dropout: of low-rank factors, whose product counts ``alpha / rank`` times; None where the method has none.
        learning_rate: its peak; reached by a linear warm-up, followed by a linear decay.
        weight_decay: of AdamW, decoupled.
        batch_size: windows per optimiser step, at most (see ``schedule``).
        micro_batch: windows in memory at once.
        epochs: passes over the training windows; ``steps`` overrides it.
        warmup: warm-up steps; None scales LLM-Pruner's share to the run.
        held_out: windows kept out of training to measure on; None takes a twentieth, at least one.
        patience: looks at these windows (ten a run) without getting better after which training stops, and the best state
            is kept; None trains to the end and keeps the last.
        seed: of the factors, the order of the data and dropout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "lora"
    rank: int | None = Field(default=None, ge=1, le=4096)
    alpha: int | None = Field(default=None, ge=1)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    batch_size: int = Field(default=64, ge=1)
    micro_batch: int = Field(default=4, ge=1)
    epochs: float = Field(default=2, gt=0, le=1000)
    steps: int | None = Field(default=None, ge=1)
    warmup: int | None = Field(default=None, ge=0)
    held_out: int | None = Field(default=None, ge=0)
    patience: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        """The method's defaults, and its name with all options written out."""
        if not isinstance(given, dict) or not isinstance(given.get("method", "lora"), str):
            return given
        method = method_from(given.get("method", "lora"))
        defaults = method.defaults()
        for name in LowRank._fields:
            if given.get(name) is not None and name not in defaults:
                raise RecipeError(
                    f"--method {method.name} trains no low-rank factors and has no --{name}; leave it out"
                )
        return {**defaults, **given, "method": str(method)}

    def parsed_method(self) -> Method:
        """The method with its options."""
        return parse_named(self.method, METHODS)

    def low_rank(self) -> LowRank:
        """Rank, alpha and dropout of a method that has them."""
        assert self.rank is not None
        assert self.alpha is not None
        assert self.dropout is not None
        return LowRank(self.rank, self.alpha, self.dropout)


def recovery_settings(**given: Any) -> RecoverySettings:
    """Settings from what the user gave; None means the default.

    Raises:
        RecipeError: an unknown setting or an impossible value.
    """
    for name in given:
        if name not in RecoverySettings.model_fields:
            raise RecipeError(f"recovery has no setting '{name}'{suggest(name, RecoverySettings.model_fields)}")
    try:
        return RecoverySettings(**{name: value for name, value in given.items() if value is not None})
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
        method: with all its options.
        steps: optimiser steps that were planned; ``losses`` has those that were taken.
        losses: mean loss of each optimiser step, with dropout, in nats per token; what the method lets go down.
        looks: (step, the same loss on the windows kept out, without dropout), from step 0 on.
        kept_step: whose state was kept.
        stopped: why training ended before its last step; None where it did not.
        held_out_before, held_out_after: next-token loss on the windows kept out, with the weights that went in and with those
            that came out (already rounded to their dtype; the arithmetic is float32); None without such windows.
        tokens: tokens seen in training.
        notes: what the method has to say, a sentence each.
        removed: units that left: block, kind, module and numbers.
    """

    method: str
    steps: int
    batch_size: int
    warmup: int
    windows: int
    held_out_windows: int
    trainable_parameters: int
    tokens: int
    losses: list[float]
    looks: list[tuple[int, float]]
    kept_step: int
    stopped: str | None
    held_out_before: float | None
    held_out_after: float | None
    notes: list[str]
    removed: list[tuple[int, str, str, list[int]]] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        lists = {"looks": [list(look) for look in self.looks], "removed": [list(units) for units in self.removed]}
        return dataclasses.asdict(self) | lists


def schedule(settings: RecoverySettings, windows: int, workers: int = 1) -> Schedule:
    """Scale batch, steps and warm-up to the data.

    The batch is ``batch_size``, but at most an eighth of the training windows, so that an epoch of little data still takes
    eight optimiser steps or more; it is cut into equal micro-batches of at most ``micro_batch`` and, where that does not
    divide, is a little smaller. Steps are ``epochs * windows / batch``, rounded. The warm-up is 100/1560 of the steps, at
    most 100, and at least one when there is more than one step. ``workers`` share the micro-batches of a step equally.

    Raises:
        RecipeError: a step has fewer windows than there are workers.
    """
    batch = min(settings.batch_size, max(1, windows // FEWEST_STEPS_PER_EPOCH))
    if batch < workers:
        raise RecipeError(
            f"{workers} workers cannot share a step of {batch} windows; start fewer, or give more --windows or a larger --batch-size"
        )
    accumulation = workers * math.ceil(batch / settings.micro_batch / workers)
    micro_batch = batch // accumulation
    steps = settings.steps or max(1, round(settings.epochs * windows / (micro_batch * accumulation)))
    warmup = settings.warmup
    if warmup is None:
        warmup = max(1, min(LONGEST_WARMUP, round(WARMUP_SHARE * steps))) if steps > 1 else 0
    return Schedule(steps, micro_batch, accumulation, min(warmup, steps - 1))
