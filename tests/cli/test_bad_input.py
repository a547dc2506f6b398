"""Bad input: one sentence, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def flip_header_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[3] ^= 0x40
    file.write_bytes(content)


def poison(value: float):
    def do(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return do


def change_config(**fields):
    def do(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return do


def drop_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


DAMAGE = {
    "truncated": (truncate, "truncated or damaged"),
    "flipped bit in the header": (flip_header_bit, "truncated or damaged"),
    "NaN": (poison(float("nan")), "model.layers.1.mlp.up_proj.weight.*NaN"),
    "infinity": (poison(float("inf")), "model.layers.1.mlp.up_proj.weight.*infinite"),
    "config of other widths": (change_config(intermediate_size=100), "do not belong together"),
    "config of fewer blocks": (change_config(num_hidden_layers=2), "layers.2.*do not belong together"),
    "config of more blocks": (change_config(num_hidden_layers=4), "layers.3.*do not belong together"),
    "config that is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config of an unknown family": (change_config(model_type="nobody"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "a missing tensor": (drop_tensor, "model.layers.2.mlp.down_proj.weight"),
    "pickled weights": (pickle_only, "pickled.*save_pretrained"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors"),
}


def refused(command, tmp_path: Path, sentence: str, *words, out="out") -> str:
    before = sorted(tmp_path.rglob("*"))
    code, stdout, stderr = command("prune", *words, "--out", tmp_path / "new" / out, "--json")
    last = stderr.strip().splitlines()[-1]
    assert code == 2
    assert stdout == ""
    assert "Traceback" not in stderr
    assert last.startswith("secateur: ")
    import re

    assert re.search(sentence, last), last
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "cache" not in path.parts]
    assert not left
    return last


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_models(case, command, llama_folder, windows_file, tmp_path):
    damage, sentence = DAMAGE[case]
    damage(llama_folder)
    refused(command, tmp_path, sentence, llama_folder, "--calibration", windows_file)


def test_an_index_that_names_a_missing_shard(command, save, windows_file, tmp_path):
    folder = save(tiny_llama(), max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    refused(command, tmp_path, "names the shard model-00002.*missing", folder, "--calibration", windows_file)


def test_a_flipped_bit_in_our_own_output_is_seen(command, llama_folder, windows_file, tmp_path):
    import secateur

    secateur.prune(str(llama_folder), tmp_path / "first", unit="weight", criterion="magnitude")
    file = tmp_path / "first" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5000] ^= 1
    file.write_bytes(content)
    refused(command, tmp_path, "has changed since Secateur wrote it", tmp_path / "first", "--calibration", windows_file)


WORDS = {
    "missing model": (["nowhere"], "no model at 'nowhere'"),
    "hub id, offline": (["org/model"], "not in the local cache"),
    "ratio 1": (["MODEL", "--ratio", "1"], r"\[0, 1\)"),
    "ratio -0.1": (["MODEL", "--ratio", "-0.1"], r"\[0, 1\)"),
    "ratio nan": (["MODEL", "--ratio", "nan"], r"\[0, 1\)"),
    "ratio 0": (["MODEL", "--ratio", "0"], "removes nothing"),
    "too small a ratio": (["MODEL", "--unit", "head", "--ratio", "0.2"], "removes nothing"),
    "unknown criterion": (["MODEL", "--criterion", "tailor"], "did you mean 'taylor'"),
    "unknown option": (["MODEL", "--criterion", "gblm:alfa=1"], "did you mean 'alpha'"),
    "unknown unit": (["MODEL", "--unit", "heads"], "did you mean 'head'"),
    "N:M that does not divide": (["MODEL", "--unit", "2:5"], "q_proj.weight' has 64 inputs"),
    "N:M upside down": (["MODEL", "--unit", "4:2"], "no unit '4:2'"),
    "two patterns": (["MODEL", "--unit", "2:4,4:8"], "one mask pattern"),
    "blocks out of range": (["MODEL", "--blocks", "2:9"], "which has 0:3"),
    "blocks of another form": (["MODEL", "--blocks", "2"], "FIRST:LAST"),
    "global with pruned inputs": (["MODEL", "--allocation", "global", "--propagate", "pruned"], "--propagate dense"),
    "unknown reduction": (["MODEL", "--reduce", "avg"], "--reduce"),
    "unknown flag": (["MODEL", "--ration", "0.2"], "--ration"),
    "memory": (["MODEL", "--memory", "lots"], "not a size"),
    "missing recipe": (["MODEL", "--recipe", "none.yaml"], "no recipe"),
    "missing calibration": (["MODEL", "--calibration", "none.txt"], "none.txt"),
    "text without a tokenizer": (["MODEL", "--calibration", "TEXT"], "tokenizer"),
    "ids outside the vocabulary": (["MODEL", "--calibration", "BAD_IDS"], "vocabulary"),
    "more windows than there are": (["MODEL", "--calibration", "IDS", "--windows", "99"], "6"),
}


@pytest.mark.parametrize("case", WORDS)
def test_bad_words(case, command, llama_folder, windows_file, tmp_path):
    words, sentence = WORDS[case]
    text, bad = tmp_path / "text.txt", tmp_path / "bad.safetensors"
    text.write_text("some words " * 100)
    save_file({"input_ids": torch.full((2, 8), 500)}, bad)
    places = {"MODEL": llama_folder, "TEXT": text, "BAD_IDS": bad, "IDS": windows_file}
    words = [places.get(word, word) for word in words]
    if "--calibration" not in words:
        words += ["--calibration", windows_file]
    refused(command, tmp_path, sentence, *words)


def test_a_recipe_with_an_unknown_field(command, llama_folder, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {llama_folder}\ncriterio: wanda\n")
    refused(command, tmp_path, "did you mean 'criterion'", "--recipe", recipe)


def test_a_recipe_works_and_flags_win(command, llama_folder, windows_file, tmp_path, same_process):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {llama_folder}\nunit: channel\nratio: 0.5\ncalibration: {windows_file}\n")
    code, out, _ = command("prune", "--recipe", recipe, "--ratio", "0.25", "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["chosen"]["units"]["channel"] == {"removed": 72, "of": 288}
    again = tmp_path / "out" / "secateur" / "recipe.yaml"
    code, out, err = command("prune", "--recipe", again, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["already_complete"]
    assert "already complete" in err


def test_an_occupied_out_is_refused_and_replaced_only_after_success(
    command, llama_folder, windows_file, tmp_path, same_process
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    words = ["prune", llama_folder, "--out", out, "--calibration", windows_file]
    code, _, err = command(*words)
    assert (code, (out / "precious").read_text()) == (2, "mine")
    assert "--overwrite" in err
    assert command(*words, "--overwrite", "--ratio", "0")[0] == 2
    assert (out / "precious").read_text() == "mine"
    assert command(*words, "--overwrite")[0] == 0
    assert not (out / "precious").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(("out", ".out"))) == ["out"]


def test_out_that_is_a_file(command, llama_folder, windows_file, tmp_path):
    (tmp_path / "out").write_text("x")
    code, _, err = command("prune", llama_folder, "--out", tmp_path / "out", "--calibration", windows_file)
    assert code == 2
    assert "is a file" in err


def test_a_plan_that_was_edited_or_belongs_to_another_model(command, save, llama_folder, windows_file, tmp_path):
    plan = tmp_path / "p.json"
    fields = ["--unit", "head", "--ratio", "0.25", "--calibration", windows_file]
    assert command("plan", llama_folder, "--out", plan, *fields)[0] == 0
    content = json.loads(plan.read_text())
    edits = {
        "without a single head": lambda c: c["blocks"][1]["cuts"][0].update(removed=[0, 1, 2, 3]),
        "names head unit 7 in block 1 of 0 to 3": lambda c: c["blocks"][1]["cuts"][0].update(removed=[7]),
        "cuts from 5 head units in block 1": lambda c: c["blocks"][1]["cuts"][0].update(count=5),
        "another model": lambda c: c["model"].update(sha256="0" * 64),
        "not a plan": lambda c: c.update(format=9),
    }
    for sentence, edit in edits.items():
        edited = json.loads(json.dumps(content))
        edit(edited)
        plan.write_text(json.dumps(edited))
        code, _, err = command("apply", plan, "--out", tmp_path / "out")
        assert code == 2
        assert sentence in err, err
        assert not (tmp_path / "out").exists()


def test_masks_of_another_plan_are_refused(command, llama_folder, tmp_path):
    for name, ratio in (("a", "0.5"), ("b", "0.6")):
        words = ["--unit", "weight", "--criterion", "magnitude", "--ratio", ratio]
        assert command("plan", llama_folder, "--out", tmp_path / f"{name}.json", *words)[0] == 0
    shutil.copyfile(tmp_path / "b.masks.safetensors", tmp_path / "a.masks.safetensors")
    code, _, err = command("apply", tmp_path / "a.json", "--out", tmp_path / "out")
    assert code == 2
    assert "masks" in err


def start(folder: Path, out: Path, windows: Path, **options) -> subprocess.Popen:
    words = ["prune", str(folder), "--out", str(out), "--calibration", str(windows)]
    return subprocess.Popen(
        [sys.executable, "-m", "secateur", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_partial_and_says_so(sent, llama_folder, windows_file, tmp_path):
    process = start(llama_folder, tmp_path / "out", windows_file)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.partial" / "secateur").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert "out.partial" in err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    finished = start(llama_folder, tmp_path / "out", windows_file)
    _, err = finished.communicate(timeout=120)
    assert finished.returncode == 0, err
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(llama_folder, windows_file, tmp_path):
    """A limit on file sizes stands in for the disk: the system refuses to write on in the middle of the weights."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    environment = os.environ | {"SECATEUR_CACHE": str(tmp_path / "cache")}
    process = start(llama_folder, tmp_path / "out", windows_file, preexec_fn=limit, env=environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "disk filled up" in err.strip().splitlines()[-1]
    assert "the same command goes on" in err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]
    process = start(llama_folder, tmp_path / "out", windows_file, env=environment)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Going on with" in err
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--unit", "weight"], ["--criterion", "wanda"]])
def test_a_disk_that_fills_up_in_cache_or_spill(words, save, windows_file, tmp_path):
    """Scores, and what stands between blocks, are written before any weight is; the limit is too small for either."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    environment = os.environ | {"SECATEUR_CACHE": str(tmp_path / "cache")}
    folder = save(tiny_llama())
    command = [sys.executable, "-m", "secateur", "prune", str(folder), "--out", str(tmp_path / "out")]
    process = subprocess.run(
        [*command, "--calibration", str(windows_file), *words],
        preexec_fn=limit,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2, process.stderr
    assert "disk filled up" in process.stderr.strip().splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert "Logging error" not in process.stderr
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]


@pytest.mark.parametrize("out", ["model", "model/inside", "."])
def test_out_must_be_apart_from_the_model(out, command, llama_folder, windows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(llama_folder if out == "." else tmp_path)
    before = {p: p.read_bytes() for p in llama_folder.iterdir()}
    code, _, err = command("prune", llama_folder, "--out", out, "--calibration", windows_file, "--overwrite")
    assert code == 2
    assert "overlaps" in err
    assert {p: p.read_bytes() for p in llama_folder.iterdir()} == before


def test_recipes_spell_patterns_and_blocks_as_flags_do(command, llama_folder, windows_file, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {llama_folder}\nunit: 2:4\nblocks: 1:3\ncriterion: wanda\ncalibration: {windows_file}\n")
    code, out, _ = command("plan", "--recipe", recipe, "--out", tmp_path / "p.json", "--json")
    assert code == 0
    assert json.loads(out)["asked"] == "2:4 sparsity in blocks 1:3"
    plan = (tmp_path / "p.json").read_bytes()
    code, _, err = command("plan", "--recipe", recipe, "--out", tmp_path / "p.json", "--seed", "3")
    assert (code, (tmp_path / "p.json").read_bytes()) == (2, plan)
    assert "--overwrite" in err


def test_the_same_plan_again_is_already_there(command, llama_folder, tmp_path):
    words = [
        "plan",
        llama_folder,
        "--unit",
        "weight",
        "--criterion",
        "magnitude",
        "--out",
        tmp_path / "p.json",
        "--json",
    ]
    first, second = command(*words), command(*words)
    assert (first[0], second[0]) == (0, 0)
    assert json.loads(first[1])["chosen"] == json.loads(second[1])["chosen"]
    assert "already" in second[2]


def test_too_little_disk_is_seen_before_writing(
    command, llama_folder, windows_file, tmp_path, monkeypatch, same_process
):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    words = ["prune", llama_folder, "--out", tmp_path / "out", "--calibration", windows_file]
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 1000))
        code, _, err = command(*words)
    assert code == 2
    assert "has 1000 B free" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists(), "refused before any work"
    code, _, _ = command(*words)
    assert code == 0


def test_a_second_run_in_the_same_folder_is_refused(command, llama_folder, windows_file, tmp_path):
    from secateur.lock import FolderLock

    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".unfinished").touch()
    lock = FolderLock(tmp_path / "out.partial" / ".lock")
    assert lock.acquire()
    code, _, err = command("prune", llama_folder, "--out", tmp_path / "out", "--calibration", windows_file)
    lock.release()
    assert code == 2
    assert "another run" in err


def test_a_result_that_does_not_match_fails_the_run(command, llama_folder, windows_file, tmp_path, monkeypatch):
    from secateur import realise

    monkeypatch.setattr(
        realise, "fresh_logits", lambda folder, given, remote_code: torch.zeros(1, given["input_ids"].shape[1], 128)
    )
    refused(command, tmp_path, "differ from the masked dense model", llama_folder, "--calibration", windows_file)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target", "110M"], "--target is params=, macs= or bytes="),
        (["--target", "params=lots"], "is no amount"),
        (["--target", "params=+20%"], "is no amount"),
        (["--target", "macs=-100%"], "takes nothing or everything"),
        (["--target", "params=-20%", "--ratio", 0.2], "leave --ratio 0.2 out"),
        (["--target", "params=-20%", "--unit", "weight"], "give --ratio instead"),
        (["--target", "params=1M"], "nothing has to leave"),
        (["--target", "bytes=1KiB"], "the smallest is 212.0 KiB"),
        (["--round-to", 8, "--unit", "head"], "is for channel and hidden units"),
        (["--round-to", 0], "--round-to cannot be '0'"),
        (["--allocation", "two-tier", "--blocks", "1:2"], "--protect FIRST:LAST instead of --blocks"),
        (["--allocation", "two-tier", "--protect", "2:1"], "the model has only 3"),
        (["--allocation", "two-tier", "--unit", "hidden"], "no end can be kept whole"),
        (["--allocation", "two-tier", "--unit", "weight"], "is for units that are cut"),
        (["--protect", "1:1"], "under --allocation two-tier"),
        (["--protect", "1", "--allocation", "two-tier"], "two numbers of blocks"),
        (["--rank", "apart"], "is about --allocation global"),
        (["--unit", "hidden", "--blocks", "0:2"], "hidden channels run through all blocks"),
        (["--unit", "hidden", "--propagate", "pruned"], "use --propagate dense"),
        (["--unit", "block,channel", "--allocation", "global"], "use --rank apart"),
        (["--unit", "expert"], "has no 'expert' units"),
        (["--unit", "weight", "--steps", 2], "masks are chosen in one step"),
        (["--unit", "block", "--ratio", 0.2], "removes nothing"),
    ],
)
def test_amounts_that_cannot_be(words, sentence, command, llama_folder, tmp_path):
    code, _, err = command("plan", llama_folder, "--out", tmp_path / "p", "--criterion", "magnitude", *words)
    assert code == 2
    assert sentence in err, err
    assert not (tmp_path / "p").exists()


def test_a_flag_given_twice_says_both(command, llama_folder, tmp_path):
    words = ["plan", llama_folder, "--criterion", "magnitude", "--ratio", "0.25", "--out", tmp_path / "p", "--json"]
    code, out, _ = command(*words, "--unit", "head", "--unit", "channel")
    assert code == 0
    assert set(json.loads(out)["chosen"]["units"]) == {"head", "channel"}
    words = ["plan", llama_folder, "--criterion", "magnitude", "--out", tmp_path / "q"]
    code, _, err = command(*words, "--target", "params=-20%", "--target", "macs=-10%")
    assert code == 2
    assert "names several amounts" in err
