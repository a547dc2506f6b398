"""What an allocation policy reads of the dense model: one pass of the kind it needs, or what an earlier one has left."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import secateur
from secateur.allocation.policy import Policy
from secateur.allocation.sensitivity import DENSE, DIVERGENCE, MASKED
from secateur.calibration import TokenWindows
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.console import log, track
from secateur.criteria.base import Matrix
from secateur.criteria.wanda import Wanda
from secateur.errors import CalibrationError
from secateur.files import full_disk_is_an_error, write_json
from secateur.removal.decision import BlockDecision
from secateur.removal.masks import row_mask
from secateur.statistics import BlockStatistics
from secateur.sweep import Sweep, SweepSettings, require_causal
from secateur.sweep.sensitivity import SensitivityWalk
from secateur.workers import ALONE, Workers

FORMAT = 1

BlockFigures = list[dict[str, float]]
"""For each block its figures, by what they are called."""


def allocation_figures(
    policy: Policy,
    checkpoint: Checkpoint,
    ids_NT: torch.Tensor | None,
    settings: SweepSettings,
    blocks: range,
    ratio: float,
    cache: Path | None = None,
) -> BlockFigures:
    """What ``policy.shares`` reads of the blocks of ``blocks``, in their order.

    Figures of the same model, windows and options are kept in ``cache``. All workers get the same.

    Args:
        ids_NT: calibration windows; None where the policy reads weights alone.
        ratio: that leaves a block while its sensitivity is measured.

    Raises:
        CalibrationError: the policy needs windows and there are none.
        ModelError: weights, activations or a loss are not finite, or the model cannot be calibrated on text.
    """
    runs = policy.measured or bool(policy.needs())
    if runs and (ids_NT is None or not len(ids_NT)):
        raise CalibrationError(f"--allocation {policy.name} needs calibration windows; give --calibration")
    if ids_NT is not None and policy.measured:
        ids_NT = ids_NT[: max(policy.options.windows, settings.workers.size)]
    key = _key(policy, checkpoint, ids_NT if runs else None, settings, blocks, ratio)

    def make() -> BlockFigures:
        own = replace(settings, scratch=settings.scratch / "allocation")
        if ids_NT is None or not runs:
            return _of_weights(policy, checkpoint, own, blocks)
        require_causal(checkpoint)
        if policy.measured:
            found = _of_losses(checkpoint, ids_NT, own, blocks, ratio)
        else:
            found = _of_inputs(policy, checkpoint, ids_NT, own, blocks)
        with suppress(OSError):
            own.scratch.rmdir()  # empty, where there was one
        return found

    return cached_figures(cache, key, len(blocks), make, settings.workers)


def cached_figures(
    cache: Path | None, key: Mapping[str, Any], count: int, make: Callable[[], BlockFigures], workers: Workers = ALONE
) -> BlockFigures:
    """The figures of ``count`` blocks under ``key``: those kept in ``cache``, or what ``make`` gives, kept from then on.

    A damaged file counts as none. ``make`` gives all workers the same.

    Args:
        key: all that the figures depend on, as JSON can hold it.
    """
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()
    file = None if cache is None else cache / "figures" / f"{digest[:24]}.json"
    kept: BlockFigures | None = workers.first(_read(file, count) if file is not None and workers.leads else None)
    if kept is not None:
        log.info("Using the figures of the blocks kept from an earlier run.")
        return kept
    figures = make()
    if file is not None and workers.leads:
        with full_disk_is_an_error(file.parent):
            write_json(file, figures)
    return figures


def _read(file: Path, count: int) -> BlockFigures | None:
    """What a file holds, if it is the figures of so many blocks."""
    try:
        blocks = json.loads(file.read_text(encoding="utf-8"))
        figures = [{name: float(value) for name, value in block.items()} for block in blocks]
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return figures if len(figures) == count and all(map(math.isfinite, _numbers(figures))) else None


def _numbers(figures: BlockFigures) -> list[float]:
    return [value for block in figures for value in block.values()]


def _key(
    policy: Policy,
    checkpoint: Checkpoint,
    ids_NT: torch.Tensor | None,
    settings: SweepSettings,
    blocks: range,
    ratio: float,
) -> dict[str, Any]:
    """All that figures depend on; what a policy makes of them afterwards is no part of it."""
    options = policy.options.model_dump(include=set(policy.measured_by))
    key: dict[str, Any] = {
        "model": checkpoint.computed_hash,
        "policy": policy.name,
        "options": options,
        "blocks": [blocks.start, blocks.stop],
        "ratio": ratio if policy.measured else None,
        "versions": [secateur.__version__, torch.__version__, transformers.__version__],
    }
    if ids_NT is not None:
        key |= {
            "windows": TokenWindows(ids_NT, "", "").sha256,
            "micro_batch": settings.micro_batch,
            "device": str(settings.placement),
        }
    return key


def _of_weights(policy: Policy, checkpoint: Checkpoint, settings: SweepSettings, blocks: range) -> BlockFigures:
    """Figures that need no run: the blocks are dealt out to the workers."""
    workers, own = settings.workers, {}
    mine = [index for place, index in enumerate(blocks) if workers.mine(place)]
    for index in track(mine, "Looking at the weights of the blocks"):
        with resident_block(checkpoint, index, settings.placement, index + workers.size) as block:
            own[index] = policy.figure(_matrices(checkpoint, index, block), {})
    found = {index: figures for part in workers.all(own) for index, figures in part.items()}
    return [found[index] for index in blocks]


def _of_inputs(
    policy: Policy, checkpoint: Checkpoint, ids_NT: torch.Tensor, settings: SweepSettings, blocks: range
) -> BlockFigures:
    """Figures of weights and statistics, from one walk over the dense model."""
    found: dict[int, dict[str, float]] = {}

    def visit(index: int, block: nn.Module, statistics: BlockStatistics) -> None:
        found[index] = policy.figure(_matrices(checkpoint, index, block), statistics)

    Sweep(checkpoint, ids_NT, settings).dense(policy.needs(), blocks, visit)
    return [found[index] for index in blocks]


def _of_losses(
    checkpoint: Checkpoint, ids_NT: torch.Tensor, settings: SweepSettings, blocks: range, ratio: float
) -> BlockFigures:
    """The dense model's loss and that with each block masked by Wanda, whatever the criterion: it is a probe."""
    probe = Wanda()

    def masked(index: int, block: nn.Module, statistics: BlockStatistics) -> Mapping[str, torch.Tensor]:
        masks = {
            name: row_mask(probe.score_OI(Matrix(name, weight_OI, statistics[name])), ratio)
            for name, weight_OI in _matrices(checkpoint, index, block).items()
        }
        own = checkpoint.dtype != settings.placement.dtype  # else they are mapped from the file
        return BlockDecision(masks=masks, matrices=checkpoint.skeleton.prunable(index)).in_dense_shapes(
            block.state_dict(), in_place=own
        )

    walk = SensitivityWalk(checkpoint, ids_NT, settings, "sensitivity")
    changes = walk.run(probe.needs(), blocks, masked)
    return [{DENSE: walk.loss, MASKED: changes[index].loss, DIVERGENCE: changes[index].divergence} for index in blocks]


def _matrices(checkpoint: Checkpoint, index: int, block: nn.Module) -> dict[str, torch.Tensor]:
    """The prunable weights ``(O, I)`` of a block that is in memory."""
    parameters = dict(block.named_parameters())
    return {name: matrix.of(parameters).detach() for name, matrix in checkpoint.skeleton.prunable(index).items()}
