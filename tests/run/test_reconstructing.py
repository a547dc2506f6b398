"""Blocks fitted to what the dense model gives there: zeros stay, errors fall, plans carry the numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import tiny
from tiny_models import tiny_llama

import secateur
from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import RecipeError
from secateur.plans import load_plan
from secateur.recipe import Recipe, recipe_from
from secateur.reconstruction import blockwise
from secateur.reconstruction.errors import SMALLEST_SHARE, ByChannel
from secateur.removal.curvature import DAMPENING
from secateur.report.words import notes_in_words

pytestmark = pytest.mark.usefixtures("same_process")

MODELS = {
    "llama": lambda: tiny_llama(),
    "kept transposed": lambda: tiny("gpt2"),
    "packed experts": lambda: tiny("mixtral"),
}


def save(model, folder):
    torch.manual_seed(0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    return save(MODELS[request.param](), tmp_path / "model")


@pytest.fixture
def llama(tmp_path):
    return save(tiny_llama(), tmp_path / "llama")


@pytest.fixture
def windows(tmp_path):
    file = tmp_path / "windows.safetensors"
    save_file({"input_ids": torch.randint(0, 60, (8, 24), generator=torch.Generator().manual_seed(3))}, file)
    return str(file)


def errors_of(plan):
    """For each block its error on held-out windows before and after."""
    return {entry.block: (entry.notes["error_before"], entry.notes["error_after"]) for entry in plan.blocks}


FIELDS = {
    "sparsegpt": {"criterion": "sparsegpt", "unit": "weight", "within": "row"},
    "wanda 2:4": {"criterion": "wanda", "unit": "2:4"},
    "channels": {"criterion": "taylor", "unit": "channel", "ratio": 0.3},
    "magnitude": {"criterion": "magnitude", "unit": "weight", "ratio": 0.4},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_errors_fall_and_what_left_stays_away(model, windows, fields, tmp_path):
    plain, fitted = tmp_path / "plain.json", tmp_path / "fitted.json"
    secateur.plan(str(model), out=plain, calibration=windows, **fields)
    secateur.plan(str(model), out=fitted, calibration=windows, reconstruct="block:held_out=0", **fields)
    before, after = load_plan(plain), load_plan(fitted)
    assert before.blocks[0].cuts == after.blocks[0].cuts
    for name, mask_OI in before.masks(0).items():  # of block 0 alone: later ones see other inputs
        assert torch.equal(mask_OI, after.masks(0)[name])
    for entry in after.blocks:
        masks = after.masks(entry.block)
        for name, numbers_OI in after.numbers(entry.block).items():
            assert torch.isfinite(numbers_OI).all()
            if name in masks:
                assert (numbers_OI[~masks[name]] == 0).all()
    assert all(fitted_error < error for error, fitted_error in errors_of(after).values())


def test_an_error_counts_in_parts_of_its_tokens_and_its_channels_size():
    generator = torch.Generator().manual_seed(0)
    target_BTD = torch.randn(2, 50, 6, generator=generator)
    target_BTD[..., 2] *= 100  # one channel holds nearly all, and one nothing
    target_BTD[..., 5] = 0
    error_of = ByChannel(target_BTD[window : window + 1] for window in range(2))
    share_D = (target_BTD.square() / target_BTD.square().sum(-1, keepdim=True)).mean((0, 1))
    expected_D = 1 / (6 * share_D).clamp(min=SMALLEST_SHARE)
    assert torch.allclose(error_of.weight_D, expected_D, rtol=1e-5)
    out_BTD = target_BTD + torch.randn(2, 50, 6, generator=generator)
    by_hand = torch.stack(
        [
            (expected_D * (out_D - target_D) ** 2).sum() / (target_D**2).sum()
            for out_D, target_D in zip(out_BTD.flatten(0, 1), target_BTD.flatten(0, 1), strict=True)
        ]
    ).mean()
    assert torch.allclose(error_of(out_BTD, target_BTD), by_hand, rtol=1e-5)
    loud, quiet = target_BTD.clone(), target_BTD.clone()
    loud[..., 2] *= 1.1
    quiet[..., 0] += 0.1 * target_BTD[..., 2]
    assert error_of(loud, target_BTD) < error_of(quiet, target_BTD) / 100
    even_BTD = torch.ones(1, 4, 8)
    assert torch.equal(ByChannel([even_BTD]).weight_D, torch.ones(8))
    assert torch.isfinite(ByChannel([torch.zeros(1, 4, 8)]).weight_D).all()


def test_the_written_model_is_nearer_to_the_dense_one(llama, windows, tmp_path):
    ids = load_file(windows)["input_ids"]
    far = {}
    for reconstruct in ("none", "block:rate=0.02"):
        out = tmp_path / reconstruct.partition(":")[0]
        result = secateur.prune(
            str(llama), out, criterion="wanda", unit="weight", ratio=0.6, calibration=windows, reconstruct=reconstruct
        )
        with torch.no_grad():
            logits, dense = (secateur.load(folder)(input_ids=ids).logits for folder in (out, llama))
        far[reconstruct] = float((logits - dense).square().mean())
    assert far["block:rate=0.02"] < 0.9 * far["none"]
    assert "blocks fitted to the dense model" in (out / "README.md").read_text()
    assert "their error fell from" in " ".join(notes_in_words(result.record["notes"]))


def test_apply_gives_what_prune_wrote(llama, windows, tmp_path):
    fields = {"criterion": "taylor", "unit": "head,channel", "ratio": 0.3, "allocation": "global"}
    fields |= {"removal": "sparsegpt", "reconstruct": "block:epochs=2", "calibration": windows}
    secateur.prune(str(llama), tmp_path / "pruned", **fields)
    secateur.plan(str(llama), out=tmp_path / "plan.json", **fields)
    secateur.apply(tmp_path / "plan.json", tmp_path / "applied")
    weights = [
        {k: v for file in sorted((tmp_path / name).glob("*.safetensors")) for k, v in load_file(file).items()}
        for name in ("pruned", "applied")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nothing_to_fit_or_no_gain_leaves_the_removals_numbers(llama, windows, tmp_path):
    """A step far too long makes every epoch worse on held-out windows, so no block takes it."""
    fields = {"criterion": "wanda", "unit": "weight", "calibration": windows}
    secateur.plan(str(llama), out=tmp_path / "plain.json", **fields)
    secateur.plan(str(llama), out=tmp_path / "wild.json", reconstruct="block:rate=1,epochs=2", **fields)
    plain, wild = (load_plan(tmp_path / name) for name in ("plain.json", "wild.json"))
    for entry in wild.blocks:
        before, after = errors_of(wild)[entry.block]
        assert before == after
        for name, mask_OI in plain.masks(entry.block).items():
            assert torch.equal(mask_OI, wild.masks(entry.block)[name])
    checkpoint = open_checkpoint(str(llama))
    dense, masks = checkpoint.block_tensors(1), plain.masks(1)
    for name, numbers_OI in wild.numbers(1).items():
        matrix = checkpoint.skeleton.prunable(1)[name]
        assert torch.equal(numbers_OI, matrix.of(dense).masked_fill(~masks[name], 0))


def test_part_of_the_way_is_taken_where_all_of_it_goes_too_far(llama, windows, tmp_path, monkeypatch):
    """A fit that overshoots: the weights of the first block lie on the line from the removal's to the last epoch's."""

    def take(best):
        best.weights = best._fitted.copy()  # whatever its error is
        return 0.0

    fields = {"criterion": "wanda", "unit": "weight", "calibration": windows, "blocks": "0:1"}
    found = {}
    for name, shares, method in (
        ("start", (), "block:epochs=0"),
        ("end", (), "block:rate=0.1,epochs=1,held_out=0.25"),
        ("part", blockwise.SHARES, "block:rate=0.1,epochs=1,held_out=0.25"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(blockwise, "SHARES", shares)
            if name == "end":
                patched.setattr(blockwise._Best, "look", take)
            secateur.plan(str(llama), out=tmp_path / name, reconstruct=method, **fields)
        found[name] = load_plan(tmp_path / name)
    before, after = errors_of(found["part"])[0]
    assert after < before
    start, end, part = (found[name].numbers(0) for name in ("start", "end", "part"))
    moved = {name: (part[name] - start[name]).norm() / (end[name] - start[name]).norm() for name in start}
    assert {round(float(share), 3) for share in moved.values()} <= set(blockwise.SHARES)


def test_one_window_is_fitted_and_judged_on_itself(llama, tmp_path):
    file = tmp_path / "one.safetensors"
    save_file({"input_ids": torch.arange(2, 34)[None]}, file)
    secateur.plan(
        str(llama),
        out=tmp_path / "p.json",
        criterion="wanda",
        unit="weight",
        calibration=str(file),
        reconstruct="block:rate=0.02",
    )
    assert all(after < before for before, after in errors_of(load_plan(tmp_path / "p.json")).values())


def test_the_first_block_of_a_range_is_fitted_to_its_own_dense_output(llama, windows, tmp_path):
    """Before it nothing was pruned, so with nothing removed there would be no error: a little removed makes a little."""
    fields = {"criterion": "wanda", "unit": "weight", "calibration": windows, "reconstruct": "block:epochs=0"}
    errors = {}
    for ratio in (0.02, 0.3):
        secateur.plan(str(llama), out=tmp_path / f"{ratio}.json", ratio=ratio, blocks="1:3", **fields)
        errors[ratio] = errors_of(load_plan(tmp_path / f"{ratio}.json"))
        assert list(errors[ratio]) == [1, 2]
    assert 0 < errors[0.02][1][0] < errors[0.3][1][0] / 4
    assert errors[0.3][1][0] < errors[0.3][2][0], "the second also inherits the first one's"


@pytest.mark.parametrize("blocks", ["0:3", "1:3"])
def test_what_enters_is_drawn_between_what_pruned_and_dense_blocks_give(llama, windows, blocks, tmp_path, monkeypatch):
    entered, fit = [], blockwise.Blockwise.fit

    def watched(self, fitted, passage, *args, **kwargs):
        batches, generator = list(passage.batches), torch.Generator().manual_seed(0)
        streams = passage.pairs(batches), passage.dense_inputs(batches), self._pairs(passage, batches, generator)
        entered.append([torch.cat([found[1] for found in stream]) for stream in streams])
        return fit(self, fitted, passage, *args, **kwargs)

    fields = {"criterion": "wanda", "unit": "weight", "calibration": windows, "blocks": blocks}
    method = "block:rate=0.02,epochs=1"
    with monkeypatch.context() as patched:
        patched.setattr(blockwise.Blockwise, "fit", watched)
        secateur.plan(str(llama), out=tmp_path / "between", reconstruct=f"{method},between=0.5", **fields)
    secateur.plan(str(llama), out=tmp_path / "plain", reconstruct=method, **fields)
    with torch.no_grad():
        states = secateur.load(llama)(input_ids=load_file(windows)["input_ids"], output_hidden_states=True)
    first = int(blocks[0])
    for place, (pruned_NTD, dense_NTD, drawn_NTD) in enumerate(entered):
        assert torch.allclose(dense_NTD, states.hidden_states[first + place], atol=1e-5)
        if place == 0:
            assert torch.equal(pruned_NTD, drawn_NTD), "nothing was pruned before it"
            continue
        ways_NTD = (drawn_NTD - pruned_NTD) / (dense_NTD - pruned_NTD)
        ways_NT = ways_NTD.median(dim=-1).values  # of a channel that hardly differs it is mostly rounding
        assert torch.allclose(drawn_NTD, torch.lerp(pruned_NTD, dense_NTD, ways_NT[..., None]), atol=1e-4)
        assert 0 <= ways_NT.min() < 0.05
        assert 0.45 < ways_NT.max() <= 0.5001
    between, plain = (load_plan(tmp_path / name) for name in ("between", "plain"))
    for index in range(first, 3):
        same = [torch.equal(plain.numbers(index)[name], one) for name, one in between.numbers(index).items()]
        assert all(same) if index == first else not any(same)


def test_bfloat16_checkpoints_get_rounded_numbers(windows, tmp_path):
    folder = save(tiny_llama().to(torch.bfloat16), tmp_path / "half")
    secateur.prune(
        str(folder), tmp_path / "out", criterion="sparsegpt", unit="2:4", calibration=windows, reconstruct="block"
    )
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"reconstruct": "blok", "unit": "weight"}, "did you mean 'block'"),
        ({"reconstruct": "block:rate=0", "unit": "weight"}, "rate"),
        ({"reconstruct": "block:rate=nan", "unit": "weight"}, "rate"),
        ({"reconstruct": "block", "unit": "hidden"}, "a run of their own"),
        ({"reconstruct": "block", "unit": "channel", "steps": 2}, "leave --steps out"),
        ({"reconstruct": "block", "unit": "weight", "within": "global"}, "choose within row"),
        ({"reconstruct": "block", "unit": "weight", "propagate": "dense"}, "leave --propagate dense out"),
    ],
)
def test_what_cannot_go_together_is_one_sentence(fields, sentence):
    with pytest.raises(RecipeError, match=sentence):
        Recipe(model="m", **fields)


def test_regional_steps_lower_the_error_and_masks_follow_the_weights(model, windows, tmp_path):
    fields = {"criterion": "wanda++", "unit": "weight", "ratio": 0.5, "calibration": windows}
    secateur.plan(str(model), out=tmp_path / "plain.json", **fields)
    secateur.plan(str(model), out=tmp_path / "fitted.json", reconstruct="regional:rate=1e-3,share=1", **fields)
    plain, fitted = (load_plan(tmp_path / name) for name in ("plain.json", "fitted.json"))
    assert plain.zeros() == fitted.zeros(), "as many leave every matrix"
    assert all(after < before for before, after in errors_of(fitted).values())
    moved = 0
    for name, mask_OI in fitted.masks(0).items():
        assert torch.equal(mask_OI.sum(1), plain.masks(0)[name].sum(1))
        assert (fitted.numbers(0)[name][~mask_OI] == 0).all()
        moved += int((mask_OI != plain.masks(0)[name]).sum())
    assert moved > 0


def test_a_weight_that_comes_back_has_the_number_it_left_with(llama, windows, tmp_path):
    """With a rate that moves nothing, choosing again gives the first mask and the dense numbers."""
    fields = {"criterion": "wanda", "unit": "2:4", "calibration": windows}
    secateur.plan(str(llama), out=tmp_path / "plain.json", **fields)
    secateur.plan(str(llama), out=tmp_path / "still.json", reconstruct="regional:rate=1e-30", **fields)
    plain, still = (load_plan(tmp_path / name) for name in ("plain.json", "still.json"))
    checkpoint = open_checkpoint(str(llama))
    for entry in still.blocks:
        dense = checkpoint.block_tensors(entry.block)
        for name, mask_OI in plain.masks(entry.block).items():
            weight_OI = checkpoint.skeleton.prunable(entry.block)[name].of(dense)
            assert torch.equal(mask_OI, still.masks(entry.block)[name])
            assert torch.equal(still.numbers(entry.block)[name], weight_OI.masked_fill(~mask_OI, 0))


def test_regional_steps_fit_to_the_dense_block_on_the_same_inputs(llama, windows, tmp_path):
    """Where a block loses next to nothing its error is next to nothing, whatever the blocks before it lost."""
    fields = {"criterion": "wanda", "unit": "weight", "ratio": 0.02, "calibration": windows}
    errors = {}
    for method in ("regional:rate=1e-30", "block:epochs=0"):
        secateur.plan(str(llama), out=tmp_path / "p.json", overwrite=True, reconstruct=method, **fields)
        errors[method] = errors_of(load_plan(tmp_path / "p.json"))
    own, inherited = errors.values()
    assert own[2][0] / own[0][0] < inherited[2][0] / inherited[0][0]


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
@pytest.mark.parametrize("unit", ["weight", "2:4", "channel", "head,channel", "query,channel", "hidden", "channel,2:4"])
def test_presets_make_recipes_for_every_unit(preset, unit):
    recipe = recipe_from(model="m", preset=preset, unit=unit)
    assert (recipe.reconstruct is not None) == (preset == "best" and unit != "hidden")
    assert recipe.updates == (preset != "fast" and unit != "hidden")


def test_presets_give_way_to_what_is_said():
    recipe = recipe_from(model="m", preset="best", unit="weight", criterion="wanda", reconstruct="none")
    assert (recipe.criterion, recipe.reconstruct) == ("wanda", None)
    assert recipe.removal.startswith("alps"), "which then fits what stays on that mask"
    assert recipe.allocation.startswith("sensitivity")
    with pytest.raises(RecipeError, match="did you mean 'best'"):
        recipe_from(model="m", preset="bets")
    assert recipe_from(model="m", preset="fast", unit="block").criterion == "influence"
    assert recipe_from(model="m", preset="best").allocation == "global"
    assert recipe_from(model="m", preset="best", unit="query").allocation == "uniform"
    assert recipe_from(model="m", preset="best", allocation="two-tier").allocation == "two-tier"


@pytest.mark.parametrize("preset", ["balanced", "best"])
def test_presets_hold_what_a_cut_leaves_nearer_than_sparsegpt(preset):
    cut, mixed = (
        recipe_from(model="m", preset=preset, unit=unit).parsed_removal() for unit in ("channel", "channel,2:4")
    )
    assert cut.options.dampening == 0.3
    assert mixed.options.dampening == DAMPENING, "with masks SparseGPT's own is kept"


@pytest.mark.parametrize(
    ("unit", "dampening", "noise", "between"),
    [("weight", 0.1, 0, 0), ("2:4", DAMPENING, 0.5, 1), ("4:8", DAMPENING, 0.5, 1)],
)
def test_the_best_preset_holds_what_a_mask_leaves_nearer_than_sparsegpt(unit, dampening, noise, between):
    recipe = recipe_from(model="m", preset="best", unit=unit)
    removal = recipe.parsed_removal()
    assert (removal.name, removal.options.dampening, removal.options.noise) == ("alps", dampening, noise)
    assert f"between={between}" in recipe.reconstruct
    balanced = recipe_from(model="m", preset="balanced", unit=unit).parsed_removal().options
    assert (balanced.dampening, balanced.noise) == (DAMPENING, 0)


@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_blocks_after_those_that_left_are_fitted(ratio, windows, tmp_path):
    folder = save(tiny_llama(num_hidden_layers=5), tmp_path / "five")
    ids = load_file(windows)["input_ids"]
    fields = {"criterion": "angular", "unit": "block", "ratio": ratio, "calibration": windows}
    far, kept = {}, {}
    for reconstruct in ("none", "block:held_out=0"):
        out = tmp_path / reconstruct.partition(":")[0]
        secateur.prune(str(folder), out, reconstruct=reconstruct, **fields)
        with torch.no_grad():
            logits, dense = (secateur.load(place)(input_ids=ids).logits for place in (out, folder))
        far[reconstruct] = float((logits - dense).square().mean())
        plan = load_plan(out / "secateur" / "plan.json")
        kept[reconstruct] = {entry.block for entry in plan.blocks if entry.updated}
        (left,) = (cut.removed for entry in plan.blocks for cut in entry.cuts)
    assert far["block:held_out=0"] < 0.9 * far["none"]
    assert kept["none"] == set()
    assert kept["block:held_out=0"] == {index for index in range(5) if index > min(left)} - set(left)


def test_fitted_beside_new_biases(windows, tmp_path):
    folder = save(tiny("opt"), tmp_path / "opt")
    fields = {"criterion": "flap", "unit": "channel", "ratio": 0.3, "calibration": windows}
    secateur.prune(str(folder), tmp_path / "out", reconstruct="block:held_out=0", **fields)
    plan = load_plan(tmp_path / "out" / "secateur" / "plan.json")
    names = {name for entry in plan.blocks for name in entry.updated}
    assert any(name.endswith("bias") for name in names)
    assert any(name.endswith("weight") for name in names)
    errors = plan.fit_errors()
    assert errors["error_after"] < errors["error_before"]
