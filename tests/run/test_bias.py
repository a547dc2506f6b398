"""FLAP and biases, from the recipe to the written folder: what leaves is made good on average, and plain transformers loads it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import tiny
from tiny_models import tiny_llama, tiny_mistral, tiny_qwen2
from transformers import AutoModelForCausalLM

import secateur
from secateur.biases import with_biases
from secateur.checkpoint.manifest import RECORD
from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import PlanError, RecipeError
from secateur.plans import load_plan, numbers_beside
from secateur.recipe import Recipe
from secateur.sweep import Sweep

READERS = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "starcoder2": ("model.layers", "self_attn.o_proj", "mlp.c_proj"),
}
"""Of families whose products are ``nn.Linear``: where the blocks are, and what reads heads and channels."""

FLAP = {"criterion": "flap", "unit": "head,channel", "ratio": 0.3}


def model_of(family: str):
    return tiny_llama() if family == "llama" else tiny(family)


@pytest.fixture
def windows(tmp_path):
    file = tmp_path / "windows.safetensors"
    save_file({"input_ids": torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(3))}, file)
    return file


def weights_of(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def inputs_of(model, names, ids_NT):
    """What flows into modules, all tokens together, caught by plain hooks."""
    caught = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, n=name: caught[n].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=ids_NT)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in caught.items()}


def made_by_hand(model, plan, family, ids_NT):
    """The model in memory with what the plan cuts zeroed, and its mean output put into biases, all on dense inputs."""
    blocks, *readers = READERS[family]
    places = [(entry.block, cut) for entry in plan.blocks for cut in entry.cuts if cut.removed]
    names = [f"{blocks}.{b}.{readers[cut.kind == 'channel']}" for b, cut in places]
    x = inputs_of(model, names, ids_NT)
    with torch.no_grad():
        for name, (_, cut) in zip(names, places, strict=True):
            linear = model.get_submodule(name)
            width = linear.in_features // cut.count
            gone = [unit * width + column for unit in cut.removed for column in range(width)]
            shift_O = linear.weight[:, gone] @ x[name].mean(0)[gone]
            linear.bias = torch.nn.Parameter(shift_O if linear.bias is None else linear.bias + shift_O)
            linear.weight[:, gone] = 0
    return model


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_plain_transformers_computes_what_is_made_by_hand(family, allocation, save, windows, tmp_path):
    folder = save(model_of(family))
    result = secateur.prune(
        str(folder), tmp_path / "out", allocation=allocation, calibration=str(windows), **FLAP | {"ratio": 0.5}
    )
    assert result.record["logits_difference"] < 1e-5
    ids_NT = load_file(windows)["input_ids"]
    plan = load_plan(tmp_path / "out")
    assert {cut.kind for entry in plan.blocks for cut in entry.cuts if cut.removed} == {"head", "channel"}
    by_hand = made_by_hand(model_of(family), plan, family, ids_NT)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=result.record["uneven"], dtype=torch.float32
    )
    with torch.no_grad():
        expected, found = by_hand(input_ids=ids_NT).logits, loaded.eval()(input_ids=ids_NT).logits
        dense = model_of(family)(input_ids=ids_NT).logits
    scale = expected.abs().max()
    assert (found - expected).abs().max() / scale < 1e-5
    assert (found - dense).abs().max() / scale > 1e-2


@pytest.mark.usefixtures("same_process")
def test_units_are_those_of_a_plain_ranking(save, windows, tmp_path):
    """WIFV over all tokens, heads summed, standard scores in each kind of each block, one ranking by parameters held."""
    secateur.plan(str(save(tiny_llama())), out=tmp_path / "plan.json", calibration=str(windows), **FLAP)
    found = {(e.block, cut.kind): cut.removed for e in load_plan(tmp_path / "plan.json").blocks for cut in e.cuts}
    model, blocks = tiny_llama(), len(tiny_llama().model.layers)
    names = [f"model.layers.{i}.{name}" for i in range(blocks) for name in READERS["llama"][1:]]
    held = {"head": 2 * 16 * 64 + 2 * 8 * 64 + 16 + 2 * 8, "channel": 3 * 64 + 2}  # with the biases that it is given
    entries, total = [], 0
    for name, x in inputs_of(model, names, load_file(windows)["input_ids"]).items():
        kind, width = ("head", 16) if name.endswith("o_proj") else ("channel", 1)
        worth_I = x.double().var(0) * model.get_submodule(name).weight.detach().double().square().sum(0)
        score_U = worth_I.reshape(-1, width).sum(1)
        standard_U = (score_U - score_U.mean()) / score_U.std()
        entries += [(float(z), int(name.split(".")[2]), kind, unit) for unit, z in enumerate(standard_U)]
        total += held[kind] * len(score_U)
    left, expected = int(total * FLAP["ratio"]), {key: [] for key in found}
    for _, block, kind, unit in sorted(entries):
        if held[kind] <= left:
            left -= held[kind]
            expected[block, kind].append(unit)
    assert found == {key: sorted(units) for key, units in expected.items()}
    assert len({len(units) for (_, kind), units in found.items() if kind == "channel"}) > 1, "blocks differ"


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("unit", ["head,channel", "query", "weight", "channel,2:4"])
def test_the_mean_output_of_every_matrix_is_kept(unit, save, windows, tmp_path):
    folder, ids_NT = save(tiny_llama()), load_file(windows)["input_ids"]
    fields = {"criterion": "wanda", "unit": unit, "ratio": 0.25 if "channel" in unit else 0.5, "removal": "bias"}
    secateur.plan(str(folder), out=tmp_path / "plan.json", calibration=str(windows), propagate="dense", **fields)
    plan, recipe = load_plan(tmp_path / "plan.json"), Recipe(model=str(folder), **fields)
    checkpoint = with_biases(open_checkpoint(str(folder)), recipe)
    from secateur.realise import Realisation

    realisation, model = Realisation(checkpoint, plan), tiny_llama()
    checked = 0
    for index in range(3):
        before = checkpoint.block_tensors(index)
        after = realisation.decision(index).in_dense_shapes(before)
        changed = [n for n in after if n.endswith("bias") and not torch.equal(after[n], before[n])]
        weights = {
            f"model.layers.{index}.{n.removesuffix('.bias')}": n.removesuffix("bias") + "weight" for n in changed
        }
        for name, x_TI in inputs_of(model, weights, ids_NT).items():
            weight = weights[name]
            dense_O = (x_TI.double() @ before[weight].double().T).mean(0)
            found_O = (x_TI.double() @ after[weight].double().T).mean(0)
            bias_O = after[weight.removesuffix("weight") + "bias"].double()
            assert (found_O - dense_O).abs().max() > 1e-3, "without the bias it is another"
            assert torch.allclose(found_O + bias_O, dense_O, atol=1e-5)
            checked += 1
    assert checked == {"head,channel": 6, "query": 3, "weight": 21, "channel,2:4": 21}[unit]


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_on_text_that_never_changes_nothing_is_lost(family, save, tmp_path):
    """One window of one token over and over: without positions every feature is constant, all scores are zero."""
    model = model_of(family)
    if family != "llama":  # rotary positions reach no value; learned ones do
        with torch.no_grad():
            positions = next(p for n, p in model.named_parameters() if "positions" in n or "wpe" in n)
            positions.copy_(positions[:1].expand_as(positions))
    ids_NT = torch.full((1, 20), 7)
    save_file({"input_ids": ids_NT}, tmp_path / "same.safetensors")
    folder, out = save(model), tmp_path / "out"
    secateur.prune(str(folder), out, calibration=str(tmp_path / "same.safetensors"), **FLAP)
    removed = load_plan(out).removed_by_kind()
    assert all(0 < gone < there for gone, there in removed.values()), "scores that are all equal are no obstacle"
    with torch.no_grad():
        expected, found = model(input_ids=ids_NT).logits, secateur.load(out)(input_ids=ids_NT).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.usefixtures("same_process")
def test_switches_stand_in_the_config_and_biases_nobody_computed_are_zero(save, windows, tmp_path):
    folder = save(tiny_llama())
    fields = {"criterion": "flap", "unit": "channel", "ratio": 0.25, "allocation": "uniform"}
    result = secateur.prune(str(folder), tmp_path / "out", calibration=str(windows), **fields)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] is True
    assert config["attention_bias"] is False, "nothing is switched on that nothing is written to"
    assert "auto_map" not in config
    weights, dense = weights_of(tmp_path / "out"), weights_of(folder)
    new = {name: tensor for name, tensor in weights.items() if name not in dense}
    assert {name.split(".", 3)[3] for name in new} == {f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")}
    assert all(tensor.any() == ("down_proj" in name) for name, tensor in new.items())
    record = result.record
    assert record["before"]["parameters"] == sum(tensor.numel() for tensor in dense.values())
    assert record["after"]["parameters"] == sum(tensor.numel() for tensor in weights.values())


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_apply_and_prune_write_the_same_bytes(family, save, windows, tmp_path):
    folder = str(save(model_of(family)))
    secateur.prune(folder, tmp_path / "pruned", calibration=str(windows), **FLAP)
    secateur.plan(folder, out=tmp_path / "plan.json", calibration=str(windows), **FLAP)
    assert sorted(numbers_beside(tmp_path / "plan.json").iterdir())
    secateur.apply(tmp_path / "plan.json", tmp_path / "applied")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "applied" / name).read_bytes()
    with pytest.raises(PlanError, match="secateur plan"):
        secateur.apply(tmp_path / "pruned" / RECORD, tmp_path / "again")


@pytest.mark.usefixtures("same_process")
def test_damaged_biases_are_refused(save, windows, tmp_path):
    folder = str(save(tiny_llama()))
    secateur.plan(folder, out=tmp_path / "plan.json", calibration=str(windows), **FLAP)
    file = sorted(numbers_beside(tmp_path / "plan.json").iterdir())[-1]
    found = load_file(file)
    save_file({name: tensor[:-1].clone() for name, tensor in found.items()}, file)
    plan = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="not the file"):
        secateur.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("same_process")
def test_what_is_uneven_already_gets_biases_and_is_pruned_again(save, windows, tmp_path):
    """Blocks of different sizes without biases, then with them, then out of these once more."""
    folder, text = str(save(tiny_llama())), str(windows)
    first = secateur.prune(folder, tmp_path / "1", unit="channel", ratio=0.3, allocation="global", calibration=text)
    assert first.record["uneven"]
    for source, out in (("1", "2"), ("2", "3")):
        secateur.prune(str(tmp_path / source), tmp_path / out, calibration=text, **FLAP)
    biases = {n: t for n, t in weights_of(tmp_path / "2").items() if n.endswith("down_proj.bias")}
    later = weights_of(tmp_path / "3")
    assert any(not torch.equal(tensor, later[name]) for name, tensor in biases.items())


@pytest.mark.parametrize("model", [tiny_qwen2, tiny_mistral])
@pytest.mark.parametrize("words", [["--criterion", "flap"], ["--unit", "head", "--removal", "bias"]])
def test_a_family_without_such_biases_is_refused_before_any_work(
    model, words, save, windows, tmp_path, command, monkeypatch
):
    monkeypatch.setattr(Sweep, "__init__", lambda *_: pytest.fail("swept"))
    code, _, err = command("prune", save(model()), "--out", tmp_path / "out", "--calibration", windows, *words)
    assert code == 2
    assert "Traceback" not in err
    said = err.strip().splitlines()[-1]
    assert "--removal bias" in said
    assert "give --removal mask" in said
    assert "_proj.weight'" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("same_process")
def test_flap_without_biases_is_there_for_every_family(save, windows, tmp_path):
    result = secateur.prune(str(save(tiny_qwen2())), tmp_path / "out", removal="mask", calibration=str(windows), **FLAP)
    assert not [name for name in weights_of(tmp_path / "out") if name.endswith("o_proj.bias")]
    assert result.record["logits_difference"] < 1e-5


def test_a_matrix_without_a_place_for_a_bias_is_refused(save):
    """Packed experts have biases of their own kind or none; leaving experts leaves no input behind."""
    checkpoint = open_checkpoint(str(save(tiny("mixtral"))))
    for unit, sentence in (("channel", r"experts\..*give --removal mask"), ("expert", "nothing for --removal bias")):
        with pytest.raises(RecipeError, match=sentence):
            with_biases(checkpoint, Recipe(model="m", criterion="magnitude", unit=unit, removal="bias"))


@pytest.mark.usefixtures("same_process")
def test_a_relative_target_is_of_what_the_files_hold(save, windows, tmp_path):
    folder = save(tiny_llama())
    result = secateur.prune(
        str(folder), tmp_path / "out", criterion="flap", unit="channel", target="params=-10%", calibration=str(windows)
    )
    before, after = (result.record[when]["parameters"] for when in ("before", "after"))
    assert 0.9 * before - 3 * 64 - 2 <= after <= 0.9 * before


def test_a_bfloat16_model_gets_bfloat16_biases(save, windows, tmp_path):
    folder = save(tiny_llama().to(torch.bfloat16))
    result = secateur.prune(str(folder), tmp_path / "out", calibration=str(windows), **FLAP)
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert result.record["logits_difference"] < 1e-3


@pytest.mark.usefixtures("same_process")
def test_recipes_with_and_without_biases_are_compared_in_one_walk(save, windows, tmp_path):
    folder, text = str(save(tiny_llama())), str(windows)
    flap = "flap unit=head,channel ratio=0.3"
    compared = secateur.compare(folder, [flap, "wanda unit=weight"], tmp_path / "cmp", text=text, calibration=text)
    assert not compared.failed
    rows = {row["recipe"]: row for row in compared.record["rows"]}
    secateur.prune(folder, tmp_path / "out", calibration=text, **FLAP)
    models = secateur.evaluate([folder, str(tmp_path / "out")], text=text, speed=False).to_json()["models"]
    found = {name: figures["perplexity"]["value"] for name, figures in models.items()}
    measured = [rows["dense"]["perplexity"], rows[flap]["perplexity"]]
    assert measured == pytest.approx(list(found.values()), rel=1e-4)


def test_published_defaults_are_settled_by_the_criterion():
    flap = Recipe(model="m", **FLAP)
    settled = (flap.allocation, flap.normalise, flap.rank, flap.removal, flap.propagate)
    assert settled == ("global", "zscore", "together", "bias", "dense")
    assert Recipe(**flap.model_dump()) == flap
    said = Recipe(model="m", allocation="uniform", removal="mask", **FLAP)
    assert (said.allocation, said.normalise, said.removal, said.propagate) == ("uniform", None, "mask", "dense")
    assert Recipe(model="m", normalise="parameter", **FLAP).normalise == "parameter"
    masks = Recipe(model="m", criterion="flap", unit="weight")
    assert (masks.allocation, masks.normalise, masks.removal, masks.within) == ("uniform", None, "mask", "row")
    for unit in ("hidden", "block"):
        assert Recipe(model="m", criterion="flap", unit=unit).removal == "mask"
    assert Recipe(model="m", criterion="flap", unit="query").allocation == "uniform"
    taylor = Recipe(model="m", unit="channel", allocation="global")
    assert (taylor.normalise, taylor.removal) == ("parameter", "mask")
    assert Recipe(model="m", unit="channel").allocation == "uniform"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"normalise": "zscore"}, "add that, or leave it out"),
        ({"normalise": "zscore", "unit": "weight", "allocation": "global"}, "add that, or leave it out"),
        ({"normalise": "rank", "allocation": "global"}, "normalise"),
        ({"removal": "bias", "unit": "hidden"}, "a run of their own"),
        ({"removal": "bias", "steps": 2}, "leave --steps out"),
        ({"removal": "bias", "unit": "weight", "within": "global"}, "within row, share, block or layer"),
        ({"removal": "bias:x=1"}, "no option 'x'"),
    ],
)
def test_what_cannot_go_together_is_one_sentence(fields, sentence):
    from secateur.recipe import recipe_from

    with pytest.raises(RecipeError, match=sentence):
        recipe_from(model="m", **fields)
