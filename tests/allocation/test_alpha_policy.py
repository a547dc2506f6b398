"""AlphaPruning's ratios: the published mapping, its mean met exactly, and what has no figure."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.alpha import Alpha, AlphaOptions
from secateur.allocation.policies import POLICIES
from secateur.allocation.policy import Policy
from secateur.allocation.spectrum import eigenvalues_K, tail_exponent

SIZES = {"q": 100, "up": 300}


def mean(shares, sizes):
    pairs = [(share[name], own[name]) for share, own in zip(shares, sizes, strict=True) for name in own]
    return math.fsum(s * n for s, n in pairs) / math.fsum(n for _, n in pairs)


def policy(**options) -> Policy:
    return Alpha(AlphaOptions(**options))


def test_every_policy_is_listed_by_its_name():
    assert set(POLICIES) == {"alpha", "owl", "sensitivity"}
    for name, kind in POLICIES.items():
        assert kind().name == name
        assert set(kind.measured_by) <= set(kind.options_type.model_fields)
    assert str(Alpha()) == "alpha:by=block,metric=peak,spread=0.3"


def test_the_published_mapping():
    """Methods §8.2 with block means 2, 3, 4: p = .7, 1, 1.3."""
    figures = [{"q": 1.0, "up": 3.0}, {"q": 3.0, "up": 3.0}, {"q": 5.0, "up": 3.0}]
    shares = policy().shares(figures, [SIZES] * 3, 0.5)
    assert [share["q"] for share in shares] == pytest.approx([0.35, 0.5, 0.65], rel=1e-14)
    assert all(share["q"] == share["up"] for share in shares)


def test_matrices_alone():
    figures = [{"q": 1.0, "up": 3.0}, {"q": 2.0, "up": 2.0}]
    shares = policy(by="matrix").shares(figures, [SIZES] * 2, 0.5)
    assert mean(shares, [SIZES] * 2) == pytest.approx(0.5, abs=1e-12)
    scale = shares[1]["q"]
    assert [shares[0]["q"], shares[0]["up"], shares[1]["up"]] == pytest.approx([0.7 * scale, 1.3 * scale, scale])


@settings(max_examples=200)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"q": st.floats(1, 50), "up": st.floats(1, 50)}), min_size=1, max_size=8
    ),
    st.floats(0, 0.999),
    st.floats(0, 1),
    st.sampled_from(["block", "matrix"]),
    st.sampled_from(sorted(POLICIES)),
)
def test_the_mean_is_met_and_nothing_is_emptied(figures, ratio, spread, by, name):
    kind = POLICIES[name]
    options = {"spread": spread} | ({"by": by} if "by" in kind.options_type.model_fields else {})
    if name == "sensitivity":
        figures = [
            {"dense_loss": 2.0, "masked_loss": own.get("q", 1.0), "divergence": own.get("up", 0.0)} for own in figures
        ]
    sizes = [{"q": 100 + 7 * place, "up": 300} for place in range(len(figures))]
    shares = kind(kind.options_type(**options)).shares(figures, sizes, ratio)
    assert [list(share) for share in shares] == [list(own) for own in sizes]
    assert mean(shares, sizes) == pytest.approx(ratio, abs=1e-12)
    assert all(0 <= value < 1 for share in shares for value in share.values())


@settings(max_examples=100)
@given(st.lists(st.floats(1, 20), min_size=2, max_size=8), st.floats(0.01, 0.95))
def test_a_lighter_tail_never_gives_less(alphas, ratio):
    shares = policy(spread=0.5).shares([{"q": alpha} for alpha in alphas], [{"q": 10}] * len(alphas), ratio)
    given_by_tail = [share["q"] for _, share in sorted(zip(alphas, shares, strict=True), key=lambda pair: pair[0])]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(given_by_tail))


def test_equal_figures_none_and_no_spread_are_uniform():
    sizes = [SIZES] * 2
    for figures in ([{"q": 3.0}, {"up": 3.0}], [{}, {}], [{"q": 2.0}, {}]):
        assert policy().shares(figures, sizes, 0.4) == [{"q": 0.4, "up": 0.4}] * 2
    flat = policy(spread=0).shares([{"q": 1.0}, {"q": 9.0}], sizes, 0.4)
    assert [share["q"] for share in flat] == pytest.approx([0.4, 0.4])


def test_what_has_no_figure_is_the_mean_of_the_others():
    shares = policy().shares([{"q": 2.0}, {}, {"q": 4.0}], [SIZES] * 3, 0.5)
    assert [share["q"] for share in shares] == pytest.approx([0.35, 0.5, 0.65])


def test_figures_are_exponents_by_name():
    generator = torch.Generator().manual_seed(0)
    matrices = {"q": torch.randn(30, 40, generator=generator), "flat": torch.ones(3, 3)}
    for metric in ("peak", "peak-fixed", "mid"):
        found = policy(metric=metric).figure(matrices, {})
        assert found == {"q": tail_exponent(eigenvalues_K(matrices["q"]), metric)}


def test_figures_do_not_care_for_the_dtype_that_holds_the_numbers():
    weight = torch.randn(30, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert policy().figure({"q": weight}, {}) == policy().figure({"q": weight.float()}, {})
