"""How much leaves from where: exact counts, exact thresholds, nothing emptied."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation import exact_threshold, global_units, uniform_units
from secateur.structure import Member, UnitGroup


def group(count: int, families: int = 1, block: int = 0, kind: str = "channel") -> UnitGroup:
    members = (Member("w", 0, "producer", np.arange(count)[:, None]),)
    return UnitGroup(kind, block, "mlp", count, families, members)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=5), st.data())
def test_threshold_counts_exactly(chunks, data):
    tensors = [torch.tensor(chunk, dtype=torch.float32) for chunk in chunks]
    everything = torch.cat(tensors)
    leaving = data.draw(st.integers(1, len(everything)))
    threshold, ties = exact_threshold(lambda: tensors, leaving)
    assert threshold == everything.sort().values[leaving - 1]
    assert int((everything < threshold).sum()) + ties == leaving
    assert 1 <= ties <= int((everything == threshold).sum())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 12), st.floats(0, 0.999), st.integers(0, 99))
def test_uniform_takes_the_lowest_of_every_family(families, size, ratio, seed):
    scores = torch.rand(families * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    removed = uniform_units(group(families * size, families), scores, ratio)
    assert removed == sorted(set(removed))
    for family in range(families):
        mine = [unit for unit in removed if unit // size == family]
        assert len(mine) == int(size * ratio) < size
        left = [unit for unit in range(family * size, (family + 1) * size) if unit not in mine]
        assert not mine or max(scores[u] for u in mine) <= min(scores[u] for u in left)


def test_of_equal_scores_the_lower_index_leaves():
    assert uniform_units(group(6), torch.ones(6), 0.5) == [0, 1, 2]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=6),
    st.floats(0, 0.999),
    st.integers(0, 99),
)
def test_global_stays_within_the_ratio_and_empties_nothing(shapes, ratio, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = [group(count, block=i) for i, (count, _) in enumerate(shapes)]
    scores = [torch.rand(count, generator=generator) for count, _ in shapes]
    each = [size for _, size in shapes]
    chosen = global_units(groups, scores, each, ratio)
    gone = sum(len(units) * size for units, size in zip(chosen, each, strict=True))
    assert gone <= ratio * sum(count * size for count, size in shapes)
    for units, (count, _), score in zip(chosen, shapes, scores, strict=True):
        assert len(units) < count
        left = [u for u in range(count) if u not in units]
        assert not units or max(score[u] for u in units) <= min(score[u] for u in left)


def test_global_compares_by_parameter():
    """A head of 100 parameters worth 10 is dearer a parameter than a channel of 1 worth 0.05."""
    groups = [group(3, kind="head"), group(10, kind="channel")]
    chosen = global_units(groups, [torch.full((3,), 10.0), torch.full((10,), 0.05)], [100, 1], 5 / 310)
    assert chosen == [[], [0, 1, 2, 3, 4]]
