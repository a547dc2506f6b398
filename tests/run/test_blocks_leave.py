"""Whole blocks by what they do to the residual stream, end to end: which leave, which stay, and what is left works."""

from __future__ import annotations

import pytest
import torch
from residual_stream import angles
from tiny_families import tiny
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import secateur
from secateur.blockstore import BlockStore
from secateur.errors import RecipeError
from secateur.structure import OUTSIDE
from secateur.sweep import Sweep

pytestmark = pytest.mark.usefixtures("same_process")

KINDS = ("sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention")


def quiet(model, *blocks):
    """Blocks that hardly change what passes through them; the first named does least."""
    with torch.no_grad():
        for place, index in enumerate(blocks):
            block = model.model.layers[index]
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.weight.mul_(1e-3 * place)
    return model


def dropped(folder, windows_file, **fields):
    """The blocks that leave."""
    plan = secateur.plan(str(folder), unit="block", calibration=str(windows_file), **fields)
    return [unit for entry in plan.blocks if entry.block == OUTSIDE for cut in entry.cuts for unit in cut.removed]


@pytest.fixture
def sweeps(monkeypatch):
    """The ranges of blocks that were swept."""
    ranges, plain = [], Sweep.dense
    monkeypatch.setattr(
        Sweep, "dense", lambda self, needs, blocks, visit: (ranges.append(blocks), plain(self, needs, blocks, visit))[1]
    )
    return ranges


def test_a_block_that_does_nothing_leaves_first(save, windows_file):
    folder = save(quiet(tiny_llama(num_hidden_layers=6), 3, 1, 4))
    for count, expected in ((1, [3]), (2, [1, 3]), (3, [1, 3, 4])):
        ratio = (count + 0.1) / 6
        assert dropped(folder, windows_file, criterion="influence", ratio=ratio) == expected


def test_the_last_block_stays_unless_it_is_named(save, windows_file):
    folder = save(quiet(tiny_llama(num_hidden_layers=6), 5, 1))
    for fields in ({}, {"allocation": "global"}, {"steps": 2}):
        assert dropped(folder, windows_file, criterion="influence", ratio=0.34, **fields)[:1] == [1]
        assert 5 not in dropped(folder, windows_file, criterion="influence", ratio=0.8, **fields)
    for fields in ({"blocks": "0:6"}, {"allocation": "two-tier", "protect": "2:0"}):
        assert 5 in dropped(folder, windows_file, criterion="influence", ratio=0.34, **fields)


def test_that_the_last_block_stays_is_said(command, save, windows_file, tmp_path):
    folder = save(quiet(tiny_llama(num_hidden_layers=6), 5, 1))
    words = ["plan", folder, "--unit", "block", "--ratio", 0.2, "--calibration", windows_file]
    for criterion in ("influence", "angular"):
        assert "The last block stays" in command(*words, "--criterion", criterion, "--out", tmp_path / criterion)[2]
    said = command(*words, "--criterion", "influence", "--blocks", "0:6", "--out", tmp_path / "named")[2]
    assert "The last block stays" not in said


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("within", [None, "1:5", "2:6"])
def test_the_run_between_whose_ends_least_is_turned_leaves(count, within, save, windows_file, windows_NT):
    model = tiny_llama(num_hidden_layers=6)
    start, stop = map(int, within.split(":")) if within else (0, 5)
    plain = angles(model, windows_NT)
    runs = [list(range(first, first + count)) for first in range(start, stop - count + 1)]
    best = min(runs, key=lambda run: plain[run[0], run[-1]])
    share = (count + 0.1) / (6 if within is None else stop - start)
    fields = {} if within is None else {"blocks": within}
    assert dropped(save(model), windows_file, criterion="angular", ratio=share, **fields) == best


def test_a_run_is_not_the_lowest_blocks(save, windows_file):
    """Of single blocks 1 and 4 do least; two that leave as one run have to be neighbours."""
    folder = save(quiet(tiny_llama(num_hidden_layers=6), 1, 4))
    assert dropped(folder, windows_file, criterion="influence", ratio=0.34) == [1, 4]
    first, second = dropped(folder, windows_file, criterion="angular", ratio=0.34)
    assert second == first + 1


def test_a_target_says_how_many_leave(save, windows_file):
    model = quiet(tiny_llama(num_hidden_layers=6), 3, 2)
    folder = save(model)
    each = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    for criterion in ("influence", "angular"):
        fields = {"criterion": criterion, "target": f"params={total - 2 * each + each // 2}"}
        assert dropped(folder, windows_file, **fields) == [2, 3]


def test_rounds_take_runs_of_what_the_rounds_before_left(save, windows_file):
    folder = save(quiet(tiny_llama(num_hidden_layers=7), 2, 4, 3))
    assert dropped(folder, windows_file, criterion="influence", ratio=0.45, steps=3) == [2, 3, 4]
    gone = dropped(folder, windows_file, criterion="angular", ratio=0.45, steps=3)
    assert len(gone) == 3
    assert 6 not in gone


def test_scores_are_kept_and_damaged_ones_made_again(save, windows_file, tmp_path, sweeps):
    folder = save(tiny_llama(num_hidden_layers=6))
    for criterion in ("influence", "angular"):
        first = dropped(folder, windows_file, criterion=criterion, ratio=0.4)
        other = dropped(folder, windows_file, criterion=criterion, ratio=0.6)
        assert sweeps == [range(6)]
        assert len(other) == len(first) + 1
        (kept,) = (tmp_path / "cache" / "scores").iterdir()
        (kept / "block-0002.safetensors").write_bytes(b"damaged")
        assert dropped(folder, windows_file, criterion=criterion, ratio=0.4) == first
        assert sweeps == [range(6), range(2, 3)]
        sweeps.clear()
        for file in kept.iterdir():
            file.unlink()
        kept.rmdir()


def test_what_was_scored_before_a_crash_is_not_scored_again(save, windows_file, sweeps, monkeypatch):
    folder, plain = save(tiny_llama(num_hidden_layers=6)), BlockStore.put
    whole = {c: dropped(folder, windows_file, criterion=c, ratio=0.4, seed=1) for c in ("influence", "angular")}
    for criterion, expected in whole.items():
        sweeps.clear()

        def put(self, block, tensors):
            if block == 3:
                raise KeyboardInterrupt
            plain(self, block, tensors)

        with monkeypatch.context() as patched:
            patched.setattr(BlockStore, "put", put)
            with pytest.raises(KeyboardInterrupt):
                dropped(folder, windows_file, criterion=criterion, ratio=0.4)
        assert dropped(folder, windows_file, criterion=criterion, ratio=0.4) == expected
        assert sweeps == [range(6), range(3, 6)]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"criterion": "influence"}, "cannot choose channel; give --unit block"),
        ({"criterion": "influence", "unit": "weight"}, "cannot choose weight; give --unit block"),
        ({"criterion": "influence", "unit": "2:4"}, "give --unit block"),
        ({"criterion": "angular", "unit": "block,channel"}, "cannot choose block,channel; give --unit block"),
        ({"criterion": "angular", "unit": "block", "allocation": "global"}, "leave --allocation global out"),
        ({"criterion": "influence", "unit": "block", "gradient": "exact"}, "influence needs no gradients"),
        ({"criterion": "influence", "unit": "block", "propagate": "pruned"}, "use --propagate dense"),
    ],
)
def test_what_it_cannot_do_is_refused(fields, sentence, llama_folder):
    with pytest.raises(RecipeError, match=sentence):
        secateur.plan(str(llama_folder), **fields)


FAMILIES = {
    "llama": lambda: tiny("llama", vocab_size=128, num_hidden_layers=5),
    "gemma3": lambda: tiny("gemma3", vocab_size=128, num_hidden_layers=5, layer_types=list(KINDS), sliding_window=4),
    "opt": lambda: tiny("opt", vocab_size=128, num_hidden_layers=5),
}


@pytest.mark.parametrize("criterion", ["influence", "angular"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_knows_its_blocks_and_generates_with_a_cache_as_without(
    criterion, family, save, windows_file, windows_NT, tmp_path
):
    folder = save(FAMILIES[family]())
    gone = dropped(folder, windows_file, criterion=criterion, ratio=0.45)
    assert len(gone) == 2
    fields = {"criterion": criterion, "unit": "block", "ratio": 0.45, "calibration": str(windows_file)}
    secateur.prune(str(folder), tmp_path / "out", **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.num_hidden_layers == 3
    indices = [part.layer_idx for part in model.modules() if hasattr(part, "layer_idx") and hasattr(part, "q_proj")]
    assert indices == [0, 1, 2]
    if family == "gemma3":
        assert model.config.layer_types == [kind for index, kind in enumerate(KINDS) if index not in gone]
    options = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    prompt = windows_NT[:2, :8].clamp(min=3)
    mask = torch.ones_like(prompt)
    with_cache = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(prompt, attention_mask=mask, use_cache=False, **options))
