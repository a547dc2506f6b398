"""The run of blocks that leaves is the lowest of all there are."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation import Pool, Ranking, lowest_run
from secateur.structure import OUTSIDE, Member, UnitGroup


def blocks(count: int, may_leave: range | None = None) -> Pool:
    members = (Member("w", 0, "producer", np.arange(count)[:, None]),)
    group = UnitGroup("block", OUTSIDE, "layers", count, 1, members, minimum=1)
    return Pool("block", (group,), tuple(may_leave or range(count)))


@settings(max_examples=200)
@given(st.data())
def test_no_other_run_is_lower(data):
    total = data.draw(st.integers(2, 9))
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    count = data.draw(st.integers(1, stop - start))
    score_UU = torch.tensor(
        data.draw(st.lists(st.integers(0, 5), min_size=total * total, max_size=total * total)), dtype=torch.float64
    ).reshape(total, total)
    found = lowest_run(blocks(total, range(start, stop)), score_UU, count)
    assert found == list(range(found[0], found[0] + count))
    assert start <= found[0]
    assert found[-1] < stop
    for first in range(start, stop - count + 1):
        other = score_UU[first, first + count - 1]
        assert score_UU[found[0], found[-1]] <= other
        assert first >= found[0] or other > score_UU[found[0], found[-1]], "of equal runs the earlier leaves"


def test_nothing_is_no_run():
    assert lowest_run(blocks(3), torch.ones(3, 3), 0) == []


def test_a_block_beyond_price_stays_in_a_ranking_even_where_it_alone_would_fit():
    mine = blocks(3)
    scores = {mine.key: torch.tensor([1.0, 2.0, torch.inf])}
    ranking = Ranking([mine], scores, {mine.key: torch.tensor([10, 10, 4])})
    assert ranking.total == 24
    assert ranking.take(15) == {mine.key: [0]}
    assert ranking.take(24) == {mine.key: [0, 1]}
