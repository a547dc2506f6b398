"""How many single weights leave each matrix: the total is met to one weight, and nothing is emptied, whatever competes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocation.mask_amounts import MaskAmounts
from secateur.allocation.policies import POLICIES
from secateur.allocation.weights import WeightChooser
from secateur.errors import RecipeError
from secateur.recipe import Recipe
from secateur.removal.selection import lowest_mask

RATIOS = st.sampled_from([0.1, 0.5, 0.7, 0.95, 0.99])
WITHIN = st.sampled_from(["row", "share", "block", "layer"])


def policy_ratios(name, shapes, ratio, seed):
    """What a policy that wants its spread as wide as it can makes of random figures."""
    generator = torch.Generator().manual_seed(seed)
    kind = POLICIES[name]
    figures = [dict(zip(own, torch.rand(len(own), generator=generator).tolist(), strict=True)) for own in shapes]
    if kind.measured:
        figures = [{"dense_loss": 1.0, "masked_loss": 2.0, "divergence": sum(own.values())} for own in figures]
    sizes = [{name: outputs * inputs for name, (outputs, inputs) in own.items()} for own in shapes]
    return dict(enumerate(kind(kind.options_type(spread=1.0)).shares(figures, sizes, ratio)))


def scores_of(shape, seed, tied):
    generator = torch.Generator().manual_seed(seed)
    # Whole rows of tiny scores, which a comparison over rows would take as a whole.
    score_OI = torch.rand(shape, generator=generator) * 10 ** torch.randint(-6, 1, (shape[0], 1), generator=generator)
    return torch.ones(shape) if tied else score_OI


@settings(max_examples=120)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.tuples(st.integers(1, 9), st.integers(2, 150)), min_size=1, max_size=4),
    RATIOS,
    WITHIN,
    st.booleans(),
    st.integers(0, 999),
)
def test_a_policy_hits_the_total_to_one_weight_and_empties_no_row(name, sizes, ratio, within, tied, seed):
    shapes = [{"q": shape, "up": (shape[0], 2 * shape[1])} for shape in sizes]
    total = sum(outputs * inputs for own in shapes for outputs, inputs in own.values())
    most = sum(outputs * (inputs - 1) for own in shapes for outputs, inputs in own.values())
    recipe = Recipe(model="m", criterion="magnitude", unit="weight", ratio=ratio, within=within, allocation=name)
    ratios, by_block = policy_ratios(name, shapes, ratio, seed), dict(enumerate(shapes))
    if int(total * ratio) > most:
        with pytest.raises(RecipeError, match="give a smaller --ratio"):
            MaskAmounts(recipe, ratios, by_block)
        return
    amounts = MaskAmounts(recipe, ratios, by_block)
    gone = 0
    for block, own in by_block.items():
        for matrix, shape in own.items():
            amount = amounts.of(block, matrix, shape)
            mask_OI = lowest_mask(scores_of(shape, seed, tied), amount, matrix)
            assert int((~mask_OI).sum()) == amount.leaving
            assert mask_OI.any(dim=1).all()
            gone += amount.leaving
    assert gone == int(total * ratio)


@settings(max_examples=80)
@given(
    st.sampled_from(sorted(POLICIES)),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([(1, 4), (2, 4), (3, 4), (1, 8), (7, 8)]),
    st.integers(0, 999),
)
def test_a_policy_with_a_pattern_empties_no_group(name, outputs, pattern, seed):
    keep, group = pattern
    by_block = {block: {"q": (count, 16), "up": (count, 32)} for block, count in enumerate(outputs)}
    recipe = Recipe(model="m", criterion="magnitude", unit=f"{keep}:{group}", allocation=name)
    ratios = policy_ratios(name, list(by_block.values()), recipe.mask_ratio, seed)
    amounts = MaskAmounts(recipe, ratios, by_block)
    gone, step = 0, 48 * max(outputs) // group
    for block, own in by_block.items():
        for matrix, shape in own.items():
            mask_OI = lowest_mask(scores_of(shape, seed, False), amounts.of(block, matrix, shape), matrix)
            assert len(set(mask_OI.reshape(-1, group).sum(dim=1).tolist())) == 1
            assert mask_OI.reshape(-1, group).any(dim=1).all()
            gone += int((~mask_OI).sum())
    assert abs(gone - 48 * sum(outputs) * Fraction(group - keep, group)) <= Fraction(step, 2)


@settings(max_examples=80)
@given(
    st.integers(1, 9),
    st.integers(2, 150),
    st.sampled_from([0.95, 0.99, 0.999999]),
    WITHIN,
    st.booleans(),
    st.integers(0, 99),
)
def test_uniform_leaves_every_row_a_weight(outputs, inputs, ratio, within, tied, seed):
    recipe = Recipe(model="m", criterion="magnitude", unit="weight", ratio=ratio, within=within)
    amount = MaskAmounts(recipe).of(0, "q", (outputs, inputs))
    wanted = outputs * int(inputs * ratio) if within == "row" else int(outputs * inputs * ratio)
    assert amount.leaving == min(wanted, outputs * (inputs - 1))
    mask_OI = lowest_mask(scores_of((outputs, inputs), seed, tied), amount, "q")
    assert int((~mask_OI).sum()) == amount.leaving
    assert mask_OI.any(dim=1).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9, 0.999999])
def test_a_threshold_over_the_model_empties_no_matrix(tied, ratio):
    """One block is a millionth of the others in size, or everything is equal."""
    shapes = [(6, 20), (4, 30), (8, 10)]
    scores = [scores_of(shape, place, tied) * (1 if tied or place != 1 else 1e-6) for place, shape in enumerate(shapes)]
    recipe = Recipe(model="m", criterion="magnitude", unit="weight", ratio=ratio, within="global")
    chooser = WeightChooser(recipe, lambda: iter(scores))
    masks = [chooser.mask(score_OI, None, "w") for score_OI in scores]
    assert sum(int((~mask_OI).sum()) for mask_OI in masks) == min(int(320 * ratio), 320 - 18)
    assert all(bool(mask_OI.any(dim=1).all()) for mask_OI in masks)
