"""From a recipe to a plan: gather what the criterion needs, score, and choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import secateur
from secateur.allocation import exact_threshold, global_units, uniform_units
from secateur.blockstore import BlockStore, trim_cache
from secateur.calibration import TokenWindows, open_windows
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.console import log, track
from secateur.criteria.base import Matrix
from secateur.criteria.units import unit_scores
from secateur.errors import RecipeError
from secateur.files import cache_folder
from secateur.plans import CalibrationIdentity, ModelIdentity, Plan
from secateur.recipe import Recipe
from secateur.removal.decision import BlockDecision, Removals
from secateur.removal.masks import layer_mask, n_of_m_mask, row_mask, threshold_mask
from secateur.statistics import GradientStatistic, Statistic
from secateur.structure import Structure, UnitGroup, cut_shapes, find_all_units, parameters_per_unit
from secateur.sweep import BlockStatistics, Sweep, SweepSettings

WEIGHTS = "weights"


@dataclass(frozen=True)
class Workplace:
    """Where a planner may put things: ``scratch`` lives as long as the run, ``cache`` longer (None: nowhere)."""

    scratch: Path
    cache: Path | None


def find_structure(checkpoint: Checkpoint) -> Structure:
    """The units of the model behind ``checkpoint``, found by tracing its forward without weights."""
    return find_all_units(checkpoint.skeleton.model, checkpoint.skeleton.blocks_name)


def default_workplace(scratch: Path) -> Workplace:
    """Scratch where given, and the user's cache."""
    return Workplace(scratch, cache_folder())


class Planner:
    """Makes one plan.

    Args:
        checkpoint: the dense model.
        recipe: what to choose and how.
        workplace: where boundary activations, scores and statistics go.

    Raises:
        RecipeError: the recipe asks for what the model does not have, or would remove nothing.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, workplace: Workplace) -> None:
        self.checkpoint, self.recipe, self.workplace = checkpoint, recipe, workplace
        self.criterion = recipe.parsed_criterion()
        self.blocks = recipe.block_range(len(checkpoint.skeleton.blocks))
        self.loss: float | None = None
        if recipe.masks_weights:
            for index in self.blocks:
                checkpoint.skeleton.prunable(index)
        if recipe.ratio == 0:
            raise RecipeError(self._removes_nothing())
        self.groups = self._wanted_groups()
        self._check_amounts()

    def plan(self) -> Plan:
        """Gather, score and choose."""
        plan = Plan(model=self._model_identity(), recipe=self.recipe, calibration=self._calibration_identity())
        needs = self.criterion.needs()
        from_inputs = frozenset(kind for kind in needs if not issubclass(kind, GradientStatistic))
        # Gradients are always the dense model's; without input statistics there is nothing to propagate.
        if self.recipe.propagate == "pruned" and from_inputs:
            self._choose_on_the_way(plan, from_inputs, needs - from_inputs)
        else:
            self._choose_from_scores(plan, self._dense_scores(needs))
        if self.workplace.cache is not None:
            trim_cache(self.workplace.cache)
        if not plan.removes_anything():
            raise RecipeError(self._removes_nothing())
        return plan

    def _removes_nothing(self) -> str:
        return f"this recipe removes nothing from {self.recipe.model}; raise --ratio or choose another --unit"

    # -- what is there to choose from

    @cached_property
    def structure(self) -> Structure:
        return find_structure(self.checkpoint)

    def _wanted_groups(self) -> dict[int, list[UnitGroup]]:
        """For each block the groups of the kinds asked for, in the recipe's order."""
        wanted: dict[int, list[UnitGroup]] = {index: [] for index in self.blocks}
        for kind in self.recipe.cut_kinds:
            found = [group for group in self.structure.units if group.kind == kind and group.block in self.blocks]
            if not found:
                raise RecipeError(self._no_such_unit(kind))
            for group in found:
                wanted[group.block].append(group)
        return wanted

    def _no_such_unit(self, kind: str) -> str:
        there = ", ".join(sorted({group.kind for group in self.structure.units})) or "none"
        reason = next((f": {refusal.reason}" for refusal in self.structure.refused if refusal.kind == kind), "")
        if kind == "query" and not reason:
            reason = ": it has one query head for each KV head, so use head"
        return f"{self.recipe.model} has no '{kind}' units that can be cut{reason} (it has: {there})"

    def _check_amounts(self) -> None:
        """Say loudly which kinds round to nothing, and find widths that N:M does not divide before any work."""
        ratio = self.recipe.cut_ratio
        empty = []
        for kind in self.recipe.cut_kinds if self.recipe.allocation == "uniform" else ():
            groups = [group for entry in self.groups.values() for group in entry if group.kind == kind]
            sizes = {group.count // group.families for group in groups}
            if all(int(size * ratio) == 0 for size in sizes):
                empty.append(kind)
                log.warning(
                    "NOTHING of kind '%s' leaves: %g of %s per block rounds down to none%s.",
                    kind,
                    ratio,
                    " or ".join(map(str, sorted(sizes))),
                    f"; the smallest ratio that takes one is {math.ceil(1000 / max(sizes)) / 1000:.3f}"
                    if max(sizes) > 1
                    else "",
                )
        if empty and tuple(empty) == self.recipe.cut_kinds and not self.recipe.masks_weights:
            raise RecipeError(self._removes_nothing())
        if self.recipe.n_of_m and self.recipe.allocation == "uniform":
            for index in self.blocks:
                self._check_widths(index)

    def _check_widths(self, index: int) -> None:
        """Try the N:M pattern on the shapes that a uniform cut will leave; which units leave does not matter for them."""
        pattern = self.recipe.n_of_m
        assert pattern is not None
        ratio = self.recipe.cut_ratio
        removals = [(g, uniform_units(g, torch.zeros(g.count), ratio)) for g in self.groups[index]]
        names = self.checkpoint.skeleton.prunable(index)
        shapes = {
            name: tuple(tensor.shape) for name, tensor in self.checkpoint.skeleton.blocks[index].state_dict().items()
        }
        for name, shape in cut_shapes(shapes, removals).items():
            if name in names and shape[1] % pattern.group:
                full = self.checkpoint.skeleton.block_prefix(index) + name
                raise RecipeError(
                    f"{pattern} needs widths that {pattern.group} divides, but '{full}' has {shape[1]} inputs; choose another M"
                )

    # -- identities

    def _model_identity(self) -> ModelIdentity:
        source = self.checkpoint.source
        return ModelIdentity(
            spec=source.spec,
            hub_id=source.hub_id,
            architecture=type(self.checkpoint.skeleton.model).__name__,
            parameters=self.checkpoint.parameters(),
            sha256=self.checkpoint.content_hash,
        )

    @cached_property
    def windows(self) -> TokenWindows:
        """The calibration windows; opened when first needed."""
        self._check_length(self.recipe.window_length or 0)
        windows = open_windows(
            self.recipe.calibration,
            model_folder=self.checkpoint.folder,
            model_hash=self.checkpoint.content_hash,
            windows=self.recipe.windows,
            window_length=self.recipe.window_length,
            seed=self.recipe.seed,
            vocabulary=self.checkpoint.config.get_text_config().vocab_size,
            cache=self.workplace.cache,
            trust_remote_code=self.recipe.trust_remote_code,
        )
        count, length = windows.ids_NT.shape
        self._check_length(length)
        log.info("Calibrating on %d windows of %d tokens (%s).", count, length, windows.description)
        return windows

    def _check_length(self, length: int) -> None:
        positions = getattr(self.checkpoint.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise RecipeError(
                f"windows of {length} tokens are longer than the model's {positions} positions; give --window-length {positions} or less"
            )

    def _calibration_identity(self) -> CalibrationIdentity | None:
        if not self.criterion.needs():
            return None
        count, length = self.windows.ids_NT.shape
        return CalibrationIdentity(
            source=self.windows.source,
            description=self.windows.description,
            windows=count,
            window_length=length,
            sha256=self.windows.sha256,
        )

    # -- dense propagation: score everything, then choose

    def _dense_scores(self, needs: frozenset[type[Statistic]]) -> BlockStore:
        """Scores of every block on disk; those of an earlier run are used again."""
        store = self._store("scores", needs)
        missing = store.missing(self.blocks)
        if not missing:
            log.info("Using the scores kept from an earlier run.")
            return store

        def visit(index: int, block: nn.Module, statistics: BlockStatistics) -> None:
            store.put(index, self._scores(index, block, statistics))

        # A backward walk passes every later block anyway; a forward walk every earlier one.
        wanted = range(min(missing), max(missing) + 1)
        if needs:
            sweep = self._sweep()
            sweep.dense(needs, wanted, visit)
            self.loss = sweep.loss
        else:
            for index in track(wanted, "Scoring the blocks"):
                with resident_block(self.checkpoint, index) as block:
                    visit(index, block, {})
        return store

    def _choose_from_scores(self, plan: Plan, store: BlockStore) -> None:
        removals = self._removals_from(store)
        threshold = (
            self._global_threshold(store) if self.recipe.masks_weights and self.recipe.within == "global" else None
        )
        for index in track(self.blocks, "Choosing what leaves"):
            scores = store.get(index)
            decision, threshold = self._decide(index, removals[index], scores, threshold)
            plan.add(index, decision)

    def _removals_from(self, store: BlockStore) -> dict[int, Removals]:
        if not self.recipe.cut_kinds:
            return {index: [] for index in self.blocks}
        if self.recipe.allocation == "uniform":
            return {index: self._uniform(index, store.get(index)) for index in self.blocks}
        groups = [group for index in self.blocks for group in self.groups[index]]
        scores = [store.get(group.block)[self._unit_key(group)] for group in groups]
        shapes = {
            i: {n: tuple(t.shape) for n, t in self.checkpoint.skeleton.blocks[i].state_dict().items()}
            for i in self.blocks
        }
        parameters = [parameters_per_unit(group, shapes[group.block]) for group in groups]
        chosen = global_units(groups, scores, parameters, self.recipe.cut_ratio)
        removals: dict[int, Removals] = {index: [] for index in self.blocks}
        for group, units in zip(groups, chosen, strict=True):
            removals[group.block].append((group, units))
        return removals

    def _uniform(self, index: int, scores: Mapping[str, torch.Tensor]) -> Removals:
        ratio = self.recipe.cut_ratio
        return [(group, uniform_units(group, scores[self._unit_key(group)], ratio)) for group in self.groups[index]]

    def _global_threshold(self, store: BlockStore) -> tuple[float, int] | None:
        def chunks() -> Iterator[torch.Tensor]:
            for index in self.blocks:
                yield from self._weight_scores(store.get(index)).values()

        total = sum(chunk.numel() for chunk in chunks())
        leaving = int(total * self.recipe.mask_ratio)
        return exact_threshold(chunks, leaving) if leaving else None

    # -- pruned propagation: choose block by block, each on what the pruned blocks before it give

    def _choose_on_the_way(
        self, plan: Plan, from_inputs: frozenset[type[Statistic]], from_gradients: frozenset[type[Statistic]]
    ) -> None:
        gradients = self._gradients(from_gradients) if from_gradients else None

        def visit(index: int, block: nn.Module, statistics: BlockStatistics) -> Mapping[str, torch.Tensor]:
            if gradients is not None:
                _add_states(statistics, gradients.get(index), from_gradients)
            scores = self._scores(index, block, statistics)
            decision, _ = self._decide(index, self._uniform(index, scores), scores, None)
            plan.add(index, decision)
            return decision.in_dense_shapes(block.state_dict())

        self._sweep().pruned(from_inputs, self.blocks, visit)

    def _gradients(self, kinds: frozenset[type[Statistic]]) -> BlockStore:
        """Gradient statistics of the dense model on disk; those of an earlier run are used again."""
        store = self._store("gradients", kinds)
        missing = store.missing(self.blocks)
        if missing:

            def visit(index: int, block: nn.Module, statistics: BlockStatistics) -> None:
                store.put(index, _states(statistics))

            sweep = self._sweep()
            sweep.dense(kinds, range(min(missing), max(missing) + 1), visit)
            self.loss = sweep.loss
        else:
            log.info("Using the gradients kept from an earlier run.")
        return store

    # -- scoring and choosing in one block

    def _scores(self, index: int, block: nn.Module, statistics: BlockStatistics) -> dict[str, torch.Tensor]:
        """Everything that choosing in this block needs: scores of its weights, or of its units, or both."""
        prefix = self.checkpoint.skeleton.block_prefix(index)
        parameters = dict(block.named_parameters())
        matrices = {
            name: Matrix(prefix + name, parameters[name].detach(), statistics.get(name, {}), self.recipe.seed)
            for name in self.checkpoint.skeleton.prunable(index)
        }
        scores: dict[str, torch.Tensor] = {}
        if self.recipe.masks_weights:
            for name, matrix in matrices.items():
                scores[f"{WEIGHTS}.{name}"] = self.criterion.weight_score_OI(matrix)
        if self.recipe.cut_kinds:
            contributions = {name: self.criterion.score_OI(matrix) for name, matrix in matrices.items()}
            for group in self.groups[index]:
                scores[self._unit_key(group)] = unit_scores(group, contributions, self.criterion, self.recipe.reduce)
        for name, score in scores.items():
            if not torch.isfinite(score).all():
                raise RecipeError(
                    f"{self.criterion} gives scores that are not finite in block {index} ({name}); choose smaller options"
                )
        return scores

    @staticmethod
    def _unit_key(group: UnitGroup) -> str:
        return f"{group.kind}.{group.module}"

    @staticmethod
    def _weight_scores(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n.removeprefix(f"{WEIGHTS}."): s for n, s in sorted(scores.items()) if n.startswith(f"{WEIGHTS}.")}

    def _decide(
        self, index: int, removals: Removals, scores: Mapping[str, torch.Tensor], threshold: tuple[float, int] | None
    ) -> tuple[BlockDecision, tuple[float, int] | None]:
        """Masks are chosen among the weights that the cut leaves. ``threshold`` carries its ties from block to block."""
        decision = BlockDecision(removals)
        for name, score_OI in self._weight_scores(scores).items():
            rows, columns = decision.survivors(name, score_OI.shape)
            left_OI = score_OI[rows][:, columns]
            if self.recipe.n_of_m:
                full = self.checkpoint.skeleton.block_prefix(index) + name
                mask_OI = n_of_m_mask(left_OI, self.recipe.n_of_m.keep, self.recipe.n_of_m.group, full)
            elif self.recipe.within == "global":
                if threshold is None:
                    mask_OI = torch.ones_like(left_OI, dtype=torch.bool)
                else:
                    mask_OI, ties = threshold_mask(left_OI, *threshold)
                    threshold = threshold[0], ties
            else:
                choose: Callable[[torch.Tensor, float], torch.Tensor] = (
                    row_mask if self.recipe.within == "row" else layer_mask
                )
                mask_OI = choose(left_OI, self.recipe.mask_ratio)
            decision.masks[name] = mask_OI
        return decision, threshold

    # -- places

    def _sweep(self) -> Sweep:
        settings = SweepSettings(self.recipe.micro_batch, self.recipe.memory_bytes, self.workplace.scratch)
        return Sweep(self.checkpoint, self.windows.ids_NT, settings)

    def _store(self, kind: str, needs: frozenset[type[Statistic]]) -> BlockStore:
        """Where scores or gradients of exactly these inputs are kept. Without statistics scores are cheap: not kept."""
        recipe = self.recipe
        key: dict[str, Any] = {
            "model": self.checkpoint.content_hash,
            "windows": self.windows.sha256 if needs else None,
            "micro_batch": recipe.micro_batch,
            "threads": torch.get_num_threads(),
            "versions": [secateur.__version__, torch.__version__, transformers.__version__],
        }
        if kind == "gradients":
            key["statistics"] = sorted(statistic.name for statistic in needs)
        else:
            key |= {"criterion": str(self.criterion), "seed": recipe.seed, "weights": recipe.masks_weights}
            key |= {"units": list(recipe.cut_kinds), "reduce": recipe.reduce}
        root = self.workplace.cache if self.workplace.cache is not None and needs else self.workplace.scratch
        return BlockStore(root, kind, key)


def _states(statistics: BlockStatistics) -> dict[str, torch.Tensor]:
    """All statistics of one block as flat named tensors."""
    return {
        f"{name}|{kind.name}|{part}": tensor
        for name, kinds in statistics.items()
        for kind, statistic in kinds.items()
        for part, tensor in statistic.state().items()
    }


def _add_states(
    statistics: BlockStatistics, states: Mapping[str, torch.Tensor], kinds: frozenset[type[Statistic]]
) -> None:
    """Put stored statistics beside those just gathered."""
    for name, gathered in statistics.items():
        for kind in kinds:
            prefix = f"{name}|{kind.name}|"
            state = {key.removeprefix(prefix): tensor for key, tensor in states.items() if key.startswith(prefix)}
            gathered[kind] = kind.from_state(state)
