"""DSnoT: against the loop over rows as methods §7 describes it, and what has to hold of every swap."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.removal import dsnot
from secateur.removal.dsnot import SwapOptions, refine
from secateur.removal.masks import n_of_m_mask, row_mask


def plain_refine(mask_OI, weight_OI, mean_I, variance_I, norm_I, options, group=None):
    """One row after the other, with lists."""
    result_OI = mask_OI.clone()
    for row in range(len(mask_OI)):
        result_OI[row] = plain_row(mask_OI[row], weight_OI[row], mean_I, variance_I, norm_I, options, group)[0]
    return result_OI


def plain_row(mask_I, weight_I, mean_I, variance_I, norm_I, options, group=None):
    """One row: its mask, and its error after every swap."""
    inputs = range(len(mask_I))
    contribution = (weight_I * mean_I).tolist()
    score = (weight_I.abs() * norm_I).tolist()
    tiny = torch.finfo(torch.float32).tiny
    key = [contribution[j] / max(float(variance_I[j]), tiny) ** options.power for j in inputs]
    mask, error = mask_I.tolist(), sum(contribution[j] for j in inputs if not mask_I[j])
    removed = sorted((j for j in inputs if not mask[j]), key=lambda j: key[j])
    kept = sorted((j for j in inputs if mask[j]), key=lambda j: score[j])
    first_sign, errors = (error > 0) - (error < 0), [error]
    for _ in range(options.max_cycles):
        if abs(error) <= options.update_threshold or not removed:
            break
        regrown = removed[-1] if error > 0 else removed[0]
        if group:
            among = [j for j in kept if j // group[1] == regrown // group[1]]
        else:
            among = [j for j in kept if (contribution[j] < 0 if error > 0 else contribution[j] > 0)]
        if not among:
            break
        after = error + contribution[among[0]] - contribution[regrown]
        if (options.same_sign or group) and (after > 0) - (after < 0) != first_sign:
            break
        mask[regrown], mask[among[0]], error = True, False, after
        removed.remove(regrown)
        kept.remove(among[0])
        errors.append(error)
    return torch.tensor(mask), errors


def drawn(outputs, inputs, seed, kind="random"):
    """Weights, means, variances and norms; "coarse" ones tie often and hold zeros of every sort."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    mean_I = torch.randn(inputs, generator=generator)
    variance_I, norm_I = torch.rand(2, inputs, generator=generator)
    if kind == "coarse":
        weight_OI, mean_I = (2 * weight_OI).round() / 2, (2 * mean_I).round() / 2
        variance_I, norm_I = (2 * variance_I).round() / 2, (4 * norm_I).round() / 4
    if kind == "no variance":
        variance_I = torch.zeros(inputs)
    return weight_OI, mean_I, variance_I, norm_I


KINDS = st.sampled_from(["random", "coarse", "no variance"])


@settings(max_examples=150)
@given(
    KINDS,
    st.integers(1, 6),
    st.integers(1, 60),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.1, 2.0]),
    st.sampled_from([1, 5, 50]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 999),
)
def test_every_place_is_the_plain_loop_s(kind, outputs, inputs, ratio, threshold, cycles, power, same_sign, seed):
    weight_OI, *statistics = drawn(outputs, inputs, seed, kind)
    mask_OI = row_mask(weight_OI.abs() * statistics[2], ratio)
    options = SwapOptions(cycles, threshold, power, same_sign)
    before_OI = mask_OI.clone()
    refined_OI = refine(mask_OI, weight_OI, *statistics, options)
    assert torch.equal(refined_OI, plain_refine(mask_OI, weight_OI, *statistics, options))
    assert torch.equal(mask_OI, before_OI)
    assert torch.equal(refined_OI.sum(1), mask_OI.sum(1))
    swapped_in = (refined_OI & ~mask_OI).sum(1)
    assert int(swapped_in.max()) <= cycles
    assert torch.equal(swapped_in, (mask_OI & ~refined_OI).sum(1))


@settings(max_examples=100)
@given(
    KINDS,
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]),
    st.integers(0, 999),
)
def test_groups_keep_their_number(kind, outputs, groups, pattern, seed):
    keep, group = pattern
    weight_OI, *statistics = drawn(outputs, groups * group, seed, kind)
    mask_OI = n_of_m_mask(weight_OI.abs() * statistics[2], keep, group, "w")
    options = SwapOptions(same_sign=False)  # N:M looks at the sign whatever is said
    refined_OI = refine(mask_OI, weight_OI, *statistics, options, pattern)
    assert (refined_OI.reshape(outputs, groups, group).sum(2) == keep).all()
    assert torch.equal(refined_OI, plain_refine(mask_OI, weight_OI, *statistics, options, pattern))


def errors_of(mask_OI, weight_OI, mean_I):
    return (weight_OI.double() * mean_I.double()).masked_fill(mask_OI, 0).sum(1)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_falls_and_keeps_its_sign(seed):
    weight_OI, mean_I, variance_I, norm_I = drawn(40, 200, seed)
    mask_OI = row_mask(weight_OI.abs() * norm_I, 0.6)
    refined_OI = refine(mask_OI, weight_OI, mean_I, variance_I, norm_I)
    before_O, after_O = (errors_of(mask, weight_OI, mean_I) for mask in (mask_OI, refined_OI))
    assert (after_O.sign() == before_O.sign()).all()
    assert (after_O.abs() <= before_O.abs()).all()
    assert float(after_O.abs().mean()) < 0.3 * float(before_O.abs().mean())
    for row in range(40):
        errors = plain_row(mask_OI[row], weight_OI[row], mean_I, variance_I, norm_I, SwapOptions())[1]
        assert all(abs(after) < abs(before) for before, after in pairwise(errors))


def test_rows_within_the_threshold_and_no_cycles_are_left_alone():
    weight_OI, *statistics = drawn(10, 50, 0)
    mask_OI = row_mask(weight_OI.abs() * statistics[2], 0.5)
    for options in (SwapOptions(update_threshold=1e9), SwapOptions(max_cycles=0)):
        assert torch.equal(refine(mask_OI, weight_OI, *statistics, options), mask_OI)
    assert not torch.equal(refine(mask_OI, weight_OI, *statistics), mask_OI)


def test_an_input_that_does_not_vary_is_regrown_first():
    weight_OI = torch.tensor([[1.0, 5.0, 1.0, -0.1, 2.0]])
    mask_OI = torch.tensor([[False, False, False, True, True]])
    options = SwapOptions(max_cycles=1)
    refined_OI = refine(
        mask_OI, weight_OI, torch.ones(5), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), torch.ones(5), options
    )
    assert refined_OI.tolist() == [[False, False, True, False, True]]


def test_a_row_that_runs_out_of_candidates_stops():
    weight_OI = torch.tensor([[9.0, 9.0, 9.0, -1.0, 1.0]])
    mask_OI = torch.tensor([[False, False, False, True, True]])
    refined_OI = refine(mask_OI, weight_OI, torch.ones(5), torch.ones(5), torch.ones(5))
    assert refined_OI.tolist() == [[False, False, True, False, True]]  # one negative weight was kept, so one swap
    one_of_four = refine(
        torch.tensor([[False, False, False, True]]), torch.tensor([[9.0, 9.0, 9.0, 1.0]]),
        torch.ones(4), torch.ones(4), torch.ones(4), None, (1, 4),
    )  # fmt: skip
    assert one_of_four.tolist() == [[False, False, True, False]]  # what was regrown is not pruned again


@pytest.mark.parametrize("kept", [True, False])
def test_masks_that_keep_everything_or_nothing(kept):
    weight_OI, *statistics = drawn(3, 7, 1)
    mask_OI = torch.full((3, 7), kept)
    assert torch.equal(refine(mask_OI, weight_OI, *statistics), mask_OI)


def test_the_size_of_the_parts_changes_nothing(monkeypatch):
    weight_OI, *statistics = drawn(13, 40, 2)
    mask_OI = row_mask(weight_OI.abs() * statistics[2], 0.5)
    whole_OI = refine(mask_OI, weight_OI, *statistics)
    monkeypatch.setattr(dsnot, "CHUNK", 90)
    assert torch.equal(refine(mask_OI, weight_OI, *statistics), whole_OI)


def test_a_width_that_m_does_not_divide_is_refused():
    with pytest.raises(RecipeError, match="2:4 needs widths that 4 divides, not 6"):
        refine(torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 6), *torch.ones(3, 6), None, (2, 4))
