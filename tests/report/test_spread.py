"""Histograms of scores against counting one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.removal.spread import BINS_AN_OCTAVE, SAMPLE, joined, spread_of_units, spread_of_weights
from secateur.report.page.charts import quantile, thresholds

SCORES = st.lists(st.floats(0, 1e20, allow_subnormal=False), min_size=1, max_size=40)


@given(SCORES, st.data())
def test_every_score_is_counted_once_where_it_belongs(scores, data):
    gone = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    score_U = torch.tensor(scores, dtype=torch.float64)
    spread = spread_of_units(score_U, gone)
    counts = {(place, fate): 0 for place in range(len(spread.kept)) for fate in ("kept", "gone")}
    nothing = [0, 0]
    for unit, score in enumerate(scores):
        leaves = unit in gone
        if score <= 0:
            nothing[leaves] += 1
            continue
        place = math.floor(float(torch.tensor(score, dtype=torch.float64).log2()) * BINS_AN_OCTAVE) - spread.first
        counts[place, "gone" if leaves else "kept"] += 1
    assert spread.kept == [counts[place, "kept"] for place in range(len(spread.kept))]
    assert spread.gone == [counts[place, "gone"] for place in range(len(spread.gone))]
    assert list(spread.nothing) == nothing
    stays = [score for unit, score in enumerate(scores) if unit not in gone and score > 0]
    assert spread.lowest_kept == (min(stays) if stays else None)
    assert spread.of == len(scores)


@given(st.lists(SCORES, min_size=1, max_size=4))
def test_joined_histograms_are_that_of_all_scores(parts):
    spreads = [spread_of_units(torch.tensor(part, dtype=torch.float64), range(0, len(part), 2)) for part in parts]
    together = [score for part in parts for score in part]
    gone, place = [], 0
    for part in parts:
        gone += range(place, place + len(part), 2)
        place += len(part)
    assert joined(spreads) == spread_of_units(torch.tensor(together, dtype=torch.float64), gone)


def test_what_is_beyond_price_and_what_is_too_much_to_count():
    infinite = spread_of_units(torch.tensor([1.0, torch.inf]), [0])
    assert (sum(infinite.kept), sum(infinite.gone), infinite.lowest_kept) == (0, 1, None)
    score_OI = torch.rand(2000, 600)
    spread = spread_of_weights(score_OI, score_OI > 0.5)
    assert spread.of == 1_200_000
    assert sum(spread.kept) + sum(spread.gone) <= SAMPLE
    assert sum(spread.gone) / (sum(spread.kept) + sum(spread.gone)) == pytest.approx(0.5, abs=0.01)


def test_quantiles_are_as_near_as_the_bins():
    score_U = torch.linspace(1, 100, 400)
    spread = spread_of_units(score_U, [])
    for share in (0.1, 0.5, 0.9):
        assert quantile(spread, share) == pytest.approx(
            float(score_U.quantile(share)), rel=2 ** (1 / BINS_AN_OCTAVE) - 1
        )


def test_a_threshold_is_drawn_only_where_one_parts_the_scores():
    parted = {
        0: spread_of_units(torch.tensor([1.0, 2, 3, 4]), [0, 1]),
        1: spread_of_units(torch.tensor([5.0, 6, 7]), [0]),
    }
    assert [edge["threshold"] for edge in thresholds(parted)] == [3, 6]
    whole = {0: spread_of_units(torch.tensor([1.0, 2, 3]), [0]), 1: spread_of_units(torch.tensor([1.5, 2]), [0])}
    assert thresholds(whole) == [{"threshold": 2.0, "blocks": "all blocks"}]
    mixed = {0: spread_of_units(torch.tensor([1.0, 2, 3]), [2])}
    assert thresholds(mixed) == []
