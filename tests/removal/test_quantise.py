"""Rounding by rows: the grid, zero on it, and rounding while pruning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from least_squares_problems import cost, problem

from secateur.errors import RecipeError
from secateur.removal.amount import Amount
from secateur.removal.quantise import Quantiser
from secateur.removal.sparsegpt import sparsegpt


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(2, 8), st.floats(-3, 3), st.integers(0, 99))
def test_every_weight_goes_to_the_nearest_of_its_row_s_levels(outputs, inputs, bits, shift, seed):
    weight_OI = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) + shift
    rounded_OI = Quantiser.of(weight_OI, bits).round(weight_OI.T).T
    for row, rounded in zip(weight_OI, rounded_OI, strict=True):
        least, greatest = min(0.0, float(row.min())), max(0.0, float(row.max()))
        step = (greatest - least) / (2**bits - 1)
        assert rounded.unique().numel() <= 2**bits
        assert float((rounded - row).abs().max()) <= step * 1.01  # one step: the grid is moved so that zero is on it
        assert float(((rounded / step) - (rounded / step).round()).abs().max()) < 1e-2  # zero is on it
        inside = (row > least + step) & (row < greatest - step)
        assert not inside.any() or float((rounded - row)[inside].abs().max()) <= step * 0.501


def test_zero_rows_and_constant_rows_have_a_grid():
    weight_OI = torch.tensor([[0.0, 0.0], [2.0, 2.0], [-3.0, -3.0]])
    torch.testing.assert_close(Quantiser.of(weight_OI, 4).round(weight_OI.T).T, weight_OI)


def test_bits_out_of_range_are_refused():
    for bits in (1, 17):
        with pytest.raises(RecipeError, match=f"not {bits}; choose another"):
            Quantiser.of(torch.ones(1, 1), bits)


@pytest.mark.parametrize("amount", [Amount(0, "row"), Amount(8 * 64 // 2, "block"), Amount(0, "row", 2, 4)])
def test_rounding_inside_the_update_beats_rounding_after_it(amount):
    weight_OI, hessian_II = problem(8, 64)
    grid = Quantiser.of(weight_OI, 3)
    joint = sparsegpt(weight_OI, hessian_II, amount, quantiser=grid)
    torch.testing.assert_close(grid.round(joint.weight_OI.T).T, joint.weight_OI)  # it lies on the grid
    assert (joint.weight_OI[~joint.mask_OI] == 0).all()
    after = sparsegpt(weight_OI, hessian_II, amount)
    after_OI = grid.round(after.weight_OI.T).T
    error = cost(joint.weight_OI, weight_OI, hessian_II)
    assert error < 0.9 * cost(after_OI, weight_OI, hessian_II)
    assert joint.loss == pytest.approx(error, rel=1e-3)


def test_many_levels_are_no_rounding_at_all():
    weight_OI, hessian_II = problem(4, 32)
    fine = sparsegpt(weight_OI, hessian_II, Amount(64, "block"), quantiser=Quantiser.of(2 * weight_OI, 16))
    plain = sparsegpt(weight_OI, hessian_II, Amount(64, "block"))
    assert torch.equal(fine.mask_OI, plain.mask_OI)
    torch.testing.assert_close(fine.weight_OI, plain.weight_OI, rtol=0, atol=2e-3)
