"""What is measured of a model for one plan: sweeps over it, what they leave on disk, and how far they came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import secateur
from secateur.blockstore import BlockStore
from secateur.calibration import TokenWindows
from secateur.checkpoint.placement import HERE, Placement
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.console import log, track
from secateur.recipe import Recipe
from secateur.resuming import note_finished
from secateur.spreading import BlockFigures, allocation_figures
from secateur.statistics import BlockStatistics, Statistic, as_states, gradient_kinds
from secateur.statistics.half import halved
from secateur.sweep import Queries, Sweep, SweepSettings, Visit
from secateur.workers import ALONE, Workers


@dataclass(frozen=True)
class Workplace:
    """Where a planner works.

    Attributes:
        scratch: for what lives as long as the run.
        cache: for what later runs can use; None: nowhere.
        placement: where blocks compute.
        workers: the processes that share the windows.
        memory: bytes for what may be kept between blocks.
        micro_batch: windows at once, where it is not what the recipe says.
    """

    scratch: Path
    cache: Path | None
    placement: Placement = HERE
    workers: Workers = ALONE
    memory: int = 0
    micro_batch: int | None = None


class Gathering:
    """What one recipe measures of one checkpoint.

    Args:
        blocks: that may be pruned.
        windows: opens the calibration windows when they are first needed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        workplace: Workplace,
        blocks: range,
        windows: Callable[[], TokenWindows],
    ) -> None:
        self.checkpoint, self.recipe, self.workplace = checkpoint, recipe, workplace
        self.blocks, self._windows = blocks, windows

    def visit_dense(self, needs: frozenset[type[Statistic]], missing: list[int], visit: Visit) -> None:
        """Visit every block of the dense model that is missing something, with what is measured of it."""
        wanted = self._wanted(missing, needs)
        if needs:
            self.sweep().dense(needs, wanted, visit)
            return
        for index in track(wanted, "Scoring the blocks"):
            with resident_block(self.checkpoint, index, self.workplace.placement, index + 1) as block:
                visit(index, block, {})

    def gradients(self, kinds: frozenset[type[Statistic]]) -> BlockStore:
        """Gradient statistics of the dense model on disk, in 16 bits; those of an earlier run are used again."""
        store = self.store("gradients", kinds)
        missing = self.workplace.workers.first(store.missing(self.blocks))
        if missing:

            def visit(index: int, block: nn.Module, statistics: BlockStatistics) -> None:
                if self.workplace.workers.leads:
                    store.put(index, halved(as_states(statistics)))
                    self.note_finished(missing, index)

            self.visit_dense(kinds, missing, visit)
            self.workplace.workers.wait()
        else:
            log.info("Using the gradients kept from an earlier run.")
        return store

    @cached_property
    def figures(self) -> BlockFigures:
        """What the allocation's policy measures of each block of ``blocks``."""
        policy = self.recipe.parsed_policy()
        assert policy is not None
        ids_NT = self._windows().ids_NT if self.recipe.reads_text else None
        ratio = self.recipe.mask_ratio if self.recipe.masks_weights else self.recipe.cut_ratio
        return allocation_figures(
            policy, self.checkpoint, ids_NT, self._settings(), self.blocks, ratio, self.workplace.cache
        )

    def note_finished(self, missing: list[int], index: int) -> None:
        """Say how far this part is, for whoever goes on should it be killed."""
        if self.workplace.workers.leads:
            if index in missing:
                missing.remove(index)
            note_finished(self.workplace.scratch, len(self.blocks) - len(missing), len(self.blocks))

    def _wanted(self, missing: list[int], needs: frozenset[type[Statistic]]) -> range:
        """The blocks to sweep for those that are missing."""
        if self.recipe.gradient == "forward" and gradient_kinds(needs):
            return self.blocks  # all of them are perturbed at once: fewer would give other numbers
        # A backward walk passes every later block anyway; a forward walk every earlier one.
        return range(min(missing), max(missing) + 1)

    def sweep(self) -> Sweep:
        """The walks over the model, on the recipe's windows."""
        return Sweep(self.checkpoint, self._windows().ids_NT, self._settings())

    def _settings(self) -> SweepSettings:
        place, recipe = self.workplace, self.recipe
        settings = SweepSettings(
            place.micro_batch or recipe.micro_batch, place.memory, place.scratch, place.placement, place.workers
        )
        if recipe.gradient is not None:
            settings = replace(settings, gradient=recipe.gradient)
        if recipe.queries is not None and recipe.perturbation is not None:
            settings = replace(settings, queries=Queries(recipe.queries, recipe.perturbation, recipe.seed))
        return settings

    def store(self, kind: str, needs: frozenset[type[Statistic]]) -> BlockStore:
        """Where scores or gradients of exactly these inputs are kept. Without statistics scores are cheap: not kept."""
        recipe = self.recipe
        key: dict[str, Any] = {
            "model": self.checkpoint.computed_hash,
            "windows": self._windows().sha256 if needs else None,
            "micro_batch": self.workplace.micro_batch or recipe.micro_batch,
            "threads": torch.get_num_threads(),
            "workers": self.workplace.workers.size,
            "device": str(self.workplace.placement),
            "versions": [secateur.__version__, torch.__version__, transformers.__version__],
        }
        if gradient_kinds(needs):
            key |= self._gradient_key()
        if kind == "gradients":
            key["statistics"] = sorted(statistic.name for statistic in needs)
        else:
            key |= {"criterion": recipe.criterion, "seed": recipe.seed, "weights": recipe.masks_weights}
            key |= {"units": list(recipe.cut_kinds), "reduce": recipe.reduce}
        root = self.workplace.cache if self.workplace.cache is not None and needs else self.workplace.scratch
        return BlockStore(root, kind, key)

    def _gradient_key(self) -> dict[str, Any]:
        """What gradients depend on beside the model and the windows."""
        recipe, key = self.recipe, {"gradient": self.recipe.gradient}
        if recipe.gradient != "forward":
            return key
        drawn = {"queries": recipe.queries, "perturbation": recipe.perturbation, "noise": recipe.seed}
        return key | drawn | {"perturbed": [self.blocks.start, self.blocks.stop]}
