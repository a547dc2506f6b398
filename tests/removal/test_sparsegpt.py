"""SparseGPT: against the algorithm written plainly, the exact least squares, and at every edge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from least_squares_problems import close, cost, problem, refit_on_support, with_dead

from secateur.errors import RecipeError
from secateur.removal import sparsegpt as module
from secateur.removal.amount import Amount
from secateur.removal.curvature import factor, ridge
from secateur.removal.selection import lowest_mask
from secateur.removal.sparsegpt import sparsegpt

ANY = Amount(0, "row")  # beside a given mask


def random_mask(shape, seed, kept=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < kept


def plain_update(weight_OI, hessian_II, choose, dampening=0.01):
    """Column after column in float64, the inverse of what is left computed anew each time (the paper's equations 3 and 4).

    ``choose(column, weight_OI, score_OI)`` gives that column's mask from the weights and scores of that moment.
    """
    weight_OI = weight_OI.double().clone()
    weight_OI[:, hessian_II.diagonal() == 0] = 0
    curvature_II = hessian_II.double() + ridge(hessian_II, dampening).double().diag()
    inputs = len(hessian_II)
    inverses = [curvature_II[column:, column:].inverse() for column in range(inputs)]
    diagonal_I = torch.stack([inverse[0, 0] for inverse in inverses])
    mask_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    for column in range(inputs):
        mask_OI[:, column] = choose(column, weight_OI, weight_OI.square() / diagonal_I)
        error_O = weight_OI[:, column] * ~mask_OI[:, column] / diagonal_I[column]
        weight_OI[:, column:] -= error_O[:, None] * inverses[column][0]
        weight_OI[~mask_OI[:, column], column] = 0
    return weight_OI, mask_OI


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(1, 45), st.integers(0, 99), st.sampled_from([3, 16, 128]), st.booleans())
def test_update_on_a_given_mask_is_the_plain_one(outputs, inputs, seed, block_size, dead):
    weight_OI, hessian_II = problem(outputs, inputs, seed)
    if dead:
        hessian_II = with_dead(hessian_II, [inputs // 2])
    mask_OI = random_mask((outputs, inputs), seed)
    if bool(mask_OI.all()):
        mask_OI[0, 0] = False
    plain_OI, _ = plain_update(weight_OI, hessian_II, lambda column, *_: mask_OI[:, column])
    done = sparsegpt(weight_OI, hessian_II, ANY, mask_OI=mask_OI, block_size=block_size)
    torch.testing.assert_close(done.weight_OI, plain_OI.float(), rtol=1e-3, atol=1e-3)
    assert torch.equal(done.mask_OI, mask_OI)
    assert (done.weight_OI[~mask_OI] == 0).all()
    zeroed_OI = weight_OI * (hessian_II.diagonal() != 0)
    assert close(done.loss, cost(done.weight_OI, zeroed_OI, hessian_II), 1e-3)


def test_mask_within_blocks_is_the_plain_one():
    weight_OI, hessian_II = problem(12, 40)
    amount, chosen = Amount(12 * 40 * 6 // 10, "block"), {}

    def choose(column, _, score_OI):
        if column % 16 == 0:
            width = min(16, 40 - column)
            leaving = amount.leaving * (column + width) // 40 - amount.leaving * column // 40
            part = score_OI[:, column : column + width].reshape(-1)
            keep = torch.ones(len(part), dtype=torch.bool)
            keep[torch.sort(part, stable=True).indices[:leaving]] = False
            chosen["block"] = keep.reshape(12, width)
        return chosen["block"][:, column % 16]

    plain_OI, plain_mask_OI = plain_update(weight_OI, hessian_II, choose)
    done = sparsegpt(weight_OI, hessian_II, amount, block_size=16)
    assert torch.equal(done.mask_OI, plain_mask_OI)
    torch.testing.assert_close(done.weight_OI, plain_OI.float(), rtol=1e-3, atol=1e-3)
    at_once_OI = lowest_mask(weight_OI.square() / factor(hessian_II).upper_II.diagonal().square(), amount, "w", 16)
    assert not torch.equal(done.mask_OI, at_once_OI)  # it does follow the updated weights


@pytest.mark.parametrize(("keep", "group", "block_size"), [(2, 4, 128), (1, 4, 6), (3, 8, 8), (4, 40, 16)])
def test_n_of_m_is_chosen_group_by_group_on_updated_weights(keep, group, block_size):
    weight_OI, hessian_II = problem(9, 40, 5)
    chosen = {}

    def choose(column, _, score_OI):
        if column % group == 0:
            part = score_OI[:, column : column + group]
            chosen["group"] = part >= part.sort(dim=1, descending=True).values[:, keep - 1 : keep]
        return chosen["group"][:, column % group]

    plain_OI, plain_mask_OI = plain_update(weight_OI, hessian_II, choose)
    done = sparsegpt(weight_OI, hessian_II, Amount(0, "row", keep, group), block_size=block_size)
    assert torch.equal(done.mask_OI, plain_mask_OI)
    assert (done.mask_OI.reshape(9, -1, group).sum(2) == keep).all()
    torch.testing.assert_close(done.weight_OI, plain_OI.float(), rtol=1e-3, atol=1e-3)


def test_a_width_that_m_does_not_divide_is_refused_by_name():
    weight_OI, hessian_II = problem(2, 6)
    with pytest.raises(RecipeError, match=r"2:4 needs widths that 4 divides, but 'model\.q' has 6 inputs"):
        sparsegpt(weight_OI, hessian_II, Amount(0, "row", 2, 4), name="model.q")


@settings(max_examples=60)
@given(
    st.sampled_from(["row", "share", "block", "layer"]),
    st.integers(1, 6),
    st.integers(1, 30),
    st.integers(0, 99),
    st.data(),
)
def test_counts_are_exact_at_every_edge(within, outputs, inputs, seed, data):
    kind = data.draw(st.sampled_from(["random", "dead", "one window", "zero row", "constant", "all equal"]))
    weight_OI, hessian_II = problem(outputs, inputs, seed, tokens=2 if kind == "one window" else None)
    if kind == "dead":
        hessian_II = with_dead(hessian_II, [0, inputs - 1])
    if kind == "zero row":
        weight_OI[0] = 0
    if kind == "constant":
        weight_OI[-1] = 0.5
    if kind == "all equal":
        weight_OI, hessian_II = torch.ones_like(weight_OI), torch.eye(inputs)
    amount = Amount(data.draw(st.integers(0, outputs * inputs)), within)
    block_size = data.draw(st.sampled_from([4, 7, 128]))
    before_OI, before_II = weight_OI.clone(), hessian_II.clone()
    done = sparsegpt(weight_OI, hessian_II, amount, block_size=block_size)
    assert torch.equal(weight_OI, before_OI)
    assert torch.equal(hessian_II, before_II)
    assert bool(done.weight_OI.isfinite().all())
    assert int((~done.mask_OI).sum()) == amount.leaving
    assert (done.weight_OI[~done.mask_OI] == 0).all()
    if amount.leaving <= outputs * (inputs - 1):
        assert done.mask_OI.any(dim=1).all()
    if within == "row":
        counts_O = (~done.mask_OI).sum(1)
        assert int(counts_O.max() - counts_O.min()) <= 1


@pytest.mark.parametrize("within", ["row", "share", "block", "layer"])
@pytest.mark.parametrize(("ratio", "block_size"), [(0.95, 16), (0.99, 128), (0.99, 7)])
def test_no_row_is_emptied(within, ratio, block_size):
    """Three rows are so small that every comparison with the others takes them as a whole."""
    weight_OI, hessian_II = problem(8, 130, 2)
    weight_OI[[0, 3, 7]] *= 1e-4
    amount = Amount(min(int(8 * 130 * ratio), 8 * 129), within)
    done = sparsegpt(weight_OI, hessian_II, amount, block_size=block_size)
    assert int((~done.mask_OI).sum()) == amount.leaving
    assert done.mask_OI.any(dim=1).all()


def test_within_a_share_rows_are_compared_by_the_part_of_their_scores_that_is_gone():
    weight_OI, hessian_II = problem(6, 40, 1)
    weight_OI[2] *= 30
    amount = Amount(120, "share")
    done = sparsegpt(weight_OI, hessian_II, amount)
    score_OI = (weight_OI / factor(hessian_II).upper_II.diagonal()).square()
    assert torch.equal(done.mask_OI, lowest_mask(score_OI, amount, "w"))
    assert not torch.equal(done.mask_OI, lowest_mask(score_OI, Amount(120, "layer"), "w"))


@pytest.mark.parametrize("dead", [[], [3]])
def test_where_nothing_leaves_the_weights_come_back_as_they_are(dead):
    weight_OI, hessian_II = problem(4, 10)
    for amount, mask_OI in ((Amount(0, "block"), None), (Amount(7, "row"), torch.ones(4, 10, dtype=torch.bool))):
        done = sparsegpt(weight_OI, with_dead(hessian_II, dead), amount, mask_OI=mask_OI)
        assert torch.equal(done.weight_OI, weight_OI)
        assert bool(done.mask_OI.all())
        assert done.loss == 0


def test_unrelated_inputs_give_magnitude_by_block_and_no_update():
    weight_OI, _ = problem(6, 50)
    amount = Amount(150, "block")
    done = sparsegpt(weight_OI, 3 * torch.eye(50), amount, block_size=20)
    assert torch.equal(done.mask_OI, lowest_mask(weight_OI.abs(), amount, "w", 20))
    assert torch.equal(done.weight_OI, weight_OI.masked_fill(~done.mask_OI, 0))


@pytest.mark.parametrize("within", ["row", "block", "layer"])
def test_the_columns_of_dead_inputs_leave_first_and_are_zero(within):
    weight_OI, hessian_II = problem(6, 20)
    hessian_II = with_dead(hessian_II, [1, 7])
    done = sparsegpt(weight_OI, hessian_II, Amount(6 * 2, within), block_size=128)
    assert not done.mask_OI[:, [1, 7]].any()
    assert torch.equal(done.weight_OI[:, 2:7], weight_OI[:, 2:7])  # nothing else left, so nothing had to be made good
    few = sparsegpt(weight_OI, hessian_II, Amount(6, within))
    assert int((~few.mask_OI).sum()) == 6
    assert not few.mask_OI.all(0)[[1, 7]].all()
    assert (few.weight_OI[:, [1, 7]] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_error_lies_between_the_optimum_and_the_mask_alone(seed):
    weight_OI, hessian_II = problem(8, 64, seed)
    for amount in (Amount(256, "block"), Amount(256, "row"), Amount(256, "layer"), Amount(0, "row", 2, 4)):
        done = sparsegpt(weight_OI, hessian_II, amount, block_size=32)
        got = cost(done.weight_OI, weight_OI, hessian_II)
        best = cost(refit_on_support(weight_OI, hessian_II, done.mask_OI), weight_OI, hessian_II)
        masked = cost(weight_OI * done.mask_OI, weight_OI, hessian_II)
        assert best <= got * (1 + 1e-5)
        assert got < 0.95 * masked
        assert close(got, done.loss, 1e-3)
    by_layer = sparsegpt(weight_OI, hessian_II, Amount(256, "layer"))
    score_OI = weight_OI.square() / factor(hessian_II).upper_II.diagonal().square()
    assert torch.equal(by_layer.mask_OI, lowest_mask(score_OI, Amount(256, "layer"), "w"))


@pytest.mark.parametrize("sub_block", [1, 5, 128])
def test_blocks_and_sub_blocks_change_nothing_but_rounding(sub_block, monkeypatch):
    weight_OI, hessian_II = problem(10, 150)
    mask_OI = random_mask((10, 150), 4)
    whole = sparsegpt(weight_OI, hessian_II, ANY, mask_OI=mask_OI)
    monkeypatch.setattr(module, "SUB_BLOCK", sub_block)
    for block_size in (1, 37, 128, 200):
        other = sparsegpt(weight_OI, hessian_II, ANY, mask_OI=mask_OI, block_size=block_size)
        torch.testing.assert_close(other.weight_OI, whole.weight_OI, rtol=1e-4, atol=1e-4)
        assert close(other.loss, whole.loss)
    adaptive = sparsegpt(weight_OI, hessian_II, Amount(750, "block"))
    monkeypatch.undo()
    assert torch.equal(adaptive.mask_OI, sparsegpt(weight_OI, hessian_II, Amount(750, "block")).mask_OI)


def test_a_factor_serves_matrices_with_the_same_inputs():
    weight_OI, hessian_II = problem(4, 20)
    by_factor = sparsegpt(weight_OI, factor(hessian_II), Amount(40, "block"))
    by_hessian = sparsegpt(weight_OI, hessian_II, Amount(40, "block"))
    assert torch.equal(by_factor.weight_OI, by_hessian.weight_OI)


def test_a_scale_of_the_curvature_changes_nothing():
    weight_OI, hessian_II = problem(4, 20)
    one, other = (sparsegpt(weight_OI, scale * hessian_II, Amount(40, "block")) for scale in (1, 1024))
    assert torch.equal(one.mask_OI, other.mask_OI)
    torch.testing.assert_close(one.weight_OI, other.weight_OI)
    assert close(other.loss, 1024 * one.loss)
