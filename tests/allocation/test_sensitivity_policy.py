"""From measured costs to ratios: by their logarithms, the most sensitive block least."""

from __future__ import annotations

import pytest

from secateur.allocation.sensitivity import FLOOR, Sensitivity, SensitivityOptions


def measured(*rises, divergences=None):
    divergences = divergences or [0.0] * len(rises)
    return [
        {"dense_loss": 2.0, "masked_loss": 2.0 + rise, "divergence": moved}
        for rise, moved in zip(rises, divergences, strict=True)
    ]


def ratios(figures, ratio=0.5, **options):
    policy = Sensitivity(SensitivityOptions(**{"metric": "loss"} | options))
    return [share["w"] for share in policy.shares(figures, [{"w": 100}] * len(figures), ratio)]


def test_ratios_are_linear_in_the_logarithm():
    """Costs a factor of ten apart are steps of equal size."""
    assert ratios(measured(1.0, 0.1, 0.01)) == pytest.approx([0.35, 0.5, 0.65])
    assert ratios(measured(0.02, 2.0, 0.2), spread=0.1) == pytest.approx([0.55, 0.45, 0.5])


def test_falling_and_tiny_losses_count_as_the_floor():
    at_floor = ratios(measured(1.0, FLOOR, 0.1))
    assert ratios(measured(1.0, -0.3, 0.1)) == pytest.approx(at_floor)
    assert ratios(measured(1.0, 1e-9, 0.1)) == pytest.approx(at_floor)


@pytest.mark.parametrize("rises", [(0.0, 0.0), (-0.1, -0.2), (0.0, -1.0), (0.3, 0.3)])
def test_where_nothing_tells_blocks_apart_they_are_alike(rises):
    assert ratios(measured(*rises), 0.4) == pytest.approx([0.4, 0.4])


def test_the_metric_says_which_cost_counts():
    figures = measured(0.1, 1.0, divergences=[1.0, 0.1])
    assert ratios(figures) == pytest.approx(ratios(figures, metric="divergence")[::-1])
    assert ratios(figures)[0] > ratios(figures)[1]


def test_it_is_measured_and_not_made_of_weights():
    assert Sensitivity.measured
    with pytest.raises(NotImplementedError):
        Sensitivity().figure({}, {})
