"""Recovery and evaluation as stages: folders in, folders and figures out."""

from __future__ import annotations

import json

import pytest
import torch
from family_configs import FAMILIES
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import secateur
from secateur import recovering
from secateur.errors import CalibrationError, StructureError

pytestmark = pytest.mark.usefixtures("same_process")


@pytest.mark.parametrize("unit", ["weight", "2:4"])
def test_zeros_stay_zeros_through_training_and_merge(unit, llama_folder, windows_file, tmp_path):
    secateur.prune(str(llama_folder), tmp_path / "sparse", unit=unit, criterion="wanda", calibration=str(windows_file))
    result = secateur.recover(
        tmp_path / "sparse",
        tmp_path / "tuned",
        data=str(windows_file),
        windows=None,
        window_length=None,
        steps=4,
        learning_rate=1e-2,
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "tuned"))
    changed = 0
    for name, weight in after.items():
        if "proj" in name:
            assert torch.equal(weight == 0, before[name] == 0), name
            changed += int((weight != before[name]).sum())
        else:
            assert torch.equal(weight, before[name]), name
    assert changed > 0
    assert result.record["after"]["zeros"] == result.record["before"]["zeros"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")


@pytest.mark.parametrize("method", ["lora", "full", "lora-prune:ratio=0.25"])
def test_what_is_stored_in_16_bits_is_recovered_as_it_will_be_stored(method, save, windows_file, tmp_path):
    folder = save(tiny_llama().to(torch.bfloat16))
    given = dict(data=str(windows_file), method=method, steps=4, learning_rate=1e-2)
    record = secateur.recover(folder, tmp_path / "tuned", **given).record
    assert record["logits_difference"] < 1e-6
    after = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("windows", "asked", "at_most"), [(None, 256, True), (40, 40, False)])
def test_a_short_text_is_refused_only_to_who_asked_for_more(
    windows, asked, at_most, llama_folder, tmp_path, monkeypatch
):
    given = {}

    def opened(source, **named):
        given.update(named)
        raise CalibrationError("seen")

    monkeypatch.setattr(recovering, "open_windows", opened)
    (tmp_path / "t.txt").write_text("a text")
    with pytest.raises(CalibrationError, match="seen"):
        secateur.recover(llama_folder, tmp_path / "o", data=str(tmp_path / "t.txt"), windows=windows)
    assert (given["windows"], given["at_most"]) == (asked, at_most)


def test_a_mask_of_a_few_zeros_is_kept_too(save, windows_file, tmp_path):
    """A global threshold may take almost nothing from a matrix; what it took stays gone."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(20)
    secateur.prune(str(save(model)), tmp_path / "s", unit="weight", criterion="magnitude", within="global", ratio=0.2)
    secateur.recover(tmp_path / "s", tmp_path / "t", data=str(windows_file), steps=2, learning_rate=1e-2)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("s", "t"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < float((before[name] == 0).float().mean()) < 0.02
    assert all(torch.equal(after[n] == 0, before[n] == 0) for n in after if "proj" in n)


def test_an_uneven_model_is_recovered_and_stays_loadable(llama_folder, windows_file, windows_NT, tmp_path):
    secateur.prune(
        str(llama_folder), tmp_path / "cut", unit="channel", blocks="1:3", ratio=0.5, calibration=str(windows_file)
    )
    secateur.recover(
        tmp_path / "cut", tmp_path / "tuned", data=str(windows_file), windows=None, window_length=None, steps=2
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.allclose(plain(windows_NT).logits, secateur.load(tmp_path / "tuned")(windows_NT).logits, atol=1e-5)


def test_self_text_is_written_by_the_dense_model(llama_folder, windows_file, tmp_path, command):
    secateur.prune(str(llama_folder), tmp_path / "cut", unit="channel", ratio=0.5, calibration=str(windows_file))
    words = [
        "recover",
        tmp_path / "cut",
        "--out",
        tmp_path / "tuned",
        "--windows",
        12,
        "--window-length",
        16,
        "--steps",
        2,
    ]
    code, out, _ = command(*words, "--json")
    assert code == 0
    record = json.loads(out)
    assert record["model"]["spec"] == str(llama_folder)
    from secateur.calibration import open_windows
    from secateur.checkpoint.reader import open_checkpoint

    dense = open_checkpoint(str(llama_folder))
    written = open_windows(
        "self", model_folder=dense.folder, model_hash=dense.content_hash, windows=12, window_length=16, seed=0,
        vocabulary=128, cache=None,
    )  # fmt: skip
    assert record["data"]["sha256"] == written.sha256
    assert command(*words, "--json")[0] == 0  # complete already


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rank", "0"], "rank"),
        (["--learning-rate", "-1"], "learning.rate"),
        (["--dropout", "1"], "dropout"),
        (["--data", "none.txt"], "none.txt"),
        (["--epochs", "0"], "epochs"),
    ],
)
def test_bad_settings_are_one_sentence(words, sentence, llama_folder, windows_file, tmp_path, command):
    if "--data" not in words:
        words = [*words, "--data", windows_file]
    code, _, err = command("recover", llama_folder, "--out", tmp_path / "new" / "out", *words)
    assert code == 2
    assert sentence.replace(".", "") in err.replace("_", "").replace("-", "").replace(".", "") or sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()


def test_evaluate_sets_a_pruned_model_beside_its_origin(llama_folder, windows_file, windows_NT, tmp_path, command):
    secateur.prune(str(llama_folder), tmp_path / "cut", unit="channel", ratio=0.5, calibration=str(windows_file))
    code, out, _ = command("evaluate", tmp_path / "cut", "--text", windows_file, "--json")
    assert code == 0
    models = json.loads(out)["models"]
    assert list(models) == ["model", "cut"]
    model, total = tiny_llama(), 0.0
    with torch.no_grad():
        for ids_T in windows_NT:
            total += float(model(input_ids=ids_T[None], labels=ids_T[None]).loss)
    assert models["model"]["perplexity"]["value"] == pytest.approx(float(torch.tensor(total / 6).exp()), rel=1e-4)
    assert models["cut"]["size"]["parameters"] < models["model"]["size"]["parameters"]
    code, out, _ = command("evaluate", tmp_path / "cut", "--text", windows_file, "--alone", "--no-speed")
    assert code == 0
    assert "perplexity" in out


def test_prune_can_put_perplexity_on_the_card(llama_folder, windows_file, tmp_path, command):
    code, out, _ = command(
        "prune",
        llama_folder,
        "--out",
        tmp_path / "cut",
        "--calibration",
        windows_file,
        "--evaluate",
        windows_file,
        "--json",
    )
    assert code == 0
    models = json.loads(out)["evaluation"]["models"]
    card = (tmp_path / "cut" / "README.md").read_text()
    for figures in models.values():
        assert f"{figures['perplexity']['value']:.2f}" in card
    assert "partial" not in card
    assert "partial" not in out


def test_a_model_without_linear_layers_is_refused_before_any_text_is_read(save, tmp_path):
    folder = save(FAMILIES["GPT-2"].make_model())
    with pytest.raises(StructureError, match=r"no nn\.Linear"):  # not that the text is missing
        secateur.recover(folder, tmp_path / "tuned", data=str(tmp_path / "missing.txt"))
    assert not (tmp_path / "tuned").exists()
