"""FLAP's score against a loop, and the moments it reads against torch over all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.criteria import criterion_from
from secateur.criteria.base import Matrix
from secateur.criteria.units import unit_scores
from secateur.statistics import InputMoments
from secateur.structure.units import Member, UnitGroup


def windows(lengths=(7, 3, 12), inputs=5, seed=0):
    """Windows that differ in mean and spread, so that what lies between them counts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t, inputs, generator=generator) * (n + 1) + 3 * n for n, t in enumerate(lengths)]


def moments(parts):
    found = InputMoments()
    for part in parts:
        found.update(part)
    return found


def test_moments_are_those_of_all_tokens_together():
    parts = windows()
    together_TI = torch.cat(parts).double()
    found = moments(parts)
    assert found.windows == 3
    assert torch.allclose(found.mean().double(), together_TI.mean(0), rtol=1e-6)
    assert torch.allclose(found.variance().double(), together_TI.var(0, correction=0), rtol=1e-6)


def test_nothing_is_lost_when_the_mean_is_large():
    parts = [part / 100 + 1e3 for part in windows()]
    expected_I = torch.cat(parts).double().var(0, correction=0)
    assert torch.allclose(moments(parts).variance().double(), expected_I, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 1e-30])
def test_what_is_constant_has_exactly_no_variance_and_itself_for_mean(value):
    found = moments([torch.full((length, 4), value) for length in (5, 1, 9)])
    assert torch.equal(found.variance(), torch.zeros(4))
    assert torch.equal(found.mean(), torch.full((4,), value))


def test_one_window_and_one_token():
    (part,) = windows(lengths=(7,))
    assert torch.allclose(moments([part]).variance(), part.var(0, correction=0))
    assert torch.equal(moments([part[:1]]).variance(), torch.zeros(5))


def test_windows_without_tokens_change_nothing():
    parts, nothing = windows(), torch.zeros(0, 5)
    with_gaps = moments([nothing, parts[0], nothing, parts[1], parts[2]])
    assert torch.equal(with_gaps.variance(), moments(parts).variance())
    assert torch.equal(with_gaps.mean(), moments(parts).mean())
    assert torch.equal(moments([nothing]).variance(), torch.zeros(5)), "an expert to which no token ever goes"


def test_sums_of_workers_add_up_and_states_come_back():
    parts = windows(lengths=(4, 6, 5, 8))
    whole, first, second = moments(parts), moments(parts[:1]), moments(parts[1:])
    first.set_sum(first.as_sum() + second.as_sum(), 4)
    assert torch.allclose(first.variance(), whole.variance(), rtol=1e-6)
    assert torch.allclose(first.mean(), whole.mean(), rtol=1e-6)
    again = InputMoments.from_state(whole.state())
    again.update(parts[0])
    assert torch.equal(again.variance(), moments([*parts, parts[0]]).variance())
    some = whole.select(torch.tensor([3, 1]))
    assert torch.equal(some.variance(), whole.variance()[[3, 1]])
    assert torch.equal(some.mean(), whole.mean()[[3, 1]])


def test_the_score_is_variance_times_squared_weight():
    parts, weight_OI = windows(), torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    found_OI = criterion_from("flap").score_OI(Matrix("m", weight_OI, {InputMoments: moments(parts)}))
    for j in range(5):
        x = [float(value) for part in parts for value in part[:, j]]
        mean = sum(x) / len(x)
        variance = sum((value - mean) ** 2 for value in x) / len(x)
        for i in range(6):
            assert float(found_OI[i, j]) == pytest.approx(variance * float(weight_OI[i, j]) ** 2, rel=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "first", "last"])
def test_a_unit_is_worth_what_reads_it(reduce):
    """Rows that make a unit's values count nothing, so there is one member and nothing to reduce."""
    columns = np.arange(6).reshape(3, 2)
    members = (Member("up", 0, "producer", columns), Member("down", 1, "consumer", columns))
    group = UnitGroup("head", 0, "", 3, 1, members)
    contributions = {"up": torch.full((6, 4), 100.0), "down": torch.arange(24.0).reshape(4, 6)}
    found_U = unit_scores(group, contributions, criterion_from("flap"), reduce)
    assert found_U.tolist() == [contributions["down"][:, own].sum().item() for own in columns]
