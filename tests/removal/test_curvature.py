"""The curvature's factor: what the published steps give, and what happens where they fail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from least_squares_problems import problem, with_dead

from secateur.errors import ModelError
from secateur.removal.curvature import decompose, factor, ridge


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 99), st.booleans())
def test_factor_is_that_of_the_inverse(inputs, seed, dead):
    _, hessian_II = problem(1, inputs, seed)
    if dead:
        hessian_II = with_dead(hessian_II, [0, inputs // 2])
    made = factor(hessian_II, 0.01)
    inverse_II = (hessian_II.double() + ridge(hessian_II, 0.01).double().diag()).inverse()
    published_II = torch.linalg.cholesky(inverse_II, upper=True)  # methods §3.2, step 3
    torch.testing.assert_close(made.upper_II.double(), published_II, rtol=1e-3, atol=1e-4 * float(published_II.max()))
    assert torch.equal(made.upper_II, made.upper_II.triu())
    assert made.dampening == 0.01
    assert torch.equal(made.dead_I, hessian_II.diagonal() == 0)


def test_the_curvature_given_stays_as_it_is():
    _, hessian_II = problem(1, 9)
    before = hessian_II.clone()
    factor(hessian_II)
    assert torch.equal(hessian_II, before)


def test_a_dead_input_does_not_drown_small_activations():
    hessian_II = with_dead(torch.eye(4) * 1e-8, [1])
    ridge_I = ridge(hessian_II, 0.01)
    torch.testing.assert_close(ridge_I[[0, 2, 3]], torch.full((3,), 1e-10))
    assert float(ridge_I[1]) >= 1


def test_one_short_window_is_decomposed_at_the_dampening_asked_for():
    _, hessian_II = problem(1, 200, tokens=3)
    made = factor(hessian_II, 0.01)
    assert made.dampening == 0.01
    curvature_II = hessian_II.double() + ridge(hessian_II, 0.01).double().diag()
    found_II = made.upper_II.double().T @ made.upper_II.double() @ curvature_II
    torch.testing.assert_close(found_II, torch.eye(200).double(), rtol=0, atol=1e-2)


def test_dampening_is_raised_where_none_was_asked_for_and_none_would_do():
    _, hessian_II = problem(1, 60, tokens=5)
    cholesky = decompose(hessian_II, 0.0, "w")
    assert 0 < cholesky.dampening <= 1
    product_II = cholesky.lower_II @ cholesky.lower_II.T
    expected_II = hessian_II.to(product_II.dtype) + cholesky.ridge_I.diag().to(product_II.dtype)
    torch.testing.assert_close(product_II, expected_II, rtol=1e-4, atol=1e-4)


def test_an_indefinite_curvature_ends_by_factors_of_ten():
    hessian_II = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # its lower eigenvalue is -0.05
    assert decompose(hessian_II, 0.01, "w").dampening == pytest.approx(0.1)
    with pytest.raises(ModelError, match=r"'model\.q' give no positive definite curvature, even dampened by 1"):
        decompose(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01, "model.q")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_by_name(value):
    hessian_II = torch.eye(3)
    hessian_II[1, 1] = value
    with pytest.raises(ModelError, match=r"inputs of 'model\.q' are not all finite"):
        factor(hessian_II, 0.01, "model.q")


def test_no_live_input_at_all():
    made = factor(torch.zeros(3, 3))
    assert torch.equal(made.upper_II, torch.eye(3))
    assert bool(made.dead_I.all())
