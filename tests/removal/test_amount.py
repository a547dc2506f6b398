"""Amounts: whole numbers that add up, and masks that take exactly as much."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.removal.amount import Amount, block_counts, row_counts
from secateur.removal.selection import lowest_mask

sizes = st.integers(1, 9)


@settings(max_examples=200)
@given(sizes, st.integers(1, 300), st.integers(1, 130), st.data())
def test_parts_add_up_and_no_part_loses_more_than_it_has(outputs, inputs, block_size, data):
    amount = Amount(data.draw(st.integers(0, outputs * inputs)), "block")
    counts = block_counts(amount, inputs, outputs, block_size)
    assert sum(counts) == amount.leaving
    widths = [len(part) for part in torch.arange(inputs).split(block_size)]
    assert len(counts) == len(widths)
    assert all(0 <= count <= outputs * width for count, width in zip(counts, widths, strict=True))
    even = amount.leaving / (outputs * inputs)
    assert all(abs(count - even * outputs * width) < 1 for count, width in zip(counts, widths, strict=True))
    rows_O = row_counts(amount, (outputs, inputs))
    assert int(rows_O.sum()) == amount.leaving
    assert int(rows_O.max() - rows_O.min()) <= 1
    if amount.leaving <= outputs * (inputs - 1):
        assert int(rows_O.max()) < inputs


def test_one_more_leaves_where_the_next_lowest_is_lowest_and_else_above():
    score_OI = torch.tensor([[1.0, 9.0, 9.0], [1.0, 3.0, 9.0], [5.0, 2.0, 9.0], [0.0, 3.0, 9.0]])
    amount = Amount(6, "row")
    assert row_counts(amount, (4, 3)).tolist() == [2, 2, 1, 1]
    assert row_counts(amount, (4, 3), score_OI).tolist() == [1, 2, 1, 2]
    assert row_counts(amount, (4, 3), torch.ones(4, 3)).tolist() == [2, 2, 1, 1]


@settings(max_examples=100)
@given(sizes, st.integers(1, 40), st.integers(1, 17), st.integers(0, 99), st.data())
def test_masks_take_the_lowest_of_what_is_compared(outputs, inputs, block_size, seed, data):
    score_OI = torch.randint(6, (outputs, inputs), generator=torch.Generator().manual_seed(seed)).float()
    leaving = data.draw(st.integers(0, outputs * inputs))
    for within in ("row", "block", "layer"):
        mask_OI = lowest_mask(score_OI, Amount(leaving, within), "w", block_size)
        assert int((~mask_OI).sum()) == leaving
        places = torch.arange(outputs * inputs).reshape(outputs, inputs)
        parts = {"row": places.split(1), "block": places.split(block_size, dim=1), "layer": [places]}[within]
        lowest_OI = torch.ones_like(mask_OI)
        for part in (part.reshape(-1) for part in parts):
            gone = int((~mask_OI.reshape(-1)[part]).sum())
            order = torch.sort(score_OI.reshape(-1)[part], stable=True).indices
            lowest_OI.view(-1)[part[order[:gone]]] = False
        if bool(lowest_OI.any(dim=1).all()):
            assert torch.equal(mask_OI, lowest_OI)
        elif leaving <= outputs * (inputs - 1):
            assert mask_OI.any(dim=1).all()
            bare_O = ~lowest_OI.any(dim=1)
            assert (mask_OI[bare_O].sum(dim=1) == 1).all(), "one that would be empty keeps no more than one"


def test_a_row_that_would_be_empty_keeps_its_highest():
    score_OI = torch.tensor([[0.1, 0.2, 0.1, 0.2], [5.0, 6.0, 7.0, 8.0], [1.0, 1.0, 9.0, 9.0]])
    by_layer = lowest_mask(score_OI, Amount(7, "layer"), "w")
    assert by_layer.int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    by_block = lowest_mask(score_OI, Amount(6, "block"), "w", 2)
    assert by_block.int().tolist() == [[0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 1]]


def test_what_cannot_be_is_refused():
    for call in (
        lambda: Amount(-1, "row"),
        lambda: Amount(0, "row", 4, 4),
        lambda: row_counts(Amount(5, "row"), (2, 2)),
        lambda: block_counts(Amount(5, "block"), 2, 2, 128),
    ):
        with pytest.raises(ValueError, match=r"lose this much|cannot leave"):
            call()
    with pytest.raises(RecipeError, match=r"2:4 needs widths that 4 divides, but 'model\.q' has 6 inputs"):
        lowest_mask(torch.zeros(2, 6), Amount(0, "row", 2, 4), "model.q")
