"""Totals are met exactly, nothing gives more than it can, and what is spread stays as near its wish as that allows."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.shares import apportion, apportion_steps, balance
from secateur.errors import RecipeError

wishes = st.one_of(st.just(0.0), st.just(1.0), st.floats(-1, -1e-9), st.floats(1e-9, 1e9))


@st.composite
def parts(draw):
    """Wishes, sizes and mosts of some parts."""
    count = draw(st.integers(1, 12))
    wish = draw(st.lists(wishes, min_size=count, max_size=count))
    size = draw(st.lists(st.integers(1, 10**9), min_size=count, max_size=count))
    most = draw(st.lists(st.just(0.0) | st.floats(1e-6, 0.999), min_size=count, max_size=count))
    return wish, size, most


def mean(values, sizes):
    return math.fsum(v * s for v, s in zip(values, sizes, strict=True)) / math.fsum(sizes)


@settings(max_examples=300)
@given(parts(), st.just(0.0) | st.floats(1e-6, 1))
def test_the_mean_is_exact_and_no_part_passes_its_most(given_parts, share):
    wish, size, most = given_parts
    ratio = share * mean(most, size)
    found = balance(wish, size, ratio, most)
    assert mean(found, size) == pytest.approx(ratio, abs=1e-12)
    assert all(0 <= r <= m for r, m in zip(found, most, strict=True))


@settings(max_examples=300)
@given(parts(), st.just(0.0) | st.floats(1e-6, 1))
def test_what_is_not_full_is_in_proportion_to_its_wish(given_parts, share):
    wish, size, most = given_parts
    found = balance(wish, size, share * mean(most, size), most)
    free = [(r, w) for r, w, m in zip(found, wish, most, strict=True) if w > 0 and r < m]
    for (r1, w1), (r2, w2) in itertools.combinations(free, 2):
        assert r1 * w2 == pytest.approx(r2 * w1, rel=1e-9, abs=1e-300)
    if free:  # the full ones would give more, and those that wish for nothing give nothing
        scale = free[0][0] / free[0][1]
        assert all(scale * w >= m * (1 - 1e-9) for r, w, m in zip(found, wish, most, strict=True) if w > 0 and r == m)
        assert not any(r for r, w in zip(found, wish, strict=True) if w <= 0)


@pytest.mark.parametrize("wish", [0.0, 1.0, 0.3, 7.0])
def test_equal_wishes_are_uniform(wish):
    assert balance([wish] * 3, [1, 10, 100], 0.37, [0.9] * 3) == pytest.approx([0.37] * 3, abs=1e-15)


def test_the_published_scaling_where_nothing_is_full():
    """r_l = p_l S sum(n) / sum(n p), methods §8.2."""
    p, n = [0.7, 1.0, 1.3], [100, 300, 200]
    published = [x * 0.5 * sum(n) / sum(a * b for a, b in zip(p, n, strict=True)) for x in p]
    assert balance(p, n, 0.5, [0.99] * 3) == pytest.approx(published, rel=1e-14)


def test_a_full_part_hands_on_what_it_cannot_give():
    # 0.8 * (0.5, 1, 1.5) would be (0.4, 0.8, 1.2): the last is full, and the others share 2.4 - 0.9 as 1 to 2.
    # The second is then full as well.
    assert balance([0.5, 1.0, 1.5], [1, 1, 1], 0.8, [0.9] * 3) == pytest.approx([0.6, 0.9, 0.9])
    assert balance([0.5, 1.0, 1.5], [1, 1, 1], 0.7, [0.9] * 3) == pytest.approx([0.4, 0.8, 0.9])


def test_what_wishes_for_nothing_gives_only_when_the_rest_is_full():
    assert balance([0.0, 1.0], [1, 1], 0.4, [0.9, 0.9]) == [0.0, 0.8]
    assert balance([0.0, 1.0], [1, 1], 0.6, [0.9, 0.9]) == pytest.approx([0.3, 0.9])


def test_more_than_there_is_is_refused():
    with pytest.raises(RecipeError, match=r"0\.9 is more than .* 0\.7"):
        balance([1, 1], [1, 1], 0.9, [0.5, 0.9])
    with pytest.raises(RecipeError, match=r"7 units are more than .* 6"):
        apportion([1, 1], [3, 3], 7)
    with pytest.raises(RecipeError, match="give a smaller --ratio"):
        apportion_steps([1, 1], [3, 3], 4, 0.9)


@st.composite
def counts(draw):
    number = draw(st.integers(1, 10))
    wish = draw(st.lists(wishes, min_size=number, max_size=number))
    most = draw(st.lists(st.integers(0, 500), min_size=number, max_size=number))
    return wish, most, draw(st.integers(0, sum(most)))


@settings(max_examples=300)
@given(counts())
def test_counts_add_up_and_stay_within_their_most(given_counts):
    wish, most, total = given_counts
    found = apportion(wish, most, total)
    assert sum(found) == total
    assert all(0 <= count <= m for count, m in zip(found, most, strict=True))


@settings(max_examples=300)
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=10), st.integers(1, 10**6))
def test_counts_are_within_one_of_their_wish_and_of_no_smaller_distance(wish, total):
    if sum(wish) == 0:
        return
    wish = [w * total / sum(wish) for w in wish]
    found = apportion(wish, [total] * len(wish), total)
    assert all(abs(count - w) < 1 + 1e-6 for count, w in zip(found, wish, strict=True))


def test_counts_are_the_nearest_there_are():
    """Beside every way to give the total: no other is nearer to the wishes."""
    for wish in ([1.3, 2.45, 0.25], [0.5, 0.5, 3.0], [3.9, 0.05, 0.05]):
        found = apportion(wish, [5] * 3, 4)
        ways = [way for way in itertools.product(range(6), repeat=3) if sum(way) == 4]
        nearest = min(sum((a - b) ** 2 for a, b in zip(way, wish, strict=True)) for way in ways)
        assert sum((a - b) ** 2 for a, b in zip(found, wish, strict=True)) == pytest.approx(nearest)


def test_of_equal_remainders_the_first_is_rounded_up():
    assert apportion([0.5, 0.5, 0.5, 0.5], [2] * 4, 2) == [1, 1, 0, 0]
    assert apportion([1 / 3] * 3, [1] * 3, 1) == [1, 0, 0]
    assert apportion([2.5, 2.5], [2, 3], 5) == [2, 3]
    assert apportion([], [], 0) == []


@st.composite
def patterns(draw):
    number, group = draw(st.integers(1, 10)), draw(st.sampled_from([2, 4, 8, 16]))
    wish = draw(st.lists(st.floats(0, 1), min_size=number, max_size=number))
    groups = draw(st.lists(st.integers(1, 10**7), min_size=number, max_size=number))
    return wish, groups, group, draw(st.floats(0, (group - 1) / group))


@settings(max_examples=300)
@given(patterns())
def test_patterns_meet_the_total_to_half_a_step(given_pattern):
    wish, groups, group, ratio = given_pattern
    found = apportion_steps(wish, groups, group, ratio)
    assert all(0 <= count < group for count in found)
    leaving = sum(count * each for count, each in zip(found, groups, strict=True))
    wanted = ratio * group * sum(groups)
    assert abs(leaving - wanted) <= max(groups) / 2 + 1e-6 * wanted


def test_even_patterns_stay_what_they_are():
    assert apportion_steps([1.0] * 4, [10, 20, 30, 40], 4, 0.5) == [2, 2, 2, 2]
    # 8 groups of 4 of which each gives 1.5: half of the blocks give 2, the first ones
    assert apportion_steps([1.0] * 4, [2, 2, 2, 2], 4, 0.375) == [2, 2, 1, 1]
