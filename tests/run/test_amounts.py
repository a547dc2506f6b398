"""How much leaves, end to end: units that span the model, targets, rounding, tiers, rankings, rounds."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import tiny
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import secateur
from secateur.allocation import CostModel
from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import RecipeError
from secateur.evaluation.efficiency import macs_per_token
from secateur.plans import load_plan
from secateur.structure import OUTSIDE, find_all_units

pytestmark = pytest.mark.usefixtures("same_process")


@pytest.fixture
def pruned(save, windows_file, tmp_path):
    """Prune a model in a folder of its own; the run has compared it with the masked dense model."""

    def do(model, name="out", **fields):
        folder = save(model, f"{name}-dense")
        given = {"criterion": "magnitude", "calibration": str(windows_file)}
        return secateur.prune(str(folder), tmp_path / name, **(given | fields)).record

    return do


def removed(tmp_path, name="out"):
    plan = load_plan(tmp_path / name)
    return {(entry.block, cut.kind): cut.removed for entry in plan.blocks for cut in entry.cuts}


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_channels_leave_everywhere_alike(tied, pruned, tmp_path):
    record = pruned(tiny_llama(tie_word_embeddings=tied), unit="hidden", ratio=0.25, criterion="taylor")
    cuts = removed(tmp_path)
    assert {block for block, _ in cuts} == {OUTSIDE, 0, 1, 2}
    assert len({tuple(units) for units in cuts.values()}) == 1
    assert record["after"]["units"]["hidden"] == 48
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_size == 48
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_hidden_channel_is_worth_what_it_is_in_all_blocks(pruned, tmp_path):
    model = tiny_llama()
    worth = torch.zeros(64, dtype=torch.float64)
    for block in model.model.layers:
        for name, weight in block.named_parameters():
            if weight.dim() == 2:
                reads = not name.endswith(("o_proj.weight", "down_proj.weight"))
                worth += weight.detach().abs().double().sum(dim=0 if reads else 1)
    pruned(model, unit="hidden", ratio=0.25)
    assert removed(tmp_path)[OUTSIDE, "hidden"] == sorted(worth.argsort()[:16].tolist())


def test_the_least_block_leaves_as_a_whole(pruned, tmp_path, windows_NT):
    model = tiny_llama(num_hidden_layers=5)
    worth = [
        sum(float(w.detach().abs().double().sum()) for w in block.parameters() if w.dim() == 2)
        for block in model.model.layers
    ]
    record = pruned(model, unit="block", ratio=0.4, blocks="1:5")
    assert record["after"]["units"]["block"] == 4
    least = min(range(1, 5), key=lambda block: worth[block])
    assert removed(tmp_path)[OUTSIDE, "block"] == [least]
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    cached = cut.generate(windows_NT[:1], use_cache=True, **options)
    assert torch.equal(cached, cut.generate(windows_NT[:1], use_cache=False, **options))


def test_experts_leave_but_never_those_a_token_needs(pruned, tmp_path):
    record = pruned(tiny("mixtral"), unit="expert", ratio=0.5, criterion="random")
    assert record["after"]["units"]["expert"] == 4
    with pytest.raises(RecipeError, match="2 have to stay"):
        pruned(tiny("mixtral"), "second", unit="expert", ratio=0.75)


def test_every_kind_at_once(pruned):
    record = pruned(tiny_llama(num_hidden_layers=4), unit="block,hidden,head,query,channel", ratio=0.25)
    after = record["after"]["units"]
    assert (after["block"], after["hidden"], after["head"], after["channel"]) == (3, 48, 9, 216)


def test_macs_are_what_torch_counts(save):
    for model in (tiny_llama(), tiny_llama(tie_word_embeddings=True, num_key_value_heads=8), tiny("gpt2")):
        checkpoint = open_checkpoint(str(save(model, f"m{id(model)}")))
        structure = find_all_units(checkpoint.skeleton.model, checkpoint.skeleton.blocks_name)
        counted = macs_per_token(model, torch.zeros(1, 32, dtype=torch.long))
        ours = CostModel(checkpoint, structure, context=32).after({})
        assert ours.params == checkpoint.parameters()
        assert ours.macs == pytest.approx(counted, rel=2e-3), "rotary tables are all that differs"


@pytest.mark.parametrize("measure", ["params", "macs", "bytes"])
@pytest.mark.parametrize("allocation", ["uniform", "two-tier", "global"])
def test_a_target_is_met_and_no_smaller_than_it_has_to_be(measure, allocation, pruned, tmp_path):
    model = tiny_llama(num_hidden_layers=4)
    record = pruned(model, unit="head,channel", target=f"{measure}=-20%", allocation=allocation)
    note = record["notes"]["target"]
    assert note["reached"] <= note["at_most"] < note["next_larger"]
    written = open_checkpoint(str(tmp_path / "out"))
    structure = find_all_units(written.skeleton.model, written.skeleton.blocks_name)
    dense = open_checkpoint(str(tmp_path / "out-dense"))
    before = CostModel(dense, find_all_units(dense.skeleton.model, dense.skeleton.blocks_name)).after({})
    assert CostModel(written, structure).after({}).of(measure) == note["reached"]
    assert note["at_most"] == int(before.of(measure) * 0.8)


def test_absolute_targets(pruned):
    assert pruned(tiny_llama(), unit="channel", target="params=100K")["after"]["parameters"] <= 100_000
    assert pruned(tiny_llama(), "b", unit="channel", target="bytes=390KiB")["after"]["bytes"] <= 390 * 1024
    with pytest.raises(RecipeError, match="smallest is 54,272 parameters"):
        pruned(tiny_llama(), "c", unit="channel", target="params=1K")


def test_rounding_says_what_it_cost(pruned):
    record = pruned(tiny_llama(), unit="head,channel", ratio=0.3, round_to=16)
    assert record["after"]["units"]["channel"] == 3 * 80
    note = record["notes"]["rounding"]
    assert note == {"round_to": 16, "units_kept_more": {"channel": 36}, "parameters_kept_more": 36 * 3 * 64}


def test_a_rounded_target_is_still_met(pruned):
    record = pruned(tiny_llama(), unit="hidden", target="params=-20%", round_to=8)
    assert record["after"]["units"]["hidden"] == 48
    assert record["after"]["parameters"] <= record["before"]["parameters"] * 0.8
    assert record["notes"]["rounding"]["units_kept_more"] == {"hidden": -3}, "51 would have met it"


def test_two_tiers_keep_the_ends_whole(pruned, tmp_path):
    pruned(tiny_llama(num_hidden_layers=6), unit="channel", ratio=0.25, allocation="two-tier", protect="2:1")
    assert {block: len(units) for (block, _), units in removed(tmp_path).items()} == {2: 48, 3: 48, 4: 48}
    with pytest.raises(RecipeError, match="largest --ratio"):
        pruned(tiny_llama(num_hidden_layers=6), "b", unit="channel", ratio=0.6, allocation="two-tier", protect="2:1")


def test_ranked_apart_each_kind_gives_its_ratio(pruned, tmp_path):
    pruned(tiny_llama(), unit="head,channel", ratio=0.5, allocation="global", rank="apart")
    cuts = removed(tmp_path)
    assert sum(len(units) for (_, kind), units in cuts.items() if kind == "head") == 6
    assert sum(len(units) for (_, kind), units in cuts.items() if kind == "channel") == 144


# -- several rounds


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("unit", ["channel", "head,channel"])
def test_where_units_do_not_touch_rounds_change_nothing(unit, pruned, tmp_path):
    """What a channel's weights are worth by magnitude does not depend on other channels."""
    for steps in (1, 2, 3):
        pruned(tiny_llama(), f"o{steps}", unit=unit, ratio=0.5, steps=steps)
    assert same(weights(tmp_path / "o1"), weights(tmp_path / "o2"))
    assert same(weights(tmp_path / "o1"), weights(tmp_path / "o3"))


@pytest.mark.parametrize(
    "fields",
    [
        dict(unit="block,hidden,head,query,channel", ratio=0.5),
        dict(unit="head,channel", ratio=0.4, allocation="global"),
        dict(unit="head,channel", ratio=0.3, allocation="two-tier"),
        dict(unit="channel", target="params=-15%", round_to=8),
        dict(unit="channel", ratio=0.4, criterion="wanda", blocks="1:3"),
    ],
)
def test_rounds_reach_what_one_would(fields, pruned, tmp_path):
    """By Taylor the choice is another one; how much leaves is the same."""
    model = lambda: tiny_llama(num_hidden_layers=4)  # noqa: E731
    once, thrice = (pruned(model(), f"o{k}", **({"criterion": "taylor"} | fields), steps=k) for k in (1, 3))
    if fields.get("allocation") != "global":
        assert once["after"]["units"] == thrice["after"]["units"]
    else:
        assert thrice["after"]["parameters"] == pytest.approx(once["after"]["parameters"], rel=0.02)
    secateur.apply(tmp_path / "o3", tmp_path / "again", model=str(tmp_path / "o3-dense"))
    assert same(weights(tmp_path / "o3"), weights(tmp_path / "again"))


def test_fresh_scores_change_the_choice(pruned, tmp_path):
    for steps in (1, 4):
        pruned(tiny_llama(), f"o{steps}", unit="channel", ratio=0.5, criterion="taylor", steps=steps)
    assert removed(tmp_path, "o1") != removed(tmp_path, "o4")


def test_the_plan_says_target_and_rounding(command, llama_folder, tmp_path):
    words = ["plan", llama_folder, "--out", tmp_path / "p.json", "--criterion", "magnitude", "--unit", "channel"]
    code, out, err = command(*words, "--target", "params=-20%", "--round-to", 8, "--json")
    assert code == 0, err
    assert json.loads(out)["notes"]["target"]["reached"] <= 108_992 * 0.8
    code, out, _ = command(*words, "--overwrite", "--target", "params=-20%", "--round-to", 8)
    assert "parameters=-20" not in out
    assert "target" in out


@pytest.mark.parametrize("first", [dict(allocation="two-tier"), dict(blocks="1:2"), dict(steps=2)])
def test_scores_that_one_allocation_keeps_serve_another(first, llama_folder, windows_file, tmp_path):
    fields = dict(unit="head,channel", calibration=str(windows_file))
    secateur.plan(str(llama_folder), tmp_path / "first.json", ratio=0.25, **fields, **first)
    plan = secateur.plan(str(llama_folder), tmp_path / "then.json", ratio=0.3, allocation="global", **fields)
    assert plan.removes_anything()


def test_random_in_two_rounds_takes_exactly_the_ratio_and_the_same_each_time(pruned, tmp_path):
    for name in ("once", "again"):
        pruned(tiny_llama(), name, unit="channel", ratio=0.5, criterion="random", steps=2)
    first, second = removed(tmp_path, "once"), removed(tmp_path, "again")
    assert first == second
    assert {len(units) / 96 for units in first.values()} == {0.5}
    assert first[0, "channel"] != first[1, "channel"]
    assert first[0, "channel"] != list(range(48))


def test_zeros_outside_the_blocks_are_counted_as_zeros(save, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:5] = 0
    record = secateur.prune(str(save(model)), tmp_path / "out", unit="weight", criterion="magnitude", ratio=0.5).record
    for name, folder in (("before", tmp_path / "model"), ("after", tmp_path / "out")):
        weights = load_file(folder / "model.safetensors").values()
        assert record[name]["nonzero"] == sum(int(weight.count_nonzero()) for weight in weights)
