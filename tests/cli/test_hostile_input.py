"""What a hostile tester found once, and what must not come back."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

import secateur
from secateur.errors import ModelError, OutputError, PlanError, RecipeError


def test_a_foreign_partial_is_not_touched(command, llama_folder, windows_file, tmp_path):
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "precious").write_text("mine")
    code, _, err = command("prune", llama_folder, "--out", tmp_path / "o", "--calibration", windows_file)
    assert code == 2
    assert "in the way" in err
    assert (tmp_path / "o.partial" / "precious").read_text() == "mine"


def test_a_model_that_stands_where_the_work_would_go(command, llama_folder, windows_file, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "m.partial")
    code, _, err = command("prune", tmp_path / "m.partial", "--out", tmp_path / "m", "--calibration", windows_file)
    assert code == 2
    assert "overlaps" in err
    assert (tmp_path / "m.partial" / "model.safetensors").is_file()


def test_overwriting_a_folder_that_holds_the_text_is_refused(command, llama_folder, windows_file, tmp_path):
    (tmp_path / "o").mkdir()
    shutil.copy(windows_file, tmp_path / "o" / "w.safetensors")
    words = [
        "prune",
        llama_folder,
        "--out",
        tmp_path / "o",
        "--calibration",
        tmp_path / "o" / "w.safetensors",
        "--overwrite",
    ]
    code, _, err = command(*words)
    assert code == 2
    assert "which this run reads" in err
    assert (tmp_path / "o" / "w.safetensors").is_file()


def test_an_out_that_is_a_symlink_writes_where_it_points(llama_folder, tmp_path, same_process):
    for name, target in (("dangling", "new"), ("empty", "there")):
        if name == "empty":
            (tmp_path / target).mkdir()
        (tmp_path / name).symlink_to(tmp_path / target)
        secateur.prune(str(llama_folder), tmp_path / name, unit="weight", criterion="magnitude")
        assert (tmp_path / target / "model.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or "partial" in path.name]


def test_a_tie_that_the_file_contradicts_is_refused(save):
    folder = save(tiny_llama(tie_word_embeddings=True))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        secateur.plan(str(folder), unit="weight", criterion="magnitude")


def test_uneven_heads_can_be_followed_by_channels(llama_folder, windows_file, tmp_path, same_process):
    fields = dict(calibration=str(windows_file))
    secateur.prune(str(llama_folder), tmp_path / "a", unit="head,channel", allocation="global", ratio=0.5, **fields)
    secateur.prune(str(tmp_path / "a"), tmp_path / "b", unit="channel", ratio=0.3, **fields)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert all("head_dim" not in layer for layer in config["per_layer_config"].values())


def test_scores_that_overflow_are_refused(llama_folder, windows_file):
    with pytest.raises(RecipeError, match="not finite"):
        secateur.plan(str(llama_folder), criterion="gblm:alpha=1e308", calibration=str(windows_file))


def test_a_plan_cannot_switch_on_remote_code(llama_folder, tmp_path):
    secateur.plan(str(llama_folder), tmp_path / "p.json", unit="weight", criterion="magnitude")
    content = json.loads((tmp_path / "p.json").read_text())
    content["recipe"]["trust_remote_code"] = True
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="trust-remote-code"):
        secateur.apply(tmp_path / "p.json", tmp_path / "out")


@pytest.mark.parametrize("sentence", ["no model at '/x:train:y'"])
def test_sentences_are_printed_as_they_are(sentence, command):
    code, _, err = command("inspect", "/x:train:y")
    assert code == 2
    assert sentence in err


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "MODEL", "--out", "a" * 300 + ".json", "--unit", "weight", "--criterion", "magnitude"],
        ["plan", "MODEL", "--out", "/dev/null/p.json", "--unit", "weight", "--criterion", "magnitude"],
        ["plan", "MODEL", "--calibration", "b" * 300 + ".txt"],
        ["plan", "MODEL", "--windows", "99999999999"],
        ["plan", "MODEL", "--window-length", "300"],
        ["plan", "MODEL", "--unit", "007:8"],
        ["plan", "MODEL", "--unit", "2:4", "--within", "layer"],
        ["plan", "MODEL", "--criterion", "gblm:alpha=1,alpha=2"],
        ["apply", "c" * 300],
        ["inspect", "d" * 5000],
        ["recover", "MODEL", "--out", "r", "--data", "IDS", "--epochs", "1e30"],
        ["recover", "MODEL", "--out", "r", "--data", "IDS", "--epochs", "inf"],
        ["recover", "MODEL", "--out", "r", "--data", "IDS", "--seed", "4294967296"],
        ["prune", "MODEL", "--out", "r", "--evaluate", "nosuch.txt"],
        ["prune", "MODEL", "--out", "r", "--evaluate", "python-docs"],
    ],
)
def test_extremes_are_one_sentence(words, command, llama_folder, windows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.glob("*"))
    places = {"MODEL": llama_folder, "IDS": windows_file}
    words = [places.get(word, word) for word in words]
    if words[0] in ("plan", "prune") and not {"--calibration", "--windows", "--window-length"} & set(map(str, words)):
        words += ["--calibration", windows_file]
    code, out, err = command(*words)
    assert code == 2
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("secateur: ")
    assert "Traceback" not in err
    assert [path for path in sorted(tmp_path.glob("*")) if path not in before and path.name != "cache"] == []


def test_recipes_with_strange_keys_and_depths(command, llama_folder, tmp_path):
    for text in ("5: 1\n", "~: 1\n", "[" * 20000, "- a\n"):
        (tmp_path / "r.yaml").write_text(text)
        code, _, err = command("plan", llama_folder, "--recipe", tmp_path / "r.yaml")
        assert code == 2
        assert "Traceback" not in err


def test_an_adapter_is_called_an_adapter(llama_folder):
    (llama_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="merge it"):
        secateur.plan(str(llama_folder), unit="weight", criterion="magnitude")


def test_something_that_appears_at_out_meanwhile_is_kept(llama_folder, tmp_path, monkeypatch, same_process):
    from secateur.realise import Realisation

    original = Realisation.verify

    def verify(self, folder):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
        return original(self, folder)

    monkeypatch.setattr(Realisation, "verify", verify)
    with pytest.raises(OutputError, match="not empty"):
        secateur.prune(str(llama_folder), tmp_path / "out", unit="weight", criterion="magnitude")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    assert not (tmp_path / "out.partial").exists()
