"""ALPS: exact counts, never worse than SparseGPT where little is kept, near the best on its mask."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from least_squares_problems import close, cost, problem, refit_on_support, with_dead

from secateur.errors import RecipeError
from secateur.removal.alps import AlpsOptions, alps
from secateur.removal.amount import Amount
from secateur.removal.selection import lowest_mask
from secateur.removal.sparsegpt import sparsegpt


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.6, 0.7])
@pytest.mark.parametrize("within", ["row", "layer"])
def test_never_worse_than_sparsegpt_where_little_is_kept(seed, ratio, within):
    weight_OI, hessian_II = problem(24, 96, seed)
    amount = Amount(24 * int(96 * ratio), within)
    found = alps(weight_OI, hessian_II, amount)
    other = sparsegpt(weight_OI, hessian_II, amount)
    assert int((~found.mask_OI).sum()) == amount.leaving
    error = cost(found.weight_OI, weight_OI, hessian_II)
    assert close(found.loss, error, 1e-3)
    assert error < 0.95 * cost(other.weight_OI, weight_OI, hessian_II)


@pytest.mark.parametrize("seed", range(3))
def test_two_of_four_beats_sparsegpt(seed):
    weight_OI, hessian_II = problem(24, 96, seed)
    found, other = (do(weight_OI, hessian_II, Amount(0, "row", 2, 4)) for do in (alps, sparsegpt))
    assert (found.mask_OI.reshape(24, -1, 4).sum(2) == 2).all()
    assert found.loss < other.loss


@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_the_fit_on_its_mask_is_nearly_the_best(ratio):
    weight_OI, hessian_II = problem(12, 60)
    found = alps(weight_OI, hessian_II, Amount(int(720 * ratio), "layer"))
    best = cost(refit_on_support(weight_OI, hessian_II, found.mask_OI), weight_OI, hessian_II)
    assert best * (1 - 1e-4) <= found.loss <= best * 1.02


def test_more_fitting_never_loses():
    weight_OI, hessian_II = problem(12, 60, 3)
    losses = [
        alps(weight_OI, hessian_II, Amount(500, "layer"), options=AlpsOptions(fit_steps=steps)).loss
        for steps in (0, 1, 2, 5, 10, 40)
    ]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


def test_it_comes_near_the_best_mask_of_all():
    """One row of ten inputs, four of them kept: all 210 masks tried."""
    ratios = []
    for seed in range(6):
        weight_OI, hessian_II = problem(1, 10, seed)
        masks = torch.zeros(210, 10, dtype=torch.bool)
        for mask_I, kept in zip(masks, combinations(range(10), 4), strict=True):
            mask_I[list(kept)] = True
        best_RI = refit_on_support(weight_OI.expand(210, 10), hessian_II, masks)
        best = min(cost(row_I[None], weight_OI, hessian_II) for row_I in best_RI)
        found = alps(weight_OI, hessian_II, Amount(6, "row")).loss
        assert found >= best * (1 - 1e-4)
        ratios.append(found / best)
    assert sum(ratios) / len(ratios) < 1.3


@settings(max_examples=40)
@given(st.sampled_from(["row", "block", "layer"]), st.integers(1, 5), st.integers(1, 16), st.integers(0, 99), st.data())
def test_counts_are_exact_at_every_edge(within, outputs, inputs, seed, data):
    kind = data.draw(st.sampled_from(["random", "dead", "one window", "zero row", "all equal", "nothing live"]))
    weight_OI, hessian_II = problem(outputs, inputs, seed, tokens=2 if kind == "one window" else None)
    if kind == "dead":
        hessian_II = with_dead(hessian_II, [0, inputs - 1])
    if kind == "zero row":
        weight_OI[0] = 0
    if kind == "all equal":
        weight_OI, hessian_II = torch.ones_like(weight_OI), torch.eye(inputs)
    if kind == "nothing live":
        hessian_II = torch.zeros(inputs, inputs)
    amount = Amount(data.draw(st.integers(0, outputs * inputs)), within)
    before_OI, before_II = weight_OI.clone(), hessian_II.clone()
    found = alps(weight_OI, hessian_II, amount)
    assert torch.equal(weight_OI, before_OI)
    assert torch.equal(hessian_II, before_II)
    assert bool(found.weight_OI.isfinite().all())
    assert int((~found.mask_OI).sum()) == amount.leaving
    assert (found.weight_OI[~found.mask_OI] == 0).all()


def test_where_nothing_leaves_the_weights_come_back_as_they_are():
    weight_OI, hessian_II = problem(3, 8)
    found = alps(weight_OI, with_dead(hessian_II, [1]), Amount(0, "row"))
    assert torch.equal(found.weight_OI, weight_OI)
    assert bool(found.mask_OI.all())


def test_unrelated_inputs_give_magnitude_and_dead_ones_leave_first():
    weight_OI, _ = problem(4, 20)
    found = alps(weight_OI, torch.eye(20), Amount(40, "row"))
    assert torch.equal(found.mask_OI, lowest_mask(weight_OI.abs(), Amount(40, "row"), "w"))
    torch.testing.assert_close(found.weight_OI, weight_OI * found.mask_OI)
    dead = alps(weight_OI, with_dead(torch.eye(20), [5]), Amount(4, "layer"))
    assert not dead.mask_OI[:, 5].any()


@pytest.mark.parametrize("rho", [1e-6, 1e6])
def test_the_least_and_the_greatest_penalty_give_a_finite_fit(rho):
    weight_OI, hessian_II = problem(12, 60, 2)
    amount = Amount(360, "block")
    found = alps(weight_OI, hessian_II, amount, options=AlpsOptions(rho=rho))
    assert int((~found.mask_OI).sum()) == 360
    assert bool(found.weight_OI.isfinite().all())
    masked = cost(weight_OI * lowest_mask(weight_OI.abs(), amount, "w"), weight_OI, hessian_II)
    assert found.loss < masked


def test_a_width_that_m_does_not_divide_is_refused_by_name():
    weight_OI, hessian_II = problem(2, 6)
    with pytest.raises(RecipeError, match=r"2:4 needs widths that 4 divides, but 'model\.q' has 6 inputs"):
        alps(weight_OI, hessian_II, Amount(0, "row", 2, 4), name="model.q")
