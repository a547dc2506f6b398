"""OWL's shares beside the published lines written plainly (methods §12)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.allocation.owl import OWL, OWLOptions, outlier_share
from secateur.statistics import InputNorm


def a_block(seed: int, tail: float = 1.0):
    """Two matrices, what flows into them, and the published scores."""
    generator = torch.Generator().manual_seed(seed)
    matrices, statistics, scores = {}, {}, {}
    for name, shape in (("q", (16, 24)), ("down", (24, 40))):
        weight_OI = torch.randn(shape, generator=generator)
        x_NTI = torch.randn(5, 7, shape[1], generator=generator) * torch.rand(shape[1], generator=generator) ** -tail
        norm = InputNorm()
        for x_TI in x_NTI:
            norm.update(x_TI)
        matrices[name], statistics[name] = weight_OI, {InputNorm: norm}
        scores[name] = weight_OI.abs() * x_NTI.square().sum(dim=(0, 1)).div(5).sqrt()
    return matrices, statistics, scores


def published_keeps(outliers, spread, ratio):
    """The published mapping: kept shares of blocks of one size."""
    outliers = np.array(outliers)
    keeps = (outliers - outliers.min()) / (outliers.max() - outliers.min()) * spread * 2
    return keeps - keeps.mean() + (1 - ratio)


@pytest.mark.parametrize("outlier", [1.5, 3.0, 5.0])
def test_a_block_is_counted_over_its_matrices_together(outlier):
    matrices, statistics, scores = a_block(0)
    everything = torch.cat([score.flatten() for score in scores.values()])
    expected = float((everything > outlier * everything.mean()).float().mean())
    assert 0 < expected < 1
    found = OWL(OWLOptions(outlier=outlier)).figure(matrices, statistics)
    assert found == pytest.approx({"q": expected, "down": expected})


def test_a_matrix_is_compared_with_its_own_mean():
    matrices, statistics, scores = a_block(1)
    found = OWL(OWLOptions(by="matrix", outlier=2)).figure(matrices, statistics)
    assert found == pytest.approx({n: float((s > 2 * s.mean()).float().mean()) for n, s in scores.items()})
    assert found["q"] != found["down"]


@pytest.mark.parametrize("spread", [0.05, 0.08, 0.2])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_the_published_ratios(spread, ratio):
    policy = OWL(OWLOptions(spread=spread))
    figures = [policy.figure(*a_block(seed, tail)[:2]) for seed, tail in enumerate((0.2, 1.0, 0.6, 1.4))]
    sizes = [{"q": 16 * 24, "down": 24 * 40}] * 4
    shares = policy.shares(figures, sizes, ratio)
    expected = 1 - published_keeps([own["q"] for own in figures], spread, ratio)
    assert [share["q"] for share in shares] == pytest.approx(expected.tolist(), abs=1e-12)
    assert max(expected) - min(expected) == pytest.approx(2 * spread)
    most = max(range(4), key=lambda place: figures[place]["q"])
    assert shares[most]["q"] == min(share["q"] for share in shares)


def test_blocks_count_by_their_size():
    shares = OWL().shares([{"q": 0.1}, {"q": 0.2}], [{"q": 100}, {"q": 300}], 0.5)
    assert shares[0]["q"] - shares[1]["q"] == pytest.approx(0.16)
    assert 100 * shares[0]["q"] + 300 * shares[1]["q"] == pytest.approx(200)


@pytest.mark.parametrize(("ratio", "lowest", "highest"), [(0.02, 0.0, 0.04), (0.98, 0.97, 0.99)])
def test_a_ratio_near_an_end_stays_inside(ratio, lowest, highest):
    shares = [share["q"] for share in OWL().shares([{"q": 0.1}, {"q": 0.2}], [{"q": 10}] * 2, ratio)]
    assert shares == pytest.approx([highest, lowest])


def test_nothing_stands_out_of_nothing():
    assert outlier_share(lambda: [torch.zeros(3, 4)], 5.0) == 0
    assert outlier_share(list, 5.0) == 0
