"""How much leaves from where: exact counts, exact thresholds, nothing emptied."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation import Pool, Ranking, exact_threshold, lowest_units, two_tier_amounts, uniform_amounts
from secateur.allocation.across_blocks import zscore
from secateur.allocation.goal import Goal, solve, solve_by_kind
from secateur.allocation.two_tier import check_middle, middle_share
from secateur.allocation.uniform import check_share, leaving
from secateur.errors import RecipeError
from secateur.quantities import Target
from secateur.structure import OUTSIDE, Member, UnitGroup


def pool(
    count: int, families: int = 1, block: int = 0, kind: str = "channel", minimum: int = 1, may_leave=None
) -> Pool:
    members = (Member("w", 0, "producer", np.arange(count)[:, None]),)
    group = UnitGroup(kind, block, "mlp", count, families, members, minimum=minimum)
    return Pool(kind, (group,), tuple(range(count)) if may_leave is None else tuple(may_leave))


def random_scores(pools, seed):
    generator = torch.Generator().manual_seed(seed)
    return {p.key: torch.rand(p.groups[0].count, generator=generator, dtype=torch.float64) for p in pools}


def ranked(pools, scores, each):
    sizes = {p.key: torch.full((p.groups[0].count,), size) for p, size in zip(pools, each, strict=True)}
    return Ranking(pools, scores, sizes)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60)
@given(st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=5), st.data())
def test_threshold_counts_exactly(chunks, data):
    tensors = [torch.tensor(chunk, dtype=torch.float32) for chunk in chunks]
    everything = torch.cat(tensors)
    count = data.draw(st.integers(1, len(everything)))
    threshold, ties = exact_threshold(lambda: tensors, count)
    assert threshold == everything.sort().values[count - 1]
    assert int((everything < threshold).sum()) + ties == count
    assert 1 <= ties <= int((everything == threshold).sum())


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 12), st.floats(0, 0.999), st.integers(0, 99))
def test_uniform_takes_the_lowest_of_every_family(families, size, ratio, seed):
    mine = pool(families * size, families)
    scores = random_scores([mine], seed)[mine.key]
    removed = lowest_units(mine, scores, uniform_amounts([mine], ratio)[mine.key])
    assert removed == sorted(set(removed))
    for family in range(families):
        gone = [unit for unit in removed if unit // size == family]
        assert len(gone) == int(size * ratio) < size
        left = [unit for unit in range(family * size, (family + 1) * size) if unit not in gone]
        assert not gone or max(scores[u] for u in gone) <= min(scores[u] for u in left)


def test_of_equal_scores_the_lower_index_leaves():
    assert lowest_units(pool(6), torch.ones(6), 3) == [0, 1, 2]


def test_only_blocks_that_may_leave_do():
    mine = pool(6, kind="block", block=OUTSIDE, may_leave=[2, 3, 4])
    assert lowest_units(mine, torch.tensor([0.0, 1, 5, 3, 4, 2]), leaving(mine, 0.7)) == [3, 4]


@settings(max_examples=100)
@given(st.integers(1, 200), st.floats(0, 0.999), st.sampled_from([8, 64, 128]))
def test_rounding_keeps_a_multiple_and_never_less(size, ratio, round_to):
    mine = pool(size)
    kept, free = size - leaving(mine, ratio, round_to), size - leaving(mine, ratio)
    assert free <= kept <= size
    assert kept - free < round_to
    assert kept % round_to == 0 or kept == size


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(1, 3)), min_size=3, max_size=12),
    st.fractions(0, Fraction(9, 10), max_denominator=100),
    st.data(),
)
def test_every_policy_hits_its_target_and_empties_nothing(shapes, ratio, data):
    """To one unit a family for counts, to one unit's parameters for a ranking; the minimum always stays."""
    pools = [pool(size * 2, block=i, minimum=min(minimum, size)) for i, (size, minimum) in enumerate(shapes)]
    share = float(ratio)
    middle = pools[1 : data.draw(st.integers(2, len(pools)))]
    for chosen_from, amounts, wanted in (
        (pools, uniform_amounts(pools, share), lambda p: share),
        (middle, two_tier_amounts(middle, pools, share), lambda p: middle_share(middle, pools, share, "channel")),
    ):
        for mine in chosen_from:
            gone = len(lowest_units(mine, torch.zeros(mine.size), amounts[mine.key]))
            assert mine.size - gone >= mine.groups[0].minimum
            assert gone == mine.most or mine.size * wanted(mine) - 1 < gone <= mine.size * wanted(mine)
    if all(two_tier_amounts(middle, pools, share)[p.key] < p.most for p in middle):
        everything = sum(p.size for p in pools)
        gone = sum(two_tier_amounts(middle, pools, share).values())
        assert everything * Fraction(str(share)) - len(middle) < gone <= everything * Fraction(str(share))
    each = data.draw(st.lists(st.integers(1, 50), min_size=len(pools), max_size=len(pools)))
    ranking = ranked(pools, random_scores(pools, 0), each)
    budget = int(ranking.total * share)
    chosen = ranking.take(budget)
    gone = sum(len(chosen[p.key]) * size for p, size in zip(pools, each, strict=True))
    assert gone <= budget
    assert all(p.size - len(chosen[p.key]) >= p.groups[0].minimum for p in pools)
    open_still = [size for p, size in zip(pools, each, strict=True) if len(chosen[p.key]) < p.most]
    assert not open_still or gone > budget - min(open_still)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=6),
    st.floats(0, 0.999),
    st.integers(0, 99),
)
def test_a_ranking_takes_the_lowest_of_every_pool(shapes, ratio, seed):
    pools = [pool(count, block=i) for i, (count, _) in enumerate(shapes)]
    scores = random_scores(pools, seed)
    ranking = ranked(pools, scores, [size for _, size in shapes])
    for mine, units in zip(pools, ranking.take(int(ratio * ranking.total)).values(), strict=True):
        left = [u for u in range(mine.size) if u not in units]
        assert not units or max(scores[mine.key][u] for u in units) <= min(scores[mine.key][u] for u in left)


def test_a_ranking_compares_by_parameter():
    """A head of 100 parameters worth 10 is dearer a parameter than a channel of 1 worth 0.05."""
    pools = [pool(3, kind="head"), pool(10)]
    scores = {pools[0].key: torch.full((3,), 10.0), pools[1].key: torch.full((10,), 0.05)}
    assert list(ranked(pools, scores, [100, 1]).take(5).values()) == [[], [0, 1, 2, 3, 4]]


def test_the_published_two_tiers():
    """25 % out of blocks 4 to 29 of 32 are 20.3 % of all (methods §14.3)."""
    pools = [pool(11008, block=i) for i in range(32)]
    amounts = two_tier_amounts(pools[4:30], pools, 0.25 * 26 / 32)
    assert set(amounts.values()) == {11008 // 4}


def test_what_the_middle_cannot_give_is_refused_with_the_largest_ratio():
    pools = [pool(10, block=i) for i in range(4)]
    with pytest.raises(RecipeError, match=r"largest --ratio is 0\.45"):
        check_middle(pools[1:3], pools, 0.6)
    check_middle(pools[1:3], pools, 0.45)


def test_experts_that_a_token_needs_stay():
    experts = pool(8, kind="expert", minimum=6)
    with pytest.raises(RecipeError, match=r"4 of 8 expert units .* 6 have to stay.* 2 of 8"):
        check_share([experts], 0.5)
    check_share([experts], 0.25)


def test_parts_of_a_goal_add_up():
    """However many rounds, each count is reached exactly, and blocks that left are asked for nothing more."""
    goal = Goal(leaving={("channel", 0, "mlp"): 7, ("channel", 2, "mlp"): 10, ("block", OUTSIDE, "b"): 1})
    for steps in (1, 2, 3, 5, 20):
        parts = [goal.part(step, steps, range(3), {}) for step in range(1, steps + 1)]
        assert {key: sum(part.leaving[key] for part in parts) for key in goal.leaving} == goal.leaving
    assert goal.part(1, 1, [0, 2], {}).leaving[("channel", 1, "mlp")] == 10, "block 2 is the second that is left"
    key = ("channel", 2, "mlp")
    ranking = Goal(budgets={"together": 60}, unit_sizes={key: torch.tensor([7])}, remains=(1000, 500))
    first, second = ranking.part(1, 2, range(3), {}), ranking.part(2, 2, range(3), {key: [0, 5, 9]})
    assert (first.budgets["together"], second.budgets["together"]) == (30, 60 - 3 * 7)
    assert (first.remains, second.remains) == ((1000, 750), (1000, 500))


def test_a_target_is_met_by_the_smallest_share():
    def cost(share: float) -> int:
        return 1000 - 90 * int(10 * min(share, 0.9))

    solved = solve(Target("params", None, Fraction(1, 2)), 500, cost, "channel")
    assert (solved.reached, solved.before) == (460, 550)
    assert solved.share == pytest.approx(0.6)
    with pytest.raises(RecipeError, match="smallest is 190 parameters"):
        solve(Target("params", 100), 100, cost, "channel")
    with pytest.raises(RecipeError, match="nothing has to leave"):
        solve(Target("params", 1000), 1000, cost, "channel")


def test_a_coarse_kind_is_held_where_it_would_jump_past_the_target():
    def cost(shares) -> int:
        """Three heads of 1000, a hundred channels of 30."""
        return 10_000 - 1000 * int(3 * min(shares["head"], 0.7)) - 30 * int(100 * min(shares["channel"], 0.99))

    solved, shares = solve_by_kind(Target("params", 8_500), 8_500, cost, ["head", "channel"])
    assert solved.reached == 8_500, "one head and 33 channels would leave 8010"
    assert (int(3 * shares["head"]), int(100 * shares["channel"])) == (0, 50)
    solved, shares = solve_by_kind(Target("params", 6_000), 6_000, cost, ["head", "channel"])
    assert (int(3 * shares["head"]), solved.reached) == (2, 5_990), "heads do not jump here, so the ratio is common"


def test_a_standardised_ranking_is_a_plain_loop_over_pools():
    """Scores of other scales in every pool: per parameter the small ones would all leave first."""
    pools = [pool(12, block=i, kind=kind) for i in range(3) for kind in ("head", "channel")]
    scores = {key: score * 10.0 ** (3 * n) + n for n, (key, score) in enumerate(random_scores(pools, 4).items())}
    each = [9 if one.kind == "head" else 2 for one in pools]
    sizes = {p.key: torch.full((12,), size) for p, size in zip(pools, each, strict=True)}
    entries = []
    for place, one in enumerate(pools):
        values = scores[one.key].tolist()
        mean = sum(values) / len(values)
        deviation = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5
        entries += [((value - mean) / deviation, place, unit) for unit, value in enumerate(values)]
    budget = left = 12 * sum(each) // 3
    expected = {one.key: [] for one in pools}
    for _, place, unit in sorted(entries):
        if each[place] <= left and len(expected[pools[place].key]) < pools[place].most:
            left -= each[place]
            expected[pools[place].key].append(unit)
    found = Ranking(pools, scores, sizes, standardise=True).take(budget)
    assert found == {key: sorted(units) for key, units in expected.items()}
    assert all(found.values()), "every pool gives something"
    assert found != Ranking(pools, scores, sizes).take(budget)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e300, -3.0])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_scores_have_the_standard_score_zero(value, count):
    assert zscore(torch.full((count,), value, dtype=torch.float64)).tolist() == [0.0] * count


def test_standard_scores_of_any_scale_are_finite_and_infinite_ones_stay():
    for scale in (1e-320, 1e-200, 1.0, 1e200):
        found = zscore(torch.tensor([1.0, 2.0, 4.0, torch.inf], dtype=torch.float64) * scale)
        assert found[:3].isfinite().all()
        assert found[:3].mean().item() == pytest.approx(0, abs=1e-9)
        assert found[:3].std().item() == pytest.approx(1)
        assert found[3] == torch.inf
    assert zscore(torch.tensor([torch.inf])).tolist() == [torch.inf]
