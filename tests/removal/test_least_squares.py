"""Least squares on what is kept: against the plain solution, and towards it step by step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from least_squares_problems import cost, problem, refit_on_support, with_dead

from secateur.removal.curvature import ridge
from secateur.removal.least_squares import conjugate_gradient_on_support, refit_columns


def random_mask(shape, seed, kept=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < kept


def test_support_refit_is_plain_regression_of_the_outputs():
    """On real inputs without dampening: the same as regressing each output on the inputs that are kept."""
    generator = torch.Generator().manual_seed(1)
    x_TI, weight_OI = torch.randn(50, 8, generator=generator).double(), torch.randn(3, 8, generator=generator)
    mask_OI = random_mask((3, 8), 2)
    found_OI = refit_on_support(weight_OI, x_TI.T @ x_TI, mask_OI, dampening=0.0)
    for row in range(3):
        kept = mask_OI[row]
        outputs_T = x_TI @ weight_OI[row].double()
        plain_K = torch.linalg.lstsq(x_TI[:, kept], outputs_T[:, None]).solution[:, 0]
        torch.testing.assert_close(found_OI[row, kept].double(), plain_K, rtol=1e-5, atol=1e-6)
        assert (found_OI[row, ~kept] == 0).all()


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 99), st.booleans(), st.data())
def test_columns_and_support_agree_where_the_support_is_columns(outputs, inputs, seed, dead, data):
    weight_OI, hessian_II = problem(outputs, inputs, seed)
    if dead:
        hessian_II = with_dead(hessian_II, [inputs - 1])
    kept = data.draw(st.lists(st.integers(0, inputs - 1), min_size=1, unique=True))
    kept_K = torch.tensor(sorted(kept))
    mask_OI = torch.zeros(outputs, inputs, dtype=torch.bool)
    mask_OI[:, kept_K] = True
    # Without dampening: each function's ridge is a part of a mean over other inputs. What the inputs hardly determine may
    # differ then, but what both lose of the outputs may not.
    found_OI = torch.zeros_like(weight_OI)
    found_OI[:, kept_K] = refit_columns(weight_OI, hessian_II, kept_K, 0.0).weight_OK
    exact_OI = refit_on_support(weight_OI, hessian_II, mask_OI, 0.0)
    everything = cost(torch.zeros_like(weight_OI), weight_OI, hessian_II, 0.0)
    apart = cost(found_OI, exact_OI, hessian_II, 0.0)
    assert apart <= 1e-6 * everything


def test_everything_kept_changes_nothing_and_nothing_kept_is_nothing():
    weight_OI, hessian_II = problem(4, 30, tokens=7)  # rank-deficient
    torch.testing.assert_close(
        refit_columns(weight_OI, hessian_II, torch.arange(30)).weight_OK, weight_OI, rtol=1e-3, atol=1e-3
    )
    everything_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    torch.testing.assert_close(refit_on_support(weight_OI, hessian_II, everything_OI), weight_OI)
    assert refit_columns(weight_OI, hessian_II, torch.arange(0)).weight_OK.shape == (4, 0)
    assert (refit_on_support(weight_OI, hessian_II, ~everything_OI) == 0).all()


def test_a_dead_input_that_stays_keeps_its_weights():
    weight_OI, hessian_II = problem(3, 10)
    found_OK = refit_columns(weight_OI, with_dead(hessian_II, [2]), torch.tensor([0, 2, 5])).weight_OK
    torch.testing.assert_close(found_OK[:, 1], weight_OI[:, 2])


def test_column_refit_is_a_minimum_and_beats_plain_cutting():
    weight_OI, hessian_II = problem(5, 24)
    kept_K = torch.arange(0, 24, 2)
    refit_OI, cut_OI = torch.zeros_like(weight_OI), torch.zeros_like(weight_OI)
    refit_OI[:, kept_K] = refit_columns(weight_OI, hessian_II, kept_K, 1e-6).weight_OK
    cut_OI[:, kept_K] = weight_OI[:, kept_K]
    best = cost(refit_OI, weight_OI, hessian_II, 1e-6)
    assert best < 0.95 * cost(cut_OI, weight_OI, hessian_II, 1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        nudged_OI = refit_OI.clone()
        nudged_OI[:, kept_K] += 0.01 * torch.randn(5, len(kept_K), generator=generator)
        assert cost(nudged_OI, weight_OI, hessian_II, 1e-6) > best


@settings(max_examples=30)
@given(st.integers(2, 20), st.integers(1, 40), st.integers(0, 99))
def test_more_dampening_holds_columns_nearer_to_what_they_were(inputs, tokens, seed):
    weight_OI, hessian_II = problem(4, inputs, seed, tokens)
    kept_K = torch.arange(1, inputs)
    moved = [
        float((refit_columns(weight_OI, hessian_II, kept_K, dampening).weight_OK - weight_OI[:, 1:]).norm())
        for dampening in (0.01, 0.1, 0.3, 1.0)
    ]
    assert all(later <= earlier * (1 + 1e-3) + 1e-6 for earlier, later in pairwise(moved))
    assert moved[-1] < moved[0] or moved[0] < 1e-6


def dampened(weight_OI, hessian_II, dampening=0.01):
    ridge_I = ridge(hessian_II, dampening)
    curvature_II = hessian_II + ridge_I.diag()
    return curvature_II, weight_OI @ curvature_II


@pytest.mark.parametrize("tokens", [2, 400])
def test_every_step_of_conjugate_gradients_descends_and_many_arrive(tokens):
    weight_OI, hessian_II = problem(6, 40, tokens=tokens)
    mask_OI = random_mask((6, 40), 3)
    curvature_II, rhs_OI = dampened(weight_OI, hessian_II)
    costs = []
    for steps in (*range(12), 100):
        found_OI = conjugate_gradient_on_support(weight_OI, rhs_OI, curvature_II, mask_OI, steps)
        assert (found_OI[~mask_OI] == 0).all()
        costs.append(cost(found_OI, weight_OI, hessian_II))
    assert costs[0] == cost(weight_OI * mask_OI, weight_OI, hessian_II)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(costs))
    assert costs[10] < 0.95 * costs[0]
    best = cost(refit_on_support(weight_OI, hessian_II, mask_OI), weight_OI, hessian_II)
    assert best <= costs[-1] * (1 + 1e-5)
    assert costs[-1] <= best * 1.001


def test_conjugate_gradients_stand_degenerate_rows():
    weight_OI, hessian_II = problem(4, 6)
    weight_OI[0] = 0
    weight_OI[1] = 2.5
    mask_OI = random_mask((4, 6), 1)
    mask_OI[2], mask_OI[3] = False, True
    curvature_II, rhs_OI = dampened(weight_OI, with_dead(hessian_II, [0, 4]))
    found_OI = conjugate_gradient_on_support(weight_OI, rhs_OI, curvature_II, mask_OI, 50)
    assert bool(found_OI.isfinite().all())
    assert (found_OI[[0, 2]] == 0).all()
    torch.testing.assert_close(found_OI[3], weight_OI[3], rtol=1e-4, atol=1e-5)
    undampened_II = with_dead(hessian_II, [0, 4])
    found_OI = conjugate_gradient_on_support(weight_OI, weight_OI @ undampened_II, undampened_II, mask_OI, 50)
    assert bool(found_OI.isfinite().all())
