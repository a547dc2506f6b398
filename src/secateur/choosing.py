"""From scores of units to what leaves: how much is asked for, spread by the recipe's policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from secateur.allocation import (
    CostModel,
    Pool,
    Ranking,
    leave_everywhere,
    lowest_run,
    lowest_units,
    pools_of,
    two_tier_amounts,
    uniform_amounts,
)
from secateur.allocation.goal import Goal, Solved, solve, solve_by_kind
from secateur.allocation.policy import Policy
from secateur.allocation.pools import Chosen, Key
from secateur.allocation.shares import apportion
from secateur.allocation.two_tier import check_middle
from secateur.allocation.uniform import check_share, check_total, rounded
from secateur.checkpoint.reader import Checkpoint
from secateur.console import log
from secateur.errors import RecipeError
from secateur.quantities import Target
from secateur.recipe import Recipe
from secateur.removal.decision import Removals
from secateur.removal.spread import ScoreSpread, joined, spread_of_units
from secateur.scoring import unit_key
from secateur.structure import Structure, UnitGroup

ScoresOf = Callable[[int], Mapping[str, torch.Tensor]]
"""The stored scores of one block."""

Amounts = Mapping[Key, int]
"""How many units leave each family of each pool."""


LARGEST_SHARE = 1 - 1e-6
"""What is asked of a policy at most; how many can really leave limits counts afterwards."""

Shares = Mapping[str, float]
"""For each kind of unit the ratio that leaves."""


class Chooser:
    """Chooses the units of one model that leave.

    Args:
        structure: all units of the model.
        goal: what a round of several takes; None takes all that the recipe asks for.
        figures: gives what the allocation's policy, if it is one, measures of each block that may be pruned.

    Attributes:
        pools: what there is to choose from, in the order in which it is decided.
        notes: what the target and the rounding came to, for the record.
        spreads: by block, for each kind of unit, how the scores lie by which its units were chosen.

    Raises:
        RecipeError: the model does not have what the recipe asks for, or cannot give so much of it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        structure: Structure,
        recipe: Recipe,
        goal: Goal | None = None,
        figures: Callable[[], Sequence[Mapping[str, float]]] = list,
    ) -> None:
        self.checkpoint, self.structure, self.recipe = checkpoint, structure, recipe
        self._policy, self._figures = recipe.parsed_policy(), figures
        count = len(checkpoint.skeleton.blocks)
        self.blocks = recipe.block_range(count)
        middle = recipe.middle(count) if recipe.allocation == "two-tier" else self.blocks
        asked = {key[0] for key, units in goal.leaving.items() if units} if goal and goal.leaving else recipe.cut_kinds
        self.pools = [pool for kind in recipe.cut_kinds if kind in asked for pool in self._pools(kind, middle)]
        self.notes: dict[str, Any] = {}
        self.spreads: dict[int, dict[str, ScoreSpread]] = {}
        self._given = goal
        if goal is None and recipe.target is None:
            self._check_ratio()

    def _pools(self, kind: str, blocks: range) -> list[Pool]:
        pools = pools_of(self.structure, kind, blocks)
        if not pools:
            raise RecipeError(self._no_such_unit(kind))
        return pools

    def _no_such_unit(self, kind: str) -> str:
        there = ", ".join(sorted({group.kind for group in self.structure.units})) or "none"
        reason = next((f": {refusal.reason}" for refusal in self.structure.refused if refusal.kind == kind), "")
        if kind == "query" and not reason:
            reason = ": it has one query head for each KV head, so use head"
        return f"{self.recipe.model} has no '{kind}' units that can be cut{reason} (it has: {there})"

    def groups(self, block: int) -> list[UnitGroup]:
        """The groups of one block that are scored: all of the kinds asked for, whatever may leave in this run.

        Scores are kept, and another allocation reads them where this one protects a block.
        """
        return [group for pool in self._everywhere for group in pool.groups if group.block == block]

    def _check_ratio(self) -> None:
        if self.recipe.allocation == "two-tier":
            check_middle(self.pools, self._everywhere, self.recipe.cut_ratio)
        elif self.recipe.allocation == "uniform":
            check_share(self.pools, self.recipe.cut_ratio)
        elif self._policy is not None:
            check_total(self.pools, self.recipe.cut_ratio)

    @cached_property
    def _everywhere(self) -> list[Pool]:
        """The pools of all blocks, protected ones too: what a ratio of the whole model is a share of."""
        count = len(self.checkpoint.skeleton.blocks)
        return [pool for kind in self.recipe.cut_kinds for pool in pools_of(self.structure, kind, range(count))]

    @cached_property
    def costs(self) -> CostModel:
        return CostModel(self.checkpoint, self.structure)

    # -- how much

    def goal(self) -> Goal:
        """What is asked for altogether, before anything is scored.

        Raises:
            RecipeError: a target cannot be met.
        """
        if self._given is not None:
            return self._given
        if self.recipe.allocation != "global":
            return Goal(leaving=dict(self.amounts()))
        target = self.recipe.parsed_target()
        if target is not None:
            dense = self.costs.dense.of(target.measure)
            return Goal(remains=(dense, target.of(dense)))
        rankings = self._rankings()
        totals = {name: sum(self._held(pool) for pool in pools) for name, pools in rankings.items()}
        return Goal(
            budgets={name: int(self.recipe.cut_ratio * total) for name, total in totals.items()},
            unit_sizes={
                pool.key: self._sizes(pool).unique() if pool.kind != "block" else self._sizes(pool)
                for pool in self.pools
            },
        )

    def amounts(self, scores: Mapping[Key, torch.Tensor] | None = None) -> Amounts:
        """Under a policy that says how much each pool gives: how many units of every family.

        Scores matter only for a target when whole blocks of different sizes leave.
        """
        if self._given is not None:
            return {pool.key: self._given.leaving.get(pool.key, 0) for pool in self.pools}
        shares: Shares = dict.fromkeys(self.recipe.cut_kinds, self.recipe.cut_ratio)
        target = self.recipe.parsed_target()
        if target is not None:
            shares = self._shares(target, scores, self.recipe.round_to)
        amounts = self._spread(shares)
        if self.recipe.round_to > 1:
            without = shares if target is None else self._shares(target, scores, 1)
            self._note_rounding(self._lowest(self._spread(without, 1), scores), self._lowest(amounts, scores))
        return amounts

    def _shares(self, target: Target, scores: Mapping[Key, torch.Tensor] | None, round_to: int) -> Shares:
        """The ratio of each kind that meets the target."""
        at_most = target.of(self.costs.dense.of(target.measure))

        def cost(shares: Shares) -> int:
            return self._cost(target, self._lowest(self._spread(shares, round_to), scores))

        largest = {
            kind: max(int(self._sizes(p).max()) for p in self.pools if p.kind == kind) for kind in self.recipe.cut_kinds
        }
        solved, shares = solve_by_kind(target, at_most, cost, sorted(largest, key=lambda kind: -largest[kind]))
        if round_to == self.recipe.round_to:
            self._note_target(target, at_most, solved, shares)
        return shares

    def _cost(self, target: Target, chosen: Chosen) -> int:
        return self.costs.after(leave_everywhere(self.pools, chosen)).of(target.measure)

    def _spread(self, shares: Shares, round_to: int | None = None) -> Amounts:
        round_to = self.recipe.round_to if round_to is None else round_to
        amounts: dict[Key, int] = {}
        for kind, share in shares.items():
            pools = [pool for pool in self.pools if pool.kind == kind]
            if self.recipe.allocation == "two-tier":
                amounts |= two_tier_amounts(pools, self._everywhere, share, round_to)
            elif self._policy is not None:
                amounts |= self._by_policy(self._policy, pools, share, round_to)
            else:
                amounts |= uniform_amounts(pools, share, round_to)
        return amounts

    def _by_policy(self, policy: Policy, pools: Sequence[Pool], share: float, round_to: int) -> Amounts:
        """As many units of one kind in all as ``share`` says, each block its own part."""
        figures = dict(zip(self.blocks, self._figures(), strict=True))
        joined = [policy.of_block(figures[pool.block]) for pool in pools]
        sizes = [pool.size for pool in pools]
        total = min(int(sum(sizes) * share), sum(pool.most for pool in pools))
        if not total:
            return {pool.key: 0 for pool in pools}
        ratios = policy.spread(joined, sizes, min(share, LARGEST_SHARE))
        wish = [ratio * size for ratio, size in zip(ratios, sizes, strict=True)]
        counts = apportion(wish, [pool.most for pool in pools], total)
        return {pool.key: rounded(pool, count, round_to) for pool, count in zip(pools, counts, strict=True)}

    def _lowest(self, amounts: Amounts, scores: Mapping[Key, torch.Tensor] | None) -> Chosen:
        """The lowest units; where there are no scores yet, the first of them, which leave the same sizes."""
        blank = {pool.key: torch.zeros(pool.groups[0].count) for pool in self.pools} if scores is None else scores
        return {
            pool.key: (lowest_run if blank[pool.key].dim() == 2 else lowest_units)(
                pool, blank[pool.key], amounts[pool.key]
            )
            for pool in self.pools
            if pool.key in amounts
        }

    # -- which

    def choose(self, scores_of: ScoresOf) -> dict[int, Removals]:
        """What leaves each block and, under ``OUTSIDE``, the rest; every block has been scored."""
        scores = self._pool_scores(scores_of)
        chosen = (
            self._choose_globally(scores)
            if self.recipe.allocation == "global"
            else self._lowest(self.amounts(scores), scores)
        )
        self.spreads.clear()
        for pool in self.pools:
            self._note_spread(pool, scores[pool.key], chosen.get(pool.key, []))
        return leave_everywhere(self.pools, chosen)

    def choose_in(self, block: int, scores: Mapping[str, torch.Tensor]) -> Removals:
        """What leaves one block, by a policy that needs no other block's scores."""
        removals: Removals = []
        self.spreads.pop(block, None)
        for pool in (pool for pool in self.pools if pool.block == block):
            own = scores[unit_key(pool.groups[0])]
            removals.append((pool.groups[0], lowest_units(pool, own, self.planned[pool.key])))
            self._note_spread(pool, own, removals[-1][1])
        return removals

    @cached_property
    def planned(self) -> Amounts:
        """The amounts as far as they are known before anything is scored."""
        return self.amounts()

    def foreseen(self) -> dict[int, Removals]:
        """The sizes that will be left, before anything is scored: as many units as will leave, the first ones."""
        return leave_everywhere(self.pools, self._lowest(self.planned, None))

    def _pool_scores(self, scores_of: ScoresOf) -> dict[Key, torch.Tensor]:
        scores = {pool.key: torch.zeros(pool.groups[0].count, dtype=torch.float64) for pool in self.pools}
        whole_blocks: dict[int, torch.Tensor] = {}
        for block in self.blocks:
            own = scores_of(block) if self.pools else {}
            if "block" in own:
                whole_blocks[block] = own["block"]
            for pool in self.pools:
                for group in pool.groups:
                    if group.block == block:
                        scores[pool.key] += own[unit_key(group)]
        for pool in self.pools:
            if pool.kind == "block":
                scores[pool.key] = self._block_scores(whole_blocks, pool.groups[0].count)
        return scores

    def _block_scores(self, known: Mapping[int, torch.Tensor], count: int) -> torch.Tensor:
        """Scores of whole blocks or of runs of them; the last is beyond price where the criterion keeps it."""
        criterion = self.recipe.parsed_criterion()
        scores = criterion.over_blocks(known, count)
        if criterion.keeps_last and self.recipe.names_no_blocks:
            scores[..., -1] = torch.inf
            log.info("The last block stays, since the head reads what it gives; name it in --blocks to let it leave.")
        return scores

    # -- one ranking over the model

    def _rankings(self) -> dict[str, list[Pool]]:
        if self.recipe.rank == "together":
            return {"together": self.pools} if self.pools else {}
        return {kind: [pool for pool in self.pools if pool.kind == kind] for kind in self.recipe.cut_kinds}

    def _sizes(self, pool: Pool) -> torch.Tensor:
        """How many parameters each unit holds; in a round of several those of the dense model, which its goal counts in."""
        if self._given is not None and pool.key in self._given.unit_sizes:
            return self._given.unit_sizes[pool.key].expand(pool.groups[0].count)
        return pool.sizes(self.costs.shapes_of)

    def _held(self, pool: Pool) -> int:
        """Parameters of the units that may leave."""
        return int(self._sizes(pool)[list(pool.may_leave)].sum())

    def _choose_globally(self, scores: Mapping[Key, torch.Tensor]) -> Chosen:
        goal = self.goal()
        share, target = self.recipe.cut_ratio, self.recipe.parsed_target()
        if goal.remains is not None and target is not None:
            solved = solve(
                target,
                goal.remains[1],
                lambda trial: self._cost(target, self._round_up(self._ranked(scores, trial, goal), scores)),
                " and ".join(self.recipe.cut_kinds),
            )
            share = solved.share
            self._note_target(target, goal.remains[1], solved, {"all": share})
        free = self._ranked(scores, share, goal)
        chosen = self._round_up(free, scores)
        if self.recipe.round_to > 1:
            self._note_rounding(free, chosen)
        return chosen

    def _ranked(self, scores: Mapping[Key, torch.Tensor], share: float, goal: Goal) -> Chosen:
        """The lowest of each ranking. Whole blocks come first: units inside those that leave are no longer there."""
        chosen: Chosen = {}
        for name, pools in self._rankings().items():
            dropped = {unit for (kind, _, _), units in chosen.items() if kind == "block" for unit in units}
            ranking = self._ranking(tuple(pool for pool in pools if pool.block not in dropped), scores)
            # Out of fewer blocks the same share is fewer parameters.
            budget = goal.budgets[name] if name in goal.budgets and not dropped else int(share * ranking.total)
            chosen |= ranking.take(budget)
        return chosen

    def _ranking(self, pools: tuple[Pool, ...], scores: Mapping[Key, torch.Tensor]) -> Ranking:
        keys = tuple(pool.key for pool in pools)
        if keys not in self._sorted:  # a target tries many budgets on one ranking
            sizes = {pool.key: self._sizes(pool) for pool in pools}
            self._sorted[keys] = Ranking(pools, scores, sizes, standardise=self.recipe.normalise == "zscore")
        return self._sorted[keys]

    @cached_property
    def _sorted(self) -> dict[tuple[Key, ...], Ranking]:
        return {}

    def _round_up(self, chosen: Chosen, scores: Mapping[Key, torch.Tensor]) -> Chosen:
        """Give back the best of what was chosen until widths are rounded."""
        result = {}
        for pool in self.pools:
            units = chosen.get(pool.key, [])
            left = rounded(pool, len(units), self.recipe.round_to)
            worst_first = sorted(units, key=lambda unit, pool=pool: float(scores[pool.key][unit]))  # type: ignore[misc]
            result[pool.key] = sorted(worst_first[:left])
        return {key: units for key, units in result.items() if key in chosen}

    # -- what is said of it

    def _note_spread(self, pool: Pool, score_U: torch.Tensor, gone: Sequence[int]) -> None:
        if score_U.dim() == 1:  # runs of blocks have a score for every length
            own, spread = self.spreads.setdefault(pool.block, {}), spread_of_units(score_U, gone)
            own[pool.kind] = joined([own[pool.kind], spread]) if pool.kind in own else spread

    def _note_target(self, target: Target, at_most: int, solved: Solved, shares: Shares) -> None:
        self.notes["target"] = {
            "measure": target.measure,
            "at_most": at_most,
            "reached": solved.reached,
            "next_larger": solved.before,
            "ratios": {kind: round(share, 6) for kind, share in shares.items()},
        }

    def _note_rounding(self, free: Chosen, kept: Chosen) -> None:
        more: dict[str, int] = {}
        for key, units in free.items():
            more[key[0]] = more.get(key[0], 0) + len(units) - len(kept[key])
        smaller, larger = (self.costs.after(leave_everywhere(self.pools, choice)) for choice in (free, kept))
        self.notes["rounding"] = {
            "round_to": self.recipe.round_to,
            "units_kept_more": {kind: count for kind, count in more.items() if count},
            "parameters_kept_more": larger.params - smaller.params,
        }
