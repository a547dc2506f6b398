"""``secateur compare``: one table from the same windows, going on after any death, bad input in one sentence."""

from __future__ import annotations

import csv
import json
import os
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

import secateur
from secateur.comparison import comparing
from secateur.comparison.child import Planning, PlanningFailedError
from secateur.comparison.entries import read_entries
from secateur.comparison.heldout import check_overlap
from secateur.comparison.result import row_of
from secateur.errors import RecipeError, SecateurError
from secateur.evaluation import variants
from secateur.run import make_plan

THREE = ["magnitude unit=2:4", "wanda unit=weight", "gblm unit=weight"]


class Died(BaseException):
    """Stands in for ``kill -9``: nothing of ours catches it by name."""


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.safetensors"
    save_file({"input_ids": torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(9))}, path)
    return path


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plan in this process instead of a child; returns the names of the folders that were planned in."""
    calls: list[str] = []

    def here(recipe: Path, plan: Path, log_file: Path) -> Planning:
        calls.append(recipe.parent.name)
        try:
            _, result = make_plan(secateur.recipe.recipe_from(recipe), plan, overwrite=True)
        except SecateurError as error:
            raise PlanningFailedError(str(error)) from error
        return Planning(1.5, 2.0, 1.0, 1 << 20, [], json.loads(json.dumps(result.record)))

    monkeypatch.setattr(comparing, "plan_in_child", here)
    return calls


@pytest.fixture
def run(llama_folder: Path, windows_file: Path, held_out: Path, tmp_path: Path):
    """Compare the tiny Llama's recipes; returns what ``secateur.compare`` does."""

    def do(recipes, out="out", **options):
        chosen = {"calibration": str(windows_file), "text": str(held_out)} | options
        return secateur.compare(str(llama_folder), recipes, tmp_path / out, **chosen)

    return do


def figures(comparison) -> dict[str, dict]:
    """What does not depend on the clock."""
    timed = ("seconds", "peak_memory")
    return {
        row["recipe"]: {k: v for k, v in row.items() if not k.startswith(timed)} for row in comparison.record["rows"]
    }


@pytest.mark.usefixtures("same_process")
def test_the_table_says_what_evaluate_says_of_the_written_models(run, planned, llama_folder, held_out, tmp_path):
    comparison = run([*THREE, "magnitude unit=channel ratio=0.3", "random unit=block ratio=0.4"])
    assert comparison.failed == []
    rows = {row.name: row for row in comparison.rows}
    assert next(iter(rows)) == "dense"
    for name, folder in {
        "wanda unit=weight": "wanda_unit=weight",
        "random unit=block ratio=0.4": "random_unit=block_ratio=0.4",
    }.items():
        secateur.apply(tmp_path / "out" / "recipes" / folder, tmp_path / folder)
        evaluation = secateur.evaluate(
            [str(llama_folder), str(tmp_path / folder)], text=str(held_out), speed=False, alone=True
        )
        dense, pruned = evaluation.models.values()
        assert rows["dense"].mean("perplexity") == pytest.approx(dense.perplexity.value, rel=1e-5)
        assert rows[name].mean("perplexity") == pytest.approx(pruned.perplexity.value, rel=1e-5)
        assert rows[name].mean("nonzero_parameters") == pruned.size.nonzero_parameters
        assert rows[name].mean("parameters") == pruned.size.parameters
        assert rows[name].mean("kl") > 0
    written = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert [row["recipe"] for row in written] == list(rows)
    assert float(written[2]["kl"]) == rows["wanda unit=weight"].mean("kl")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == comparison.to_json()
    assert "| wanda unit=weight |" in (tmp_path / "out" / "compare.md").read_text()


def test_the_plans_are_those_that_plan_makes(run, planned, llama_folder, windows_file, tmp_path):
    run(["wanda unit=2:4"])
    secateur.plan(str(llama_folder), tmp_path / "p.json", criterion="wanda", unit="2:4", calibration=str(windows_file))
    theirs = load_file(tmp_path / "p.masks.safetensors")
    ours = load_file(tmp_path / "out" / "recipes" / "wanda_unit=2_4" / "masks.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_what_is_finished_is_not_done_again(run, planned, monkeypatch):
    whole = figures(run(THREE, "whole"))
    planned.clear()
    run(THREE[:2])
    measured = []
    original = variants.measure_variants
    monkeypatch.setattr(comparing, "measure_variants", lambda *a: (measured.append(list(a[1])), original(*a))[1])
    assert figures(run(THREE)) == whole
    assert planned == ["magnitude_unit=2_4", "wanda_unit=weight", "gblm_unit=weight"]
    assert measured == [["gblm unit=weight, seed 0"]]
    assert figures(run(THREE)) == whole
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (comparing, "plan_in_child", 1),
        (comparing, "plan_in_child", 3),
        (comparing, "measure_variants", 1),
        (comparing, "_keep", 1),
        (comparing, "_write", 1),
        (variants._VariantWalk, "_through", 2),
    ],
)
def test_what_died_anywhere_goes_on(owner, name, call, run, planned, monkeypatch, tmp_path):
    whole = figures(run(THREE, "whole"))
    planned.clear()
    with monkeypatch.context() as patched:
        original, calls = getattr(owner, name), []

        def dying(*arguments):
            calls.append(1)
            if len(calls) == call:
                raise Died
            return original(*arguments)

        patched.setattr(owner, name, dying)
        with pytest.raises(Died):
            run(THREE)
    assert not (tmp_path / "out" / "compare.json").exists()
    comparison = run(THREE)
    resumed = {row["recipe"] for row in comparison.record["rows"] if row["resumed"]}
    assert len(planned) == len(set(planned)) == 3
    assert bool(resumed) == (name == "plan_in_child")
    assert {name: row | {"resumed": False} for name, row in figures(comparison).items()} == whole
    assert not (tmp_path / "out" / "scratch").exists()


def test_one_that_fails_leaves_the_others_alone(command, planned, llama_folder, windows_file, held_out, tmp_path):
    words = ["compare", llama_folder, "--recipes", "magnitude unit=2:5", "wanda", "--out", tmp_path / "out", "--json"]
    words += ["--calibration", windows_file, "--text", held_out]
    code, out, err = command(*words)
    assert code == 2
    assert "1 of 2 recipes failed (magnitude unit=2:5)" in err.splitlines()[-1]
    rows = {row["recipe"]: row for row in json.loads(out)["rows"]}
    assert "5 divides" in rows["magnitude unit=2:5"]["failed"]
    assert rows["wanda"]["failed"] == "" or rows["wanda"]["failed"] is None
    assert rows["wanda"]["perplexity"] > 1
    assert command(*words)[0] == 2
    assert planned.count("magnitude_unit=2_5") == 2, "what failed is tried again"
    assert planned.count("wanda") == 1
    words[words.index("magnitude unit=2:5")] = "magnitude unit=2:4"
    code, out, _ = command(*[word for word in words if word != "--json"])
    assert code == 0
    assert "perplexity" in out


def test_blocks_that_are_not_there_fail_by_themselves(run, planned):
    comparison = run(["magnitude blocks=2:9", "magnitude"])
    assert comparison.failed == ["magnitude blocks=2:9"]
    assert "which has 0:3" in comparison.rows[1].failed


def test_a_failed_recipe_may_be_mended_under_its_name(run, planned, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("criterion: magnitude\nunit: 2:5\n")
    assert run([file]).failed == ["mine"]
    file.write_text("criterion: magnitude\nunit: 2:4\n")
    assert run([file]).failed == []


def test_figures_that_overflow_are_a_failure(run, planned, monkeypatch):
    original = variants.measure_variants

    def overflowing(*arguments):
        measured = original(*arguments)
        broken = measured.variants["wanda, seed 0"]
        measured.variants["wanda, seed 0"] = variants.replace(broken, divergence=float("nan"))
        return measured

    monkeypatch.setattr(comparing, "measure_variants", overflowing)
    comparison = run(["wanda", "magnitude"])
    assert comparison.failed == ["wanda"]
    assert "not finite" in comparison.rows[1].failed
    json.dumps(comparison.to_json(), allow_nan=False)


def test_seeds(run, planned):
    comparison = run(["random unit=2:4", "wanda"], seeds=3)
    drawn, fixed = comparison.rows[1:]
    assert len(drawn.values["perplexity"]) == 3
    assert drawn.deviation("perplexity") > 0
    assert drawn.mean("perplexity") == pytest.approx(sum(drawn.values["perplexity"]) / 3)
    assert fixed.values["perplexity"][1:] == [], "with fixed windows nothing of it changes"
    assert any("windows are fixed" in note for note in comparison.record["notes"])
    assert planned == ["random_unit=2_4", "seed-1", "seed-2", "wanda"]
    alone = run(["random unit=2:4"], "alone", seed=2)
    assert alone.rows[1].values["perplexity"] == drawn.values["perplexity"][2:]


def test_each_seed_draws_its_own_windows_of_a_text(planned, save, tmp_path, held_out):
    folder = save(tiny_llama())
    text = dict(calibration="self", windows=4, window_length=12, text=str(held_out))
    comparison = secateur.compare(str(folder), ["wanda unit=2:4", "magnitude"], tmp_path / "out", seeds=2, **text)
    assert len(comparison.rows[1].values["kl"]) == 2
    assert comparison.rows[1].deviation("kl") > 0
    assert len(comparison.rows[2].values["kl"]) == 1, "magnitude sees no text"
    hashes = {one["sha256"] for one in comparison.record["calibration"].values()}
    assert len(hashes) == 2


def test_text_that_only_a_removal_a_fit_or_an_allocation_reads_is_shared_too(run, planned, tmp_path, windows_file):
    recipes = [
        "magnitude unit=weight removal=sparsegpt",
        "magnitude unit=2:4 reconstruct=block:epochs=1",
        "magnitude unit=weight allocation=owl",
        "magnitude unit=weight",
    ]
    found = run(recipes)
    assert found.record["calibration"]["0"]["windows"] == [6, 24]
    for recipe in found.record["recipes"].values():
        kept = recipe[0]["planning"]["record"]["calibration"]
        assert kept is None or kept["source"] == str(tmp_path / "out" / "calibration" / "seed-0.safetensors")
    assert [found.record["recipes"][name][0]["identity"]["calibration"] is None for name in recipes] == [
        False,
        False,
        False,
        True,
    ]
    other = tmp_path / "other.safetensors"
    save_file({"input_ids": load_file(windows_file)["input_ids"].flip(1)}, other)
    with pytest.raises(SecateurError, match="--overwrite"):
        run(recipes[:1], calibration=str(other))
    run(recipes[3:], calibration=str(other))


def test_another_text_is_measured_anew_and_nothing_planned(run, planned, windows_file):
    first = run(["wanda"])
    second = run(["wanda"], text=str(windows_file))
    assert planned == ["wanda"]
    assert first.rows[1].mean("perplexity") != second.rows[1].mean("perplexity")
    assert any(note.startswith("NOT HELD OUT: 6 of 6") for note in second.record["notes"])
    assert first.record["notes"] == []


def test_overlap_is_found_wherever_it_lies():
    from secateur.calibration import TokenWindows

    generator = torch.Generator().manual_seed(0)
    seen, other = (torch.randint(99, (3, 60), generator=generator) for _ in range(2))
    other[1, 7:31] = seen[2, 30:54]
    windows = [TokenWindows(ids, "text", "") for ids in (other, seen)]
    assert check_overlap(windows[0], [windows[1]])[0].startswith("NOT HELD OUT: 1 of 3 windows")
    other[1, 7] += 1
    assert check_overlap(TokenWindows(other, "text", ""), [windows[1]]) == []
    assert check_overlap(windows[0], []) == []


BAD = {
    "no recipes": ([], "nothing to compare"),
    "a flag for a recipe": (["--overwrite"], "--recipes names no recipe before --overwrite"),
    "an unknown file": (["nowhere.yaml"], "no recipe at nowhere.yaml"),
    "the same name twice": (["wanda", "wanda"], "two recipes are called 'wanda'"),
    "an unknown criterion": (["wonda"], "recipe 'wonda' cannot be used: .*did you mean 'wanda'"),
    "an unknown field": (["wanda unti=2:4"], "did you mean 'unit'"),
    "words without a field": (["wanda 2:4"], "'2:4' in the recipe 'wanda 2:4' is not of the form"),
    "a field twice": (["wanda unit=head unit=block"], "gives 'unit' twice"),
    "another model's": (["wanda model=other"], "for the model other, not for"),
    "an empty recipe": ([" "], "a recipe is empty"),
    "one folder for two": (["My mask.yaml", "my_mask.yaml"], "would lie in one folder"),
    "YAML that is none": (["broken.yaml"], "broken.yaml is not readable YAML"),
    "texts that differ": (["wanda windows=2", "gblm windows=3"], "--windows 2 and 'gblm windows=3' says 3"),
    "no seeds": (["wanda", "--seeds", "0"], "at least 1, not 0"),
    "a key twice in YAML": (["twice.yaml"], "twice.yaml is not readable YAML: 'unit' stands there twice"),
    "windows of one token": (["wanda", "--context", "1"], "--context has to be at least 2"),
    "no held-out text": (["wanda", "--text", "none.txt"], "no file none.txt"),
    "its own text": (["wanda", "--text", "self"], "'self' is no text"),
    "too long windows": (["wanda", "--text", "LONG"], "longer than the model's 256 positions"),
    "an out that is a file": (["wanda", "--out", "FILE"], "is a file"),
    "an out with something in it": (["wanda", "--out", "FULL"], "holds mine.txt, which is not of a comparison"),
    "the model's own folder": (["wanda", "--out", "MODEL"], "overlaps with the model's own folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, command, planned, llama_folder, windows_file, held_out, tmp_path, monkeypatch):
    import re

    words, sentence = BAD[case]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    save_file({"input_ids": torch.zeros(1, 300, dtype=torch.int64)}, tmp_path / "long.safetensors")
    for name in ("My mask.yaml", "my_mask.yaml"):
        (tmp_path / name).write_text("criterion: magnitude")
    (tmp_path / "broken.yaml").write_text("{")
    (tmp_path / "twice.yaml").write_text("unit: weight\ncriterion: wanda\nunit: head\n")
    monkeypatch.chdir(tmp_path)
    places = {
        "FILE": tmp_path / "full" / "mine.txt",
        "FULL": tmp_path / "full",
        "MODEL": llama_folder,
        "LONG": tmp_path / "long.safetensors",
    }
    defaults = ["--calibration", windows_file, "--text", held_out, "--out", tmp_path / "new" / "out"]
    before = sorted(tmp_path.rglob("*"))
    recipes = ["--recipes", *(places.get(word, word) for word in words)] if words else []
    code, out, err = command("compare", llama_folder, *defaults, *recipes)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert out == ""
    assert last.startswith("secateur: ")
    assert re.search(sentence, last), last
    assert "Traceback" not in err
    assert "Calibrating" not in err
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "cache" not in p.parts] == []
    assert planned == []


def test_a_recipe_that_is_overruled_is_told(command, planned, llama_folder, windows_file, held_out, tmp_path):
    (tmp_path / "mine.yaml").write_text("criterion: magnitude\nwindows: 3\ncalibration: mine.txt\nseed: 0\n")
    given = ["--calibration", windows_file, "--windows", "2", "--seed", "0"]
    words = [*given, "--text", held_out, "--out", tmp_path / "out"]
    code, _, err = command("compare", llama_folder, "--recipes", tmp_path / "mine.yaml", *words)
    assert code == 0, err
    said = [line for line in err.splitlines() if line.startswith("'mine' says")]
    assert said == [
        f"'mine' says calibration mine.txt; here it is {windows_file} for all.",
        "'mine' says windows 3; here it is 2 for all.",
    ]


def test_a_folder_of_something_else_is_refused_until_overwritten(run, planned, save, tmp_path, held_out, windows_file):
    file = tmp_path / "mine.yaml"
    file.write_text("criterion: magnitude\nunit: 2:4\n")
    run([file])
    file.write_text("criterion: magnitude\nunit: weight\nratio: 0.5\n")
    with pytest.raises(SecateurError, match=r"holds the result of a recipe with --unit 2:4.*says weight"):
        run([file])
    other = save(tiny_llama(num_hidden_layers=2), "other")
    with pytest.raises(SecateurError, match="holds a comparison with a model whose content"):
        secateur.compare(str(other), ["magnitude"], tmp_path / "out", text=str(held_out))
    comparison = run([file], overwrite=True)
    assert comparison.failed == []
    assert planned == ["mine", "mine"]


def test_a_damaged_plan_is_refused(run, planned, tmp_path):
    run(["magnitude unit=2:4"])
    place = tmp_path / "out" / "recipes" / "magnitude_unit=2_4"
    whole = (place / "plan.json").read_text()
    for damage in ("{", whole.replace('"zeros": ', '"zero": ')):
        (place / "plan.json").write_text(damage)
        with pytest.raises(SecateurError, match="plan kept for the recipe 'magnitude unit=2:4' cannot be used"):
            run(["magnitude unit=2:4"])
    shutil.rmtree(place)
    assert run(["magnitude unit=2:4"]).failed == []


def test_damaged_new_weights_are_refused_where_they_are_measured_again(run, planned, windows_file, tmp_path):
    run(["sparsegpt unit=2:4"])
    place = tmp_path / "out" / "recipes" / "sparsegpt_unit=2_4"
    file = place / "weights" / "block-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert run(["sparsegpt unit=2:4"]).failed == [], "all is measured already"
    with pytest.raises(
        SecateurError, match=r"kept for the recipe 'sparsegpt unit=2:4' cannot be used .*; remove .*2_4, or"
    ):
        run(["sparsegpt unit=2:4"], text=str(windows_file))
    shutil.rmtree(place)
    assert run(["sparsegpt unit=2:4"], text=str(windows_file)).failed == []


def test_a_comparison_at_work_is_not_disturbed(run, planned, monkeypatch, tmp_path):
    from secateur.lock import FolderLock

    run(["magnitude"])
    lock = FolderLock(tmp_path / "out" / ".lock")
    assert lock.acquire()
    with pytest.raises(SecateurError, match="another comparison is writing"):
        run(["magnitude"])
    assert (tmp_path / "out" / ".lock").exists()
    lock.release()
    run(["magnitude"])


def test_recipes_that_share_stand_together_the_widest_first():
    words = ["gblm unit=weight blocks=1:2", "wanda unit=2:4", "gblm unit=2:4", "gblm unit=head blocks=0:2", "magnitude"]
    entries = read_entries("smollm2", words, {})
    ordered = [entry.name for entry in sorted(entries, key=lambda entry: entry.measures(3))]
    gblm = [name for name in ordered if name.startswith("gblm")]
    assert gblm == ["gblm unit=2:4", "gblm unit=head blocks=0:2", "gblm unit=weight blocks=1:2"]
    places = [ordered.index(name) for name in gblm]
    assert max(places) - min(places) == 2


def test_words_are_recipes():
    given = {"windows": 7, "calibration": None}
    words = ["gblm:norm=l2,alpha=10 unit=2:4", "criterion=taylor ratio=0.3 round-to=8 trust-remote-code=true"]
    first, second = (entry.recipe for entry in read_entries("smollm2", words, given))
    assert (first.criterion, first.unit, first.windows) == ("gblm:norm=l2,alpha=10.0,gradient_only=false", ("2:4",), 7)
    assert (second.criterion, second.ratio, second.round_to) == ("taylor:order=first", 0.3, 8)
    assert second.trust_remote_code
    with pytest.raises(RecipeError, match=r"--seed 1 and .* says 2"):
        read_entries("smollm2", ["wanda seed=1", "gblm seed=2"], {})
    assert {entry.recipe.seed for entry in read_entries("smollm2", ["wanda seed=1", "gblm"], {})} == {1}


def test_a_row_of_nothing():
    row = row_of("mine", [{"seed": 0, "attempts": 1, "failed": "it broke"}])
    assert row.flat()["n"] == 0
    assert row.mean("kl") is row.deviation("kl") is None
    assert row.failed == "it broke"


@pytest.mark.slow
def test_children_share_what_they_measure_and_go_on_after_a_kill(llama_folder, windows_file, held_out, tmp_path):
    words = [
        sys.executable,
        "-m",
        "secateur",
        "compare",
        str(llama_folder),
        "--recipes",
        "gblm unit=2:4",
        "gblm unit=weight",
    ]
    words += ["--calibration", str(windows_file), "--text", str(held_out), "--out", str(tmp_path / "out"), "--json"]
    source = str(Path(secateur.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if line.startswith("Planning gblm unit=weight"):
            break
    child = _only_child(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    for _ in range(100):
        if not _is_alive(child):
            break
        time.sleep(0.05)
    assert not _is_alive(child), "what it started dies with it"
    done = (tmp_path / "out" / "recipes" / "gblm_unit=2_4" / "result.json").read_text()
    second = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert second.returncode == 0, second.stderr
    rows = {row["recipe"]: row for row in json.loads(second.stdout)["rows"]}
    assert rows["gblm unit=weight"]["found_made"] == "gradients"
    assert rows["gblm unit=2:4"]["found_made"] == ""
    assert (rows["gblm unit=weight"]["resumed"], rows["gblm unit=2:4"]["resumed"]) == (True, False)
    assert json.loads(done)["planning"] == json.loads(second.stdout)["recipes"]["gblm unit=2:4"][0]["planning"]
    assert 1e8 < rows["gblm unit=2:4"]["peak_memory"] < 4e9
    assert 0 < rows["gblm unit=2:4"]["seconds"] < 120


def _only_child(parent: int) -> int:
    for _ in range(200):
        found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.05)
    raise AssertionError("it started nothing")


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
