"""Criteria against their formulas, and the published equivalences (methods §13.1-2, §14)."""

from __future__ import annotations

import math

import pytest
import torch
from published_methods import gblm_metric, lowest_of_rows, wanda_metric

from secateur.criteria import CRITERIA, BlockCriterion, criterion_from
from secateur.criteria.base import Matrix
from secateur.errors import RecipeError
from secateur.removal.masks import row_mask
from secateur.statistics import GradientAbs, GradientMean, GradientSquare, InputMoments, InputNorm, InputSecondMoment


def matrix(
    windows: int = 5, seed: int = 0, zero_gradient: bool = False, zero_input: bool = False, order=None
) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(6, 10, generator=generator)
    x_NTI = torch.randn(windows, 7, 10, generator=generator) * (0 if zero_input else 1)
    g_NOI = torch.randn(windows, 6, 10, generator=generator) * (0 if zero_gradient else 1e-3)
    of_inputs = (InputNorm, InputMoments, InputSecondMoment)
    statistics = {kind: kind() for kind in (*of_inputs, GradientMean, GradientAbs, GradientSquare)}
    for n in order or range(windows):
        for kind in of_inputs:
            statistics[kind].update(x_NTI[n])
        for kind in (GradientMean, GradientAbs, GradientSquare):
            statistics[kind].update(g_NOI[n])
    return Matrix("m", weight_OI, statistics)


def score(text: str, m: Matrix) -> torch.Tensor:
    return criterion_from(text).score_OI(m)


def test_gblm_without_gradients_is_wanda_bit_for_bit():
    m = matrix(zero_gradient=True)
    for norm in ("l1", "l2"):
        assert torch.equal(score(f"gblm:norm={norm}", m), score("wanda", m))


def test_gblm_without_inputs_is_gradient_only():
    m = matrix(zero_input=True)
    both, alone = score("gblm:alpha=1", m), score("gblm:gradient_only=true", m)
    assert torch.allclose(both, alone)
    assert torch.equal(row_mask(both, 0.5), row_mask(alone, 0.5))


def test_gblm_l1_and_l2_agree_on_one_window_and_differ_on_several():
    one, several = matrix(windows=1), matrix(windows=5)
    assert torch.allclose(score("gblm:norm=l1", one), score("gblm:norm=l2", one), rtol=1e-5)
    assert not torch.allclose(score("gblm:norm=l1", several), score("gblm:norm=l2", several), rtol=1e-2)


def test_scaled_gradients_with_scaled_alpha_give_the_same_mask():
    m = matrix()
    scaled = {**m.statistics, GradientAbs: GradientAbs.from_state(m.statistics[GradientAbs].state())}
    scaled[GradientAbs].total = scaled[GradientAbs].total * 100
    moved = Matrix("m", m.weight_OI, scaled)
    assert torch.equal(row_mask(score("gblm:alpha=100", m), 0.5), row_mask(score("gblm:alpha=1", moved), 0.5))


@pytest.mark.parametrize("text", ["wanda", "flap", "gblm", "gblm:norm=l2", "taylor:order=mixed", "taylor:order=vector"])
def test_order_of_windows_is_irrelevant(text):
    forwards, backwards = matrix(), matrix(order=[4, 3, 2, 1, 0])
    assert torch.allclose(score(text, forwards), score(text, backwards), rtol=1e-5, atol=1e-9)


def test_signed_accumulation_differs():
    """The failing ablation of the GBLM paper: summing gradients before taking their size."""
    m = matrix()
    signed = m.weight_OI.abs() * (m.of(GradientMean).mean().abs() * 5)
    assert not torch.equal(row_mask(signed, 0.5), row_mask(score("gblm:gradient_only=true", m), 0.5))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gblm_is_the_published_sum(norm):
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(4, 8, generator=generator)
    gradients = [{"w": torch.randn(4, 8, generator=generator)} for _ in range(3)]
    x_NTI = torch.randn(3, 5, 8, generator=generator)
    statistics = {kind: kind() for kind in (InputNorm, GradientAbs, GradientSquare)}
    for n in range(3):
        statistics[InputNorm].update(x_NTI[n])
        statistics[GradientAbs].update(gradients[n]["w"])
        statistics[GradientSquare].update(gradients[n]["w"])
    scaler_row = x_NTI.square().sum(1).mean(0)
    stack = torch.stack([g["w"] for g in gradients])
    folded = {"abs": {"w": stack.abs().sum(0)}, "square": {"w": stack.square().sum(0)}}
    expected = gblm_metric(folded, norm)("w", weight, scaler_row)
    assert torch.allclose(score(f"gblm:norm={norm}", Matrix("w", weight, statistics)), expected, rtol=2**-10)
    assert torch.allclose(
        score("wanda", Matrix("w", weight, statistics)), wanda_metric("w", weight, scaler_row), rtol=1e-5
    )


def test_alpha_of_the_paper_is_sqrt_n_times_ours():
    """The printed formula has ||X||_2 over all windows, without 1/sqrt(N) (methods §1.5)."""
    m, windows = matrix(), 5
    published = score("gblm:alpha=100", m) * math.sqrt(windows)
    norm = m.of(InputNorm).norm_I() * math.sqrt(windows)
    sums = m.of(GradientAbs).mean() * windows
    paper = m.weight_OI.abs() * norm + 100 * math.sqrt(windows) * m.weight_OI.abs() * sums
    assert torch.allclose(published, paper, rtol=1e-5)


def test_taylor_terms():
    m = matrix()
    g, f, w = m.of(GradientMean).mean(), m.of(GradientSquare).mean(), m.weight_OI
    assert torch.allclose(score("taylor", m), (w * g).abs())
    assert torch.allclose(score("taylor:order=second", m), w * w * f)
    assert torch.allclose(score("taylor:order=mixed", m), (w * g - w * w * f / 2).abs())
    vector = criterion_from("taylor:order=vector")
    contributions = vector.score_OI(m)
    assert torch.allclose(contributions, w * g)
    assert torch.allclose(vector.channel_score(contributions, 0), (w * g).sum(1).abs().double())
    assert torch.allclose(vector.channel_score(contributions, 1), (w * g).sum(0).abs().double())
    assert torch.allclose(vector.weight_score_OI(m), (w * g).abs())


def test_magnitude_orders_weights_alike_in_both_norms():
    m = matrix()
    assert torch.equal(row_mask(score("magnitude", m), 0.4), row_mask(score("magnitude:norm=l2", m), 0.4))
    assert torch.equal(score("magnitude:norm=l2", m), m.weight_OI**2)


def test_random_depends_on_seed_and_name_alone():
    weight = torch.zeros(3, 4)
    first = score("random", Matrix("a", weight, seed=1))
    assert torch.equal(first, score("random", Matrix("a", torch.ones(3, 4), seed=1)))
    assert not torch.equal(first, score("random", Matrix("a", weight, seed=2)))
    assert not torch.equal(first, score("random", Matrix("b", weight, seed=1)))


def test_a_criterion_gathers_exactly_what_it_reads():
    for name, kind in CRITERIA.items():
        if issubclass(kind, BlockCriterion):
            continue
        criterion = criterion_from(name)
        if isinstance(criterion, BlockCriterion):
            continue  # has no score of single weights
        m = matrix()
        only = {kind: m.statistics[kind] for kind in criterion.needs()}
        assert torch.equal(criterion.score_OI(Matrix("m", m.weight_OI, only)), criterion.score_OI(m))
        for missing in criterion.needs():
            fewer = {kind: s for kind, s in only.items() if kind is not missing}
            with pytest.raises(KeyError):
                criterion.score_OI(Matrix("m", m.weight_OI, fewer))


@pytest.mark.parametrize("name", [name for name, kind in CRITERIA.items() if issubclass(kind, BlockCriterion)])
def test_a_criterion_of_blocks_reads_what_it_gathers_and_scores_nothing_smaller(name):
    criterion = criterion_from(name)
    gathered = {kind: kind() for kind in criterion.needs()}
    for statistic in gathered.values():
        statistic.update(torch.ones(3, 4), torch.eye(3, 4))
    assert criterion.block_score(gathered, {}).isfinite().all()
    with pytest.raises(KeyError):
        criterion.block_score({}, {})
    with pytest.raises(TypeError, match="scores whole blocks"):
        criterion.weight_score_OI(matrix())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("wonda", "did you mean 'wanda'"),
        ("gblm:nrm=l1", "did you mean 'norm'"),
        ("gblm:norm=l3", "cannot be 'l3'"),
        ("gblm:alpha=-1", "alpha"),
        ("gblm:alpha=nan", "alpha"),
        ("wanda:alpha=1", "has no option"),
        ("taylor:order", "option=value"),
    ],
)
def test_unknown_names_and_options_are_refused(text, sentence):
    with pytest.raises(RecipeError, match=sentence):
        criterion_from(text)


def test_options_ride_on_the_name_and_round_trip():
    criterion = criterion_from("gblm:norm=l2,alpha=10")
    assert (criterion.options.norm, criterion.options.alpha) == ("l2", 10)
    exact = criterion_from("gblm:alpha=17.677669529663688")
    assert criterion_from(str(exact)).options.alpha == 17.677669529663688


def test_exact_counts_per_row():
    generator = torch.Generator().manual_seed(4)
    for width in (7, 10, 16):
        for ratio in (0.0, 0.1, 0.29, 0.5, 0.7, 0.99):
            scores = torch.randint(3, (5, width), generator=generator).float()
            mask = row_mask(scores, ratio)
            assert ((~mask).sum(1) == int(width * ratio)).all()
            assert torch.equal(~mask, lowest_of_rows(ratio)(scores))


def test_ria_is_a_weights_part_of_its_row_and_of_its_column():
    m = matrix()
    weight, norm = m.weight_OI.abs(), m.statistics[InputNorm].norm_I()
    expected = torch.empty_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            part = weight[i, j] / weight[:, j].sum() + weight[i, j] / weight[i].sum()
            expected[i, j] = part * norm[j] ** 0.5
    torch.testing.assert_close(score("ria", m), expected)
    zeros = Matrix("m", torch.zeros(6, 10), m.statistics)
    assert torch.equal(score("ria", zeros), torch.zeros(6, 10)), "rows and columns of zeros are worth nothing"


def test_wanda_plus_plus_joins_the_root_mean_square_gradient():
    m = matrix()
    square = m.statistics[GradientSquare].mean()
    expected = m.weight_OI.abs() * (100 * square.sqrt() + m.statistics[InputNorm].norm_I())
    torch.testing.assert_close(score("wanda++", m), expected)
    assert torch.equal(score("wanda++:alpha=0", m), score("wanda", m))
    assert criterion_from("wanda++").gradient == "block"
