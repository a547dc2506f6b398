"""Masks: exact counts, N of every M, ties, and what is packed is what is unpacked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.removal.masks import layer_mask, n_of_m_mask, pack, threshold_mask, unpack

scores = st.builds(
    lambda rows, groups, group, seed: (torch.randint(5, (rows, groups * group), generator=torch.Generator().manual_seed(seed)).float(), group),
    st.integers(1, 5), st.integers(1, 5), st.integers(2, 9), st.integers(0, 99),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(scores, st.data())
def test_n_of_m_keeps_the_highest_of_every_group(drawn, data):
    score_OI, group = drawn
    keep = data.draw(st.integers(1, group - 1))
    mask = n_of_m_mask(score_OI, keep, group, "w").reshape(-1, group)
    assert (mask.sum(1) == keep).all()
    for kept, values in zip(mask, score_OI.reshape(-1, group), strict=True):
        assert values[kept].min() >= values[~kept].max()


@settings(deadline=None, max_examples=60)
@given(scores, st.floats(0, 0.999))
def test_layer_counts_and_packing(drawn, ratio):
    score_OI, _ = drawn
    mask = layer_mask(score_OI, ratio)
    assert int((~mask).sum()) == int(score_OI.numel() * ratio)
    assert torch.equal(unpack(pack(mask), tuple(mask.shape)), mask)


def test_width_that_m_does_not_divide_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"2:4 needs widths that 4 divides, but 'model.q' has 6 inputs"):
        n_of_m_mask(torch.zeros(2, 6), 2, 4, "model.q")


def test_threshold_takes_the_first_ties_and_hands_on_the_rest():
    mask, left = threshold_mask(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), 2.0, 1)
    assert (mask.tolist(), left) == ([[False, False], [True, True]], 0)
    _, left = threshold_mask(torch.tensor([[2.0]]), 2.0, 3)
    assert left == 2
