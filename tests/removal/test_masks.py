"""Masks: exact counts, N of every M, ties, and what is packed is what is unpacked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.removal import masks, threshold
from secateur.removal.amount import Amount
from secateur.removal.masks import n_of_m_mask, pack, row_mask, threshold_mask, unpack
from secateur.removal.selection import lowest_mask, without_lowest

scores = st.builds(
    lambda rows, groups, group, seed: (torch.randint(5, (rows, groups * group), generator=torch.Generator().manual_seed(seed)).float(), group),
    st.integers(1, 5), st.integers(1, 5), st.integers(2, 9), st.integers(0, 99),
)  # fmt: skip


@settings(max_examples=60)
@given(scores, st.data())
def test_n_of_m_keeps_the_highest_of_every_group(drawn, data):
    score_OI, group = drawn
    keep = data.draw(st.integers(1, group - 1))
    mask = n_of_m_mask(score_OI, keep, group, "w").reshape(-1, group)
    assert (mask.sum(1) == keep).all()
    for kept, values in zip(mask, score_OI.reshape(-1, group), strict=True):
        assert values[kept].min() >= values[~kept].max()


@settings(max_examples=60)
@given(scores, st.floats(0, 0.999))
def test_layer_counts_and_packing(drawn, ratio):
    score_OI, _ = drawn
    mask = without_lowest(score_OI, int(score_OI.numel() * ratio))
    assert int((~mask).sum()) == int(score_OI.numel() * ratio)
    assert torch.equal(unpack(pack(mask), tuple(mask.shape)), mask)


def test_width_that_m_does_not_divide_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"2:4 needs widths that 4 divides, but 'model.q' has 6 inputs"):
        n_of_m_mask(torch.zeros(2, 6), 2, 4, "model.q")


@pytest.mark.parametrize("within", ["row", "share", "block", "layer"])
def test_scores_that_lie_transposed_give_the_same_mask(within):
    """As GPT-2 keeps its weights."""
    score_OI = torch.randint(5, (12, 40), generator=torch.Generator().manual_seed(1)).float()
    amount = Amount(400, within)
    assert torch.equal(lowest_mask(score_OI.T.contiguous().T, amount, "w", 16), lowest_mask(score_OI, amount, "w", 16))


def test_threshold_takes_the_first_ties_and_hands_on_the_rest():
    mask, left = threshold_mask(torch.tensor([[1.0, 2.0], [2.0, 3.0]]), 2.0, 1)
    assert (mask.tolist(), left) == ([[False, False], [True, True]], 0)
    _, left = threshold_mask(torch.tensor([[2.0]]), 2.0, 3)
    assert left == 2


def lowest_by_sort(score_RI, leaving):
    """What the masks mean: of a stable sort of every row the first ``leaving`` leave."""
    keep_RI = torch.ones_like(score_RI, dtype=torch.bool)
    return keep_RI.scatter_(1, torch.sort(score_RI, dim=1, stable=True).indices[:, :leaving], False)


def scores_of(kind, rows, inputs, seed):
    """Scores of every kind of tie: none, many, zeros of both signs, rows that are all equal, and the largest numbers."""
    generator = torch.Generator().manual_seed(seed)
    drawn_OI = torch.randint(4, (rows, inputs), generator=generator)
    largest = torch.finfo(torch.float32).max
    return {
        "apart": lambda: torch.randn(rows, inputs, generator=generator),
        "tied": lambda: drawn_OI.float(),
        "zeros": lambda: torch.tensor([-0.0, 0.0, -1e-45, 1e-45])[drawn_OI],
        "equal": lambda: drawn_OI[:, :1].expand(rows, inputs).float(),
        "extreme": lambda: torch.tensor([-largest, -1.0, 1.0, largest])[drawn_OI],
    }[kind]()


@pytest.fixture
def small_chunks(monkeypatch):
    """So small that every matrix of these tests is taken in several parts."""
    monkeypatch.setattr(masks, "CHUNK", 7)
    monkeypatch.setattr(threshold, "CHUNK", 5)


KINDS = st.sampled_from(["apart", "tied", "zeros", "equal", "extreme"])
RATIOS = st.one_of(st.floats(0, 0.9999), st.sampled_from([0.0, 0.5, 0.999999, 1.0]))


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(KINDS, st.integers(1, 6), st.integers(1, 40), RATIOS, st.integers(0, 999))
def test_selection_takes_what_a_stable_sort_takes(kind, rows, inputs, ratio, seed):
    score_OI = scores_of(kind, rows, inputs, seed)
    assert torch.equal(row_mask(score_OI, ratio), lowest_by_sort(score_OI, int(inputs * ratio)))
    by_layer = lowest_by_sort(score_OI.reshape(1, -1), int(score_OI.numel() * ratio))
    assert torch.equal(without_lowest(score_OI, int(score_OI.numel() * ratio)), by_layer.reshape(rows, inputs))


@pytest.mark.parametrize("kind", ["apart", "tied", "zeros", "equal"])
def test_the_size_of_the_parts_changes_nothing(kind, monkeypatch):
    score_OI = scores_of(kind, 37, 64, 0)
    whole = [
        row_mask(score_OI, 0.37),
        without_lowest(score_OI, int(score_OI.numel() * 0.37)),
        n_of_m_mask(score_OI, 3, 8, "w"),
    ]
    monkeypatch.setattr(masks, "CHUNK", 130)
    monkeypatch.setattr(threshold, "CHUNK", 100)
    parts = [
        row_mask(score_OI, 0.37),
        without_lowest(score_OI, int(score_OI.numel() * 0.37)),
        n_of_m_mask(score_OI, 3, 8, "w"),
    ]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_masks_take_bounded_memory_beyond_the_matrix(monkeypatch):
    """Neither a sort's indices nor keys of the whole matrix are ever made: numbers in flight stay near the part's size."""
    sizes = []
    for name in ("partition",):
        original = getattr(masks.np, name)
        monkeypatch.setattr(
            masks.np, name, lambda a, *rest, o=original, **more: (sizes.append(a.size), o(a, *rest, **more))[1]
        )
    monkeypatch.setattr(masks, "CHUNK", 256)
    row_mask(torch.rand(64, 64), 0.5)
    assert max(sizes) <= 256
    assert sum(sizes) == 64 * 64
