"""Rows up to one share of their scores: beside Wanda's search for that share (methods §2.2)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.removal.amount import Amount
from secateur.removal.selection import gone_with_OI, lowest_mask


def searched(score_OI: torch.Tensor, ratio: float) -> torch.Tensor:
    """The published search by halving, row by row, without its wrong end: where nothing fits, nothing leaves."""
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        keep = torch.ones_like(score_OI, dtype=torch.bool)
        for row, score_I in enumerate(score_OI):
            order = torch.sort(score_I, stable=True).indices
            gone = score_I[order].double().cumsum(0)
            keep[row, order[gone <= alpha * gone[-1]]] = False
        sparsity = 1 - keep.float().mean().item()
        low, high = (alpha, high) if sparsity < ratio else (low, alpha)
    return keep


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_it_is_where_the_search_ends(ratio):
    score_OI = torch.rand(12, 40, generator=torch.Generator().manual_seed(4)) ** 3
    leaving = int(score_OI.numel() * ratio)
    found, expected = lowest_mask(score_OI, Amount(leaving, "share"), "w"), searched(score_OI, ratio)
    assert int((~found).sum()) == leaving
    assert int((found != expected).sum()) <= 1, "the search stops within one weight of the ratio"
    assert len({int(row.sum()) for row in found}) > 1, "rows keep different numbers"


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(2, 30), st.floats(0, 0.95), st.integers(0, 10_000))
def test_counts_are_exact_and_no_row_is_emptied(rows, inputs, ratio, seed):
    score_OI = torch.rand(rows, inputs, generator=torch.Generator().manual_seed(seed))
    score_OI[:, ::3] = 0
    leaving = min(int(rows * inputs * ratio), rows * (inputs - 1))
    mask_OI = lowest_mask(score_OI, Amount(leaving, "share"), "w")
    assert int((~mask_OI).sum()) == leaving
    assert mask_OI.any(dim=1).all()


def test_rows_without_scores_and_equal_scores_are_defined():
    share = gone_with_OI(torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 2.0]]))
    assert share.tolist() == [[0.0, 0.0, 1.0], [0.25, 0.5, 1.0]]
