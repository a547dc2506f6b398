"""From a recipe to a plan: gather what the criterion needs, score, and choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.allocation.goal import Goal
from secateur.allocation.mask_amounts import MaskAmounts
from secateur.allocation.weights import WeightChooser
from secateur.blockstore import BlockStore, trim_cache
from secateur.calibration import TokenWindows
from secateur.checkpoint.reader import Checkpoint
from secateur.choosing import Chooser
from secateur.console import log, track
from secateur.errors import RecipeError
from secateur.gathering import Gathering, Workplace
from secateur.identities import calibration_identity, calibration_windows, model_identity
from secateur.plans import Plan
from secateur.preflight import Estimate, Preflight, limit_of
from secateur.recipe import SPANNING, Recipe
from secateur.reconstruction import ChooseAgain
from secateur.removal.decision import BlockDecision, Removals
from secateur.removing import Remover, reconstruct, share_among
from secateur.scoring import BlockScorer, weight_scores
from secateur.statistics import Statistic, add_states, gradient_kinds
from secateur.statistics.half import whole
from secateur.structure import OUTSIDE, Structure, cut_shapes, find_all_units
from secateur.sweep import BlockStatistics, Fit, Passage

DECISIONS = "decisions"
"""The folder of what has been decided, a file a block."""

KEPT_SCORES = 4 * 1024**3
"""Bytes of weights' scores that are kept for another ratio; beyond, masks are decided on the way."""


Decide = Callable[[int, nn.Module, BlockStatistics], BlockDecision]
"""Decides over one block."""


class Planner:
    """Makes one plan.

    Args:
        checkpoint: the dense model.
        recipe: what to choose and how.
        workplace: where boundary activations, scores and statistics go.
        goal: how much to choose, where it is one round of several.
        windows: calibration windows, where they have been opened already.

    Raises:
        RecipeError: the recipe asks for what the model does not have, or would remove nothing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        workplace: Workplace,
        goal: Goal | None = None,
        windows: TokenWindows | None = None,
    ) -> None:
        self.checkpoint, self.recipe, self.workplace = checkpoint, recipe, workplace
        self.criterion, self.removal, self.goal = recipe.parsed_criterion(), recipe.parsed_removal(), goal
        self.reconstruction = recipe.parsed_reconstruction()
        self.blocks = recipe.block_range(len(checkpoint.skeleton.blocks))
        if windows is not None:
            self.windows = windows
        if recipe.masks_weights:
            for index in self.blocks:
                checkpoint.skeleton.prunable(index)
        if recipe.ratio == 0:
            raise removes_nothing(recipe)
        if self.reconstruction is not None and workplace.workers.size > 1:
            raise RecipeError(
                f"--reconstruct {self.reconstruction.name} runs in one process; start it without torchrun, or leave it out"
            )
        self.chooser = Chooser(checkpoint, self.structure, recipe, goal, lambda: self._gathering.figures)
        if goal is None:
            self._check_amounts()

    @cached_property
    def structure(self) -> Structure:
        """The units of the model, found by tracing its forward without weights; none where none are asked for."""
        skeleton = self.checkpoint.skeleton
        return find_all_units(skeleton.model, skeleton.blocks_name) if self.recipe.cut_kinds else Structure([], [])

    @cached_property
    def windows(self) -> TokenWindows:
        """The calibration windows; opened when first needed, by one worker for all."""
        workers = self.workplace.workers
        opened = calibration_windows(self.checkpoint, self.recipe, self.workplace.cache) if workers.leads else None
        return workers.first(opened)

    @cached_property
    def _gathering(self) -> Gathering:
        """Made when the workplace is settled: memory and micro-batch may change before."""
        return Gathering(self.checkpoint, self.recipe, self.workplace, self.blocks, lambda: self.windows)

    def estimate(self, out: Path | None) -> Estimate:
        """What gathering, scoring and, with ``out``, writing will take on this machine."""
        place, recipe = self.workplace, self.recipe
        count, length = self.windows.ids_NT.shape if recipe.reads_text else (place.workers.size, 1)
        if count < place.workers.size:
            raise RecipeError(
                f"{place.workers.size} workers cannot share {count} calibration windows; start at most {count}, or give more "
                "--windows"
            )
        dense = recipe.propagate == "dense" or not (self._on_the_way(recipe.needs())[0] or self.reconstruction)
        kept = 4 * self._maskable() if dense and recipe.masks_weights and self._keeps_scores else 0
        of_this = (max(1, len(place.workers.share(count))), length)
        micro_batch = place.micro_batch or recipe.micro_batch
        limit = limit_of(recipe, place.workers.size)
        return Preflight(
            self.checkpoint, recipe, place.placement, micro_batch, of_this, kept, out is not None, limit
        ).estimate()

    def plan(self) -> Plan:
        """Gather, score and choose."""
        needs = self.recipe.needs()
        plan = Plan(
            model=model_identity(self.checkpoint),
            recipe=self.recipe,
            calibration=calibration_identity(self.windows) if self.recipe.reads_text else None,
        )
        workers = self.workplace.workers
        plan.keep_in(self.workplace.scratch / (DECISIONS if workers.leads else f"{DECISIONS}-{workers.rank}"))
        on_the_way, beforehand = self._on_the_way(needs)
        if self.recipe.is_global and self.recipe.updates:
            self._fit_to_scores(plan, self._dense_scores(self.criterion.needs()))
        elif self.recipe.propagate == "pruned" and (on_the_way or self.reconstruction):
            self._choose_on_the_way(plan, on_the_way, beforehand)
        elif not self._keeps_scores:
            self._choose_in_dense(plan, needs)
        else:
            self._choose_from_scores(plan, self._dense_scores(needs))
        if self.workplace.cache is not None and workers.leads:
            trim_cache(self.workplace.cache)
        plan.notes = self._notes(plan)
        if self.goal is None and not plan.removes_anything():
            raise removes_nothing(self.recipe)
        return plan

    def _notes(self, plan: Plan) -> dict[str, Any]:
        """What is worth telling of the plan, whatever attempt decided which of its blocks."""
        policy = self.recipe.parsed_policy()
        if policy is not None and self.recipe.target is not None:
            _ = self.chooser.planned  # says how the target was met
        notes = dict(self.chooser.notes)
        if policy is not None:
            notes["allocation"] = plan.shares()
        found = {"removal": plan.removal_notes(), "reconstruction": plan.fit_errors()}
        return notes | {name: figures for name, figures in found.items() if figures}

    def _check_amounts(self) -> None:
        """Say loudly what rounds to nothing, and find widths that N:M does not divide, before any work."""
        policy, pattern = self.recipe.parsed_policy(), self.recipe.n_of_m
        if policy is not None and pattern is not None:
            log.warning(
                "MIXED N:%d: %s gives each block its own N, so the result is not %s as hardware knows it.",
                pattern.group,
                policy.name,
                pattern,
            )
        if policy is not None and self.recipe.cut_kinds:
            return  # what each block gives is measured first
        kinds = self.recipe.cut_kinds if self.recipe.allocation != "global" else ()
        empty = [kind for kind in kinds if self._warn_if_nothing(kind)]
        if empty and len(empty) == len(kinds) and not self.recipe.masks_weights:
            raise removes_nothing(self.recipe)
        if pattern is None or self.recipe.allocation == "global":
            return
        skeleton, leaving = self.checkpoint.skeleton, self.chooser.foreseen()
        for index in self.blocks:
            after = cut_shapes(skeleton.block_shapes(index), leaving.get(index, []))
            for name, matrix in skeleton.prunable(index).items():
                inputs = matrix.shape(after)[1]
                if inputs % pattern.group:
                    raise RecipeError(
                        f"{pattern} needs widths that {pattern.group} divides, but '{skeleton.block_prefix(index)}{name}' "
                        f"has {inputs} inputs; choose another M"
                    )

    def _warn_if_nothing(self, kind: str) -> bool:
        """Say loudly when a kind rounds to nothing; returns whether it does."""
        pools = [pool for pool in self.chooser.pools if pool.kind == kind]
        if any(self.chooser.planned[pool.key] for pool in pools):
            return False
        if self.recipe.target is not None:
            log.warning("NOTHING of kind '%s' leaves: one more of each would pass the target.", kind)
            return True
        sizes = sorted({pool.size for pool in pools})
        log.warning(
            "NOTHING of kind '%s' leaves: %g of %s %s rounds down to none%s.",
            kind,
            self.recipe.cut_ratio,
            " or ".join(map(str, sizes)),
            "in the model" if kind in SPANNING else "per block",
            f"; the smallest ratio that takes one is {math.ceil(1000 / max(sizes)) / 1000:.3f}"
            if max(sizes) > 1
            else "",
        )
        return True

    def _on_the_way(
        self, needs: frozenset[type[Statistic]]
    ) -> tuple[frozenset[type[Statistic]], frozenset[type[Statistic]]]:
        """What a walk over pruned blocks gathers, and what of the dense model has to be there before it.

        Gradients of the loss are always the dense model's; a block's own come from its inputs, as input statistics do.
        """
        beforehand = gradient_kinds(needs) if self.recipe.gradient != "block" else frozenset[Any]()
        return needs - beforehand, beforehand

    # -- dense propagation with scores that are kept: score everything, then choose

    @property
    def _keeps_scores(self) -> bool:
        """Whether scores go to disk: those of units are tiny, those of weights four bytes each.

        A choice over the whole model needs them. Otherwise they only save the next run a sweep, and many gigabytes are
        not worth that: masks are then decided on the way, and no score outlives its block. A removal that reads statistics
        decides there in any case.
        """
        if self.recipe.is_global:
            return True
        if self.removal.needs() or self.reconstruction:
            return False
        return not self.recipe.masks_weights or 4 * self._maskable() <= KEPT_SCORES

    def _maskable(self) -> int:
        """How many single weights have a score."""
        skeleton = self.checkpoint.skeleton
        shapes = [(skeleton.block_shapes(index), skeleton.prunable(index)) for index in self.blocks]
        return sum(math.prod(matrix.shape(sizes)) for sizes, own in shapes for matrix in own.values())

    def _dense_scores(self, needs: frozenset[type[Statistic]]) -> BlockStore:
        """Scores of every block on disk; those of an earlier run are used again."""
        store = self._gathering.store("scores", needs)
        missing = self.workplace.workers.first(store.missing(self.blocks))
        if not missing:
            log.info("Using the scores kept from an earlier run.")
            return store

        def visit(index: int, block: nn.Module, statistics: BlockStatistics) -> None:
            if self.workplace.workers.leads:
                store.put(index, self._scorer(index, block, statistics).everything(self.chooser.groups(index)))
                self._gathering.note_finished(missing, index)

        self._gathering.visit_dense(needs, missing, visit)
        self.workplace.workers.wait()
        return store

    def _choose_from_scores(self, plan: Plan, store: BlockStore) -> None:
        removals = self.chooser.choose(store.get)

        def chunks() -> Iterator[torch.Tensor]:
            for index in self.blocks:
                yield from weight_scores(store.get(index)).values()

        remover = self._remover(WeightChooser(self.recipe, chunks), removals)
        dropped = self._whole_blocks(plan, removals)
        for index in track(self.blocks, "Choosing what leaves"):
            if index not in dropped:
                scores = weight_scores(store.get(index)).items() if self.recipe.masks_weights else ()
                decision = remover.by_scores(index, removals.get(index, []), scores)
                decision.scores.update(self.chooser.spreads.get(index, {}))
                plan.add(index, decision)

    def _whole_blocks(self, plan: Plan, removals: Mapping[int, Removals]) -> frozenset[int]:
        """Put what leaves outside of blocks into the plan; returns the blocks that leave whole."""
        outside = removals.get(OUTSIDE, [])
        if outside:
            plan.add(OUTSIDE, BlockDecision(outside, scores=self.chooser.spreads.get(OUTSIDE, {})))
        return frozenset(unit for group, units in outside if group.kind == "block" for unit in units)

    def _remover(self, weights: WeightChooser, removals: Mapping[int, Removals] | None = None) -> Remover:
        """What decides over matrices; ``removals`` says what is cut, where that is known already."""
        return Remover(self.checkpoint, self.recipe, weights, self._mask_amounts(removals))

    def _mask_amounts(self, removals: Mapping[int, Removals] | None) -> MaskAmounts:
        policy = self.recipe.parsed_policy()
        if policy is None or not self.recipe.masks_weights:
            return MaskAmounts(self.recipe)
        skeleton, cut = self.checkpoint.skeleton, self.chooser.foreseen() if removals is None else removals
        shapes: dict[int, dict[str, tuple[int, int]]] = {}
        for index in self.blocks:
            after = cut_shapes(skeleton.block_shapes(index), cut.get(index, []))
            shapes[index] = {name: matrix.shape(after) for name, matrix in skeleton.prunable(index).items()}
        sizes = [{name: math.prod(shape) for name, shape in own.items()} for own in shapes.values()]
        ratios = policy.shares(self._gathering.figures, sizes, self.recipe.mask_ratio)
        return MaskAmounts(self.recipe, dict(zip(shapes, ratios, strict=True)), shapes)

    # -- choosing on the way: under dense propagation in any order, under pruned block by block

    def _choose_in_dense(self, plan: Plan, needs: frozenset[type[Statistic]]) -> None:
        """Every block's choice while its statistics are there; nothing of it but the decision outlives the visit."""
        missing = self._undecided(plan)
        if missing:
            remover = self._remover(WeightChooser(self.recipe, list))
            self._walk(plan, needs, missing, partial(self._decide, remover))

    def _choose_on_the_way(
        self, plan: Plan, on_the_way: frozenset[type[Statistic]], beforehand: frozenset[type[Statistic]]
    ) -> None:
        """Block by block, each on what the pruned blocks before it give."""
        missing = self._undecided(plan)
        if not missing:
            return
        gradients = self._gathering.gradients(beforehand) if beforehand else None
        remover = self._remover(WeightChooser(self.recipe, list))

        def decide(index: int, block: nn.Module, statistics: BlockStatistics) -> BlockDecision:
            if gradients is not None:
                add_states(statistics, whole(gradients.get(index)), beforehand)
            return self._decide(remover, index, block, statistics)

        self._walk(plan, on_the_way, missing, decide)

    def _fit_to_scores(self, plan: Plan, store: BlockStore) -> None:
        """What leaves is chosen over the whole model by kept scores; then, in a walk of its own, weights are fitted to it."""
        missing = self._undecided(plan)
        if not missing:
            return
        removals = self.chooser.choose(store.get)
        remover = self._remover(WeightChooser(self.recipe, list), removals)
        gone = self._whole_blocks(plan, removals)
        missing = [index for index in missing if index not in gone]

        def decide(index: int, block: nn.Module, statistics: BlockStatistics) -> BlockDecision:
            kept = weight_scores(store.get(index)) if self.recipe.masks_weights else None
            return self._decide(remover, index, block, statistics, removals.get(index, []), kept)

        if missing:
            self._walk(plan, self.removal.needs(), missing, decide, gone)

    def _walk(
        self,
        plan: Plan,
        needs: frozenset[type[Statistic]],
        missing: list[int],
        decide: Decide,
        gone: frozenset[int] = frozenset(),
    ) -> None:
        """Decide block by block on what is measured of each, the dense model's or what the pruned blocks before it give.

        Args:
            gone: blocks that have left.
        """
        method, waiting = self.reconstruction, dict[int, tuple[BlockDecision, ChooseAgain | None]]()

        def settle(index: int, decision: BlockDecision) -> None:
            plan.add(index, decision)
            self._gathering.note_finished(missing, index)

        def visit(index: int, block: nn.Module, statistics: BlockStatistics) -> Mapping[str, torch.Tensor] | None:
            if method is not None:
                waiting[index] = decided(index, block, statistics)
                return None
            decision = decide(index, block, statistics)
            settle(index, decision)
            if not pruned:
                return None
            own = self.checkpoint.dtype != self.workplace.placement.dtype  # else they are mapped from the file
            return decision.in_dense_shapes(block.state_dict(), in_place=own)

        def fit(index: int, block: nn.Module, passage: Passage) -> Mapping[str, torch.Tensor]:
            chosen, again = waiting.pop(index)
            decision, replaced = reconstruct(self.checkpoint, self.recipe, index, block, chosen, passage, again)
            settle(index, decision)
            return replaced

        def decided(
            index: int, block: nn.Module, statistics: BlockStatistics
        ) -> tuple[BlockDecision, ChooseAgain | None]:
            if not (method and method.rechooses):
                return decide(index, block, statistics), None

            def choose() -> BlockDecision:  # deciding lets go of a matrix's statistics
                return decide(index, block, {name: dict(kinds) for name, kinds in statistics.items()})

            return choose(), choose

        # Without statistics of the blocks' inputs there is nothing that pruned blocks could change.
        pruned = self.recipe.propagate == "pruned" and bool(self._on_the_way(needs)[0] or method)
        if pruned:
            fitting = None
            if method:
                dense = {"follows_dense": method.follows_dense, "dense_inputs": method.dense_inputs}
                fitting = Fit(fit, method.forwards, gone=gone, **dense)
            self._gathering.sweep().pruned(needs, self.blocks, visit, done=min(missing), fit=fitting)
        else:
            self._gathering.visit_dense(needs, missing, visit)

    def _decide(
        self,
        remover: Remover,
        index: int,
        block: nn.Module,
        statistics: BlockStatistics,
        removals: Removals | None = None,
        kept_scores: Mapping[str, torch.Tensor] | None = None,
    ) -> BlockDecision:
        """Choose in one block, by its own scores unless ``removals`` says what is cut."""
        scorer = self._scorer(index, block, statistics)
        if removals is None:
            units = scorer.of_units(self.chooser.groups(index)) if self.recipe.cut_kinds else {}
            removals = self.chooser.choose_in(index, units)
        touched = list(scorer.matrices) if self.recipe.masks_weights or self.removal.updates else []
        own = [name for place, name in enumerate(touched) if self.workplace.workers.mine(place)]
        decision = remover.in_block(index, removals, scorer, own, kept_scores)
        decision.scores.update(self.chooser.spreads.get(index, {}))
        share_among(self.workplace.workers, self.checkpoint, decision, index, touched)
        return decision

    def _undecided(self, plan: Plan) -> list[int]:
        """The blocks that no earlier attempt has decided."""
        return self.workplace.workers.first([index for index in self.blocks if index not in plan.decided()])

    def _scorer(self, index: int, block: nn.Module, statistics: BlockStatistics) -> BlockScorer:
        return BlockScorer(self.checkpoint.skeleton, index, block, statistics, self.recipe)


def removes_nothing(recipe: Recipe) -> RecipeError:
    """The error of a recipe that leaves its model as it is."""
    return RecipeError(f"this recipe removes nothing from {recipe.model}; raise --ratio or choose another --unit")
