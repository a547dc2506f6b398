"""The tail of a spectrum: published formulas written plainly, exponents that are known, and what has no tail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.spectrum import eigenvalues_K, tail_exponent

ESTIMATORS = ("peak", "peak-fixed", "mid")


def plain(value_K, estimator):
    """Methods §8.1 with loops, and the beginnings that were tried."""
    values = [float(v) for v in value_K]
    count = len(values)
    logs = [math.log(v) for v in values]

    def hill(i):
        n = count - i
        return 1 + n / (sum(logs[i:]) - n * logs[i])

    def distance(i, alpha):
        n = count - i
        return max(abs(1 - (v / values[i]) ** (1 - alpha) - j / n) for j, v in enumerate(values[i:]))

    if estimator == "mid":
        return hill(count // 2), 1
    heights, edges = np.histogram(np.log10(values), bins=100)
    peak = 10 ** edges[heights.argmax()]
    lower = 0.95 * peak if estimator == "peak-fixed" else math.log10(0.95 * peak)
    tried = [i for i in range(count - 1) if lower <= values[i] <= 1.5 * peak]
    return min((distance(i, hill(i)), i, hill(i)) for i in tried if hill(i) > 1)[2], len(tried)


def heavy(seed, size=256, scale=1.0):
    """A random matrix with some directions that stand out, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, size, generator=generator) / math.sqrt(size)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    strength = torch.linspace(1, 0, size) ** 8 * 6
    return scale * (noise + (vectors * strength) @ vectors.T)


@pytest.mark.parametrize("shape", [(40, 40), (30, 70), (70, 30), (1, 9), (9, 1)])
def test_eigenvalues_are_squared_singular_values(shape):
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(weight_OI.double()).square().flip(0)
    assert torch.allclose(eigenvalues_K(weight_OI), expected, rtol=1e-9)


def test_zeros_are_left_out_and_small_ones_are_not():
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(50, 12, generator=generator), torch.randn(12, 40, generator=generator)
    assert len(eigenvalues_K(left.double() @ right.double())) == 12
    assert len(eigenvalues_K(torch.zeros(5, 7))) == 0
    small = torch.diag(torch.tensor([1.0, 1e-5]))
    assert eigenvalues_K(small).tolist() == pytest.approx([1e-10, 1.0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_published_formulas(estimator, scale, seed):
    value_K = eigenvalues_K(heavy(seed, 128, scale))
    assert tail_exponent(value_K, estimator) == pytest.approx(plain(value_K, estimator)[0], rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_published_bound_tries_far_more_and_finds_a_heavier_tail(seed):
    """As methods §8.1 says of synthetic spectra: the code's bound gives the lower exponent."""
    value_K = eigenvalues_K(heavy(seed, 512))
    published, tried = plain(value_K, "peak")
    meant, tried_as_meant = plain(value_K, "peak-fixed")
    assert tried > 2 * tried_as_meant
    assert published < meant
    assert tail_exponent(value_K, "peak") == pytest.approx(published)
    assert tail_exponent(value_K, "peak-fixed") == pytest.approx(meant)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 4.5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_known_exponents_are_recovered(alpha, estimator):
    """Methods §13.7: Pareto eigenvalues of density x^-alpha, at their quantiles; within 5 %."""
    count = 20_000
    quantile_K = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    value_K = (1 - quantile_K) ** (-1 / (alpha - 1))
    assert tail_exponent(value_K, estimator) == pytest.approx(alpha, rel=0.05)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_lighter_tails_have_larger_exponents(estimator):
    base_K = torch.rand(2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64).sort().values
    found = [tail_exponent((1 - base_K) ** (-1 / (alpha - 1)), estimator) for alpha in (1.5, 2, 2.5, 3, 4, 6)]
    assert found == sorted(found)
    assert len(set(found)) == len(found)


@settings(max_examples=30)
@given(st.floats(1e-4, 1e4), st.integers(0, 3))
def test_scale_matters_to_the_published_bound_alone(scale, seed):
    value_K = eigenvalues_K(heavy(seed, 64))
    for estimator in ("peak-fixed", "mid"):
        assert tail_exponent(value_K * scale, estimator) == pytest.approx(tail_exponent(value_K, estimator), rel=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "weight_OI",
    [torch.zeros(4, 4), torch.ones(1, 1), torch.ones(6, 5), torch.eye(8), 3 * torch.eye(8)[:, :4]],
    ids=["zero", "one-by-one", "rank-one", "orthogonal", "equal"],
)
def test_what_has_no_tail_has_no_exponent(weight_OI, estimator):
    assert tail_exponent(eigenvalues_K(weight_OI), estimator) is None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_values_are_enough(estimator):
    found = tail_exponent(torch.tensor([1.0, 4.0]), estimator)
    assert found is None or (math.isfinite(found) and found > 1)
