"""What a block does to the residual stream, beside brute force: hooks on whole models, every run tried."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_stream import angles, around_blocks, plain_cosine, plain_influence
from tiny_families import tiny
from tiny_models import tiny_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from secateur.checkpoint.reader import open_checkpoint
from secateur.criteria import criterion_from
from secateur.recipe import recipe_from
from secateur.scoring import BlockScorer
from secateur.statistics import BLOCK, BlockCosine, InputNorm, LastToken
from secateur.statistics.influence import cosine
from secateur.sweep import Sweep, SweepSettings
from secateur.workers import Workers

BLOCKS = 5


def swept(folder, ids_NT, scratch, kinds, blocks=range(BLOCKS), micro_batch=2, memory=1 << 30):
    """The block's own statistics, by block."""
    found = {}

    def visit(index, block, statistics):
        found[index] = statistics[BLOCK]
        assert all(BlockCosine not in kinds for name, kinds in statistics.items() if name != BLOCK)

    settings_of = SweepSettings(micro_batch, memory, scratch)
    Sweep(open_checkpoint(str(folder)), ids_NT, settings_of).dense(frozenset(kinds), blocks, visit)
    return found


def influences(statistics):
    criterion = criterion_from("influence")
    return [float(criterion.block_score(statistics[index], {})) for index in sorted(statistics)]


numbers = st.floats(-100, 100, width=32).map(lambda value: value if abs(value) > 1e-3 else 0.0)


@settings(max_examples=100)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), st.sampled_from([1e-3, 2.0, 1e6]))
def test_cosine_is_what_it_says_and_knows_no_lengths(pairs, scale):
    x, y = torch.tensor(pairs, dtype=torch.float32).T
    found = float(cosine(x, y))
    assert -1 <= found <= 1
    if x.any() and y.any():
        assert found == pytest.approx(plain_cosine(x, y), abs=1e-5)
        assert found == pytest.approx(float(cosine(x * scale, y)), abs=1e-5)
    else:
        assert found == (0.0 if x.any() or y.any() else 1.0)
    assert float(cosine(x, x)) == 1
    assert float(cosine(x, -x)) == (-1 if x.any() else 1)


def test_bfloat16_is_multiplied_in_float32():
    x_TD = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y_TD = (x_TD.float() + 0.05).bfloat16()
    exact_T = [plain_cosine(x_D, y_D) for x_D, y_D in zip(x_TD, y_TD, strict=True)]
    assert cosine(x_TD, y_TD).tolist() == pytest.approx(exact_T, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "opt_narrow", "gemma3", "bloom", "gpt2", "phi", "mixtral"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_influence_is_that_of_plain_hooks(family, micro_batch, save, tmp_path):
    model = tiny(family)
    ids_NT = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(8))
    plain = [plain_influence(x, out) for x, out in around_blocks(model, ids_NT)]
    assert len(plain) == 2
    found = swept(
        save(model), ids_NT, tmp_path / "s", {BlockCosine}, range(2), micro_batch=micro_batch, memory=micro_batch - 1
    )
    assert influences(found) == pytest.approx(plain, abs=2e-6)
    assert all(kinds[BlockCosine].windows == 4 for kinds in found.values())


def test_the_last_block_is_judged_before_the_final_norm(save, windows_NT, tmp_path):
    model = tiny_llama(num_hidden_layers=BLOCKS)
    with torch.no_grad():
        hidden = model(input_ids=windows_NT, use_cache=False, output_hidden_states=True).hidden_states
    listed = [plain_influence(x, out) for x, out in pairwise(hidden)]
    found = influences(swept(save(model), windows_NT, tmp_path / "s", {BlockCosine}))
    assert found[:-1] == pytest.approx(listed[:-1], abs=2e-6)
    assert abs(found[-1] - listed[-1]) > 1e-2
    assert found[-1] == pytest.approx(plain_influence(*around_blocks(model, windows_NT)[-1]), abs=2e-6)


def test_a_block_that_does_nothing_has_none_and_one_that_turns_signs_has_two(save, windows_NT, tmp_path, monkeypatch):
    model = tiny_llama(num_hidden_layers=BLOCKS)
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
    folder, plain = save(model), LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        if self.self_attn.layer_idx == 3:
            return -hidden_states
        return plain(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    found = influences(swept(folder, windows_NT, tmp_path / "s", {BlockCosine}))
    assert (found[1], found[3]) == (0, 2)
    assert all(0 < found[index] < 2 for index in (0, 2, 4))


def test_zeros_that_stay_zeros_are_no_influence():
    nothing_TD, something_TD = torch.zeros(3, 4), torch.ones(3, 4)
    for x_TD, out_TD, expected in (
        (nothing_TD, nothing_TD, 0),
        (nothing_TD, something_TD, 1),
        (something_TD, nothing_TD, 1),
        (something_TD, something_TD, 0),
    ):
        statistic = BlockCosine()
        statistic.update(x_TD, out_TD)
        assert influences({0: {BlockCosine: statistic}}) == [expected]


class Half(Workers):
    """One of two workers, who is handed what both have."""

    def __init__(self, rank, both):
        super().__init__(rank, 2)
        self._both = both

    def all(self, value):
        assert torch.equal(value, self._both[self.rank])
        return list(self._both)


@pytest.mark.parametrize("kind", [BlockCosine, LastToken])
@pytest.mark.parametrize("first", [1, 3])
def test_two_workers_come_to_the_bits_of_one_and_states_go_on(kind, first):
    windows = torch.randn(7, 2, 5, 16, generator=torch.Generator().manual_seed(first))
    whole, parts = kind(), [kind(), kind()]
    for number, (x_TD, out_TD) in enumerate(windows):
        whole.update(x_TD, out_TD)
        parts[number >= first].update(x_TD, out_TD)
    both = [part.each() for part in parts]
    for rank, part in enumerate(parts):
        part.join(Half(rank, both), 7)
        assert torch.equal(part.each(), whole.each())
        assert torch.equal(part.mean(), whole.mean())
        assert part.windows == 7
    again = kind.from_state(whole.state())
    again.update(*windows[0])
    whole.update(*windows[0])
    assert torch.equal(again.each(), whole.each())
    assert again.windows == whole.windows == 8


def test_what_has_seen_no_window_says_so():
    with pytest.raises(ValueError, match="block_cosine has seen no window"):
        BlockCosine().mean()


def test_blocks_out_of_range_and_matrices_have_no_part_in_it(save, windows_NT, tmp_path):
    folder = save(tiny_llama(num_hidden_layers=BLOCKS))
    everything = swept(folder, windows_NT, tmp_path / "a", {BlockCosine})
    some = swept(folder, windows_NT, tmp_path / "b", {BlockCosine, InputNorm}, range(2, 4))
    assert list(some) == [2, 3]
    assert influences(some) == influences({index: everything[index] for index in (2, 3)})
    assert all(set(kinds) == {BlockCosine} for kinds in some.values())


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_the_distance_of_every_run_is_that_of_plain_hidden_states(family, save, tmp_path):
    model = tiny(family, num_hidden_layers=BLOCKS)
    ids_NT = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(8))
    plain, recipe = angles(model, ids_NT), recipe_from(model="-", criterion="angular", unit="block")
    folder, known = save(model), {}
    checkpoint = open_checkpoint(str(folder))

    def visit(index, block, statistics):
        known[index] = BlockScorer(checkpoint.skeleton, index, block, statistics, recipe).of_units([])["block"]

    settings_of = SweepSettings(2, 1 << 30, tmp_path / "s")
    Sweep(checkpoint, ids_NT, settings_of).dense(recipe.parsed_criterion().needs(), range(BLOCKS), visit)
    distance_UU = recipe.parsed_criterion().over_blocks(known, BLOCKS)
    for run, expected in plain.items():
        assert float(distance_UU[run]) == pytest.approx(expected, abs=1e-4), run
    assert torch.isinf(distance_UU[torch.ones(BLOCKS, BLOCKS).tril(-1).bool()]).all()
    some_UU = recipe.parsed_criterion().over_blocks({1: known[1], 2: known[2], 4: known[4]}, BLOCKS)
    assert set(map(tuple, some_UU.isfinite().nonzero().tolist())) == {(1, 1), (1, 2), (2, 2), (4, 4)}
