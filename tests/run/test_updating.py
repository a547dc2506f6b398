"""Removals that give the weights that stay new numbers, from the recipe to the written folder, and from the plan to the same."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import tiny
from tiny_models import tiny_llama

import secateur
from secateur.checkpoint.manifest import RECORD
from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import PlanError, RecipeError
from secateur.plans import PLAN_FILE, load_plan, numbers_beside
from secateur.realise import Realisation
from secateur.recipe import Recipe

pytestmark = pytest.mark.usefixtures("same_process")

MODELS = {
    "llama": lambda: tiny_llama(),
    "kept transposed": lambda: tiny("gpt2"),
    "packed experts": lambda: tiny("mixtral"),
}


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    MODELS[request.param]().save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def windows(tmp_path):
    file = tmp_path / "windows.safetensors"
    ids = torch.randint(0, 60, (6, 24), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids}, file)
    return str(file)


def weights_of(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def matrices_of(folder):
    """Every matrix that may be masked, ``(O, I)``, by its full name."""
    checkpoint = open_checkpoint(str(folder))
    skeleton, found = checkpoint.skeleton, {}
    for index in range(len(skeleton.blocks)):
        tensors = checkpoint.block_tensors(index)
        found |= {skeleton.block_prefix(index) + n: m.of(tensors).clone() for n, m in skeleton.prunable(index).items()}
    return found


@pytest.mark.parametrize("removal", ["sparsegpt", "alps:steps=20"])
@pytest.mark.parametrize("criterion", ["sparsegpt", "wanda"])
def test_updated_weights_are_sparse_new_and_finite(model, windows, removal, criterion, tmp_path):
    out = tmp_path / "out"
    result = secateur.prune(
        str(model),
        out,
        criterion=criterion,
        removal=removal,
        unit="weight",
        ratio=0.5,
        within="row",
        calibration=windows,
    )
    dense, found = matrices_of(model), matrices_of(out)
    assert result.record["logits_difference"] < 1e-3
    changed = 0
    for name, weight_OI in found.items():
        outputs, inputs = weight_OI.shape
        # a kept weight may come out as an exact zero, a removed one never as anything else
        assert int((weight_OI == 0).sum()) >= outputs * int(inputs * 0.5), name
        assert torch.isfinite(weight_OI).all()
        stays = weight_OI != 0
        changed += int((weight_OI[stays] != dense[name][stays]).sum())
    assert changed > 1000, "what stays has new numbers"


def test_apply_and_prune_write_the_same_bytes(model, windows, tmp_path):
    fields = {"criterion": "sparsegpt", "unit": "2:4", "calibration": windows}
    secateur.prune(str(model), tmp_path / "pruned", **fields)
    secateur.plan(str(model), out=tmp_path / "plan.json", **fields)
    secateur.apply(tmp_path / "plan.json", tmp_path / "applied")
    pruned, applied = weights_of(tmp_path / "pruned"), weights_of(tmp_path / "applied")
    assert pruned.keys() == applied.keys()
    assert all(torch.equal(pruned[name], applied[name]) for name in pruned)


def test_a_plan_inside_a_result_says_where_its_weights_are(llama, windows, tmp_path):
    secateur.prune(str(llama), tmp_path / "out", criterion="sparsegpt", unit="weight", ratio=0.5, calibration=windows)
    assert not numbers_beside(tmp_path / "out" / RECORD / PLAN_FILE).exists()
    with pytest.raises(PlanError, match="secateur plan"):
        secateur.apply(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_new_weights_are_refused_before_anything_is_written(llama, windows, damage, tmp_path):
    secateur.plan(
        str(llama), out=tmp_path / "plan.json", criterion="sparsegpt", unit="weight", ratio=0.5, calibration=windows
    )
    file = sorted(numbers_beside(tmp_path / "plan.json").glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[:-100])
    else:
        file.unlink()
    with pytest.raises(PlanError, match="block"):
        secateur.apply(tmp_path / "plan.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_of_weights_is_not_replaced_unasked(llama, windows, tmp_path):
    numbers_beside(tmp_path / "plan.json").mkdir()
    fields = {"criterion": "sparsegpt", "unit": "weight", "ratio": 0.5, "calibration": windows}
    with pytest.raises(secateur.errors.OutputError, match="weights is there already"):
        secateur.plan(str(llama), out=tmp_path / "plan.json", **fields)


def test_a_ratio_of_nothing_per_row_changes_nothing(llama, windows, tmp_path):
    with pytest.raises(RecipeError, match="removes nothing"):
        secateur.plan(
            str(llama), out=tmp_path / "p.json", criterion="sparsegpt", unit="weight", ratio=0.0001, calibration=windows
        )


def logits(folder, ids):
    model = secateur.load(folder)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_channels_cut_with_a_refit_keep_outputs_closer_than_without(family, windows, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    (tiny_llama() if family == "llama" else tiny("opt")).save_pretrained(folder)
    ids = load_file(windows)["input_ids"]
    far = {}
    for removal in ("mask", "sparsegpt", "alps"):
        out = tmp_path / removal
        secateur.prune(
            str(folder), out, criterion="magnitude", unit="channel", ratio=0.25, removal=removal, calibration=windows
        )
        far[removal] = float((logits(out, ids) - logits(folder, ids)).square().mean())
    assert far["sparsegpt"] < far["mask"]
    assert far["alps"] == pytest.approx(far["sparsegpt"]), "both are the one least-squares solution"


def test_a_refit_after_a_global_choice_takes_the_same_units(llama, windows, tmp_path):
    fields = {"criterion": "taylor", "unit": "channel", "ratio": 0.3, "allocation": "global", "calibration": windows}
    plain, _ = tmp_path / "plain.json", secateur.plan(str(llama), out=tmp_path / "plain.json", **fields)
    secateur.plan(str(llama), out=tmp_path / "fitted.json", removal="sparsegpt", **fields)
    first, second = load_plan(plain), load_plan(tmp_path / "fitted.json")
    assert [e.cuts for e in first.blocks] == [e.cuts for e in second.blocks]
    assert any(e.updated for e in second.blocks)
    secateur.apply(tmp_path / "fitted.json", tmp_path / "out")


def test_cut_and_mask_and_update_together(llama, windows, tmp_path):
    result = secateur.prune(
        str(llama),
        tmp_path / "out",
        criterion="wanda",
        unit="channel,2:4",
        ratio=0.25,
        removal="sparsegpt",
        calibration=windows,
    )
    assert result.record["after"]["valid_n_of_m"]


def test_the_next_block_sees_what_is_written(llama, windows, tmp_path):
    """With a bfloat16 checkpoint the numbers are rounded before the next block's inputs are computed."""
    shutil.rmtree(llama)
    torch.manual_seed(0)
    tiny_llama().to(torch.bfloat16).save_pretrained(llama)
    secateur.plan(
        str(llama), out=tmp_path / "plan.json", criterion="sparsegpt", unit="weight", ratio=0.5, calibration=windows
    )
    plan = load_plan(tmp_path / "plan.json")
    assert {t.dtype for e in plan.blocks for t in plan.numbers(e.block).values()} == {torch.bfloat16}
    checkpoint = open_checkpoint(str(llama))
    realisation = Realisation(checkpoint, plan)
    for index in range(len(checkpoint.skeleton.blocks)):
        tensors = {n: t.float() for n, t in checkpoint.block_tensors(index).items()}
        dense = realisation.decision(index).in_dense_shapes(tensors)
        written = realisation.decision(index).carry_out(checkpoint.block_tensors(index))
        assert all(torch.equal(dense[n], written[n].float()) for n in dense)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"removal": "sparsegpd", "unit": "weight"}, "did you mean 'sparsegpt'"),
        ({"removal": "sparsegpt:bits=1", "unit": "weight"}, "bits"),
        ({"removal": "dsnot", "unit": "channel"}, "refines masks"),
        ({"removal": "sparsegpt", "unit": "block"}, "a run of their own"),
        ({"removal": "sparsegpt", "unit": "channel", "steps": 2}, "leave --steps out"),
        ({"removal": "dsnot", "unit": "weight", "within": "global"}, "leave one out"),
        ({"allocation": "alfa", "unit": "weight"}, "did you mean 'alpha'"),
        ({"allocation": "owl", "unit": "block"}, "leave --allocation owl out"),
        ({"allocation": "owl", "unit": "weight", "within": "global"}, "leave --allocation owl out"),
        ({"allocation": "alpha", "unit": "channel", "steps": 3}, "leave --steps out"),
        ({"within": "share", "unit": "channel"}, "where single weights compete, and channel are cut; leave it out"),
        ({"removal": "", "unit": "weight"}, "there is no removal ''"),
        ({"removal": "sparsegpt:bits=4", "unit": "channel"}, "add weight or N:M to --unit, or leave bits out"),
        ({"removal": "alps:rho=1e308", "unit": "weight"}, "alps:rho cannot be '1e308'"),
        ({"removal": "alps:rho=1e-300", "unit": "weight"}, "alps:rho cannot be '1e-300'"),
        ({"allocation": "global", "unit": "weight"}, "give --unit weight --within global"),
        ({"allocation": "global", "unit": "2:4"}, "is for units that are cut"),
        ({"allocation": "uniform:x=1", "unit": "weight"}, "allocation uniform has no options; leave ':x=1' out"),
    ],
)
def test_what_cannot_go_together_is_one_sentence(fields, sentence):
    with pytest.raises(RecipeError, match=sentence):
        Recipe(model="m", **fields)


def test_published_defaults_are_settled_by_the_criterion():
    sparsegpt = Recipe(model="m", criterion="sparsegpt", unit="weight")
    assert (sparsegpt.within, sparsegpt.propagate) == ("block", "pruned")
    assert sparsegpt.removal.startswith("sparsegpt:")
    assert Recipe(model="m", criterion="sparsegpt", unit="2:4").within == "row"
    assert Recipe(model="m", criterion="sparsegpt", unit="channel").removal == "mask"
    assert Recipe(model="m", criterion="magnitude", unit="weight", removal="dsnot").propagate == "pruned"


@pytest.mark.parametrize("allocation", ["alpha", "owl:outlier=2,spread=0.1", "sensitivity:windows=2"])
@pytest.mark.parametrize(
    "fields", [{"criterion": "wanda", "unit": "weight", "ratio": 0.4}, {"criterion": "sparsegpt", "unit": "weight"}]
)
def test_a_policy_meets_the_ratio_to_one_weight(llama, windows, allocation, fields, tmp_path):
    secateur.plan(str(llama), out=tmp_path / "plan.json", allocation=allocation, calibration=windows, **fields)
    plan = load_plan(tmp_path / "plan.json")
    zeros, masked = plan.zeros()
    assert zeros == int(masked * fields.get("ratio", 0.5))
    for entry in plan.blocks:
        for mask_OI in plan.masks(entry.block).values():
            assert mask_OI.any(dim=1).all(), "no row is emptied"
    assert len(set(plan.notes["allocation"]["weight"].values())) > 1, "blocks differ"


@pytest.mark.parametrize(
    ("unit", "allocation"),
    [
        ("channel", "alpha"),
        ("head,channel", "alpha"),
        ("channel", "owl:spread=0.4,outlier=2"),
        ("head,channel", "sensitivity:windows=2"),
    ],
)
def test_a_policy_meets_the_ratio_of_cut_units(llama, windows, unit, allocation, tmp_path):
    secateur.plan(
        str(llama),
        out=tmp_path / "plan.json",
        criterion="magnitude",
        unit=unit,
        ratio=0.4,
        allocation=allocation,
        calibration=windows,
    )
    plan = load_plan(tmp_path / "plan.json")
    for gone, there in plan.removed_by_kind().values():
        assert gone == int(there * 0.4)
    counts = [len(cut.removed) for entry in plan.blocks for cut in entry.cuts if cut.kind == "channel"]
    assert len(set(counts)) > 1


def test_a_policy_with_a_pattern_gives_each_block_its_own(llama, windows, tmp_path):
    secateur.plan(
        str(llama), out=tmp_path / "plan.json", criterion="wanda", unit="4:8", allocation="sensitivity:windows=2,spread=0.6",
        calibration=windows,
    )  # fmt: skip
    plan = load_plan(tmp_path / "plan.json")
    for entry in plan.blocks:
        for mask_OI in plan.masks(entry.block).values():
            assert len(set(mask_OI.reshape(-1, 8).sum(dim=1).tolist())) == 1


def test_dsnot_changes_the_mask_and_keeps_every_row_count(llama, windows, tmp_path):
    fields = {"criterion": "wanda", "unit": "weight", "ratio": 0.5, "calibration": windows}
    secateur.plan(str(llama), out=tmp_path / "a.json", **fields)
    secateur.plan(str(llama), out=tmp_path / "b.json", removal="dsnot:threshold=0", **fields)
    first, second = load_plan(tmp_path / "a.json"), load_plan(tmp_path / "b.json")
    moved = 0
    for name, mask_OI in first.masks(0).items():
        refined_OI = second.masks(0)[name]
        assert torch.equal(mask_OI.sum(1), refined_OI.sum(1))
        moved += int((mask_OI != refined_OI).sum())
    assert moved > 0


def test_published_dsnot_leaves_mlp_matrices_at_their_first_mask(llama, windows, tmp_path):
    fields = {"criterion": "wanda", "unit": "weight", "ratio": 0.5, "calibration": windows}
    secateur.plan(str(llama), out=tmp_path / "a.json", **fields)
    secateur.plan(str(llama), out=tmp_path / "b.json", removal="dsnot-published:threshold=0", **fields)
    first, second = (load_plan(tmp_path / name).masks(0) for name in ("a.json", "b.json"))
    moved = {name: not torch.equal(first[name], second[name]) for name in first}
    assert {name: "mlp" not in name for name in first} == moved
