"""Several processes on one run: the same plan as one makes, and a clean end when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_llama

from secateur.statistics import GradientAbs, GradientMean, InputNorm
from secateur.workers import Workers

RECIPES = {
    "taylor-channels": ["--criterion", "taylor", "--unit", "head,channel", "--ratio", "0.3"],
    "gblm-weights": ["--criterion", "gblm", "--unit", "weight", "--ratio", "0.5"],
    "wanda-2:4": ["--criterion", "wanda", "--unit", "2:4"],
    "magnitude-global": ["--criterion", "magnitude", "--unit", "weight", "--within", "global", "--ratio", "0.4"],
    "fms-forward": ["--criterion", "fms", "--unit", "channel", "--ratio", "0.3", "--queries", "2"],
    "influence": ["--criterion", "influence", "--unit", "block", "--ratio", "0.4"],
    "angular": ["--criterion", "angular", "--unit", "block", "--ratio", "0.4"],
    "dsnot": ["--criterion", "wanda", "--unit", "weight", "--removal", "dsnot:threshold=0"],
    "owl": ["--criterion", "wanda", "--unit", "weight", "--allocation", "owl:outlier=2"],
    "alpha-channels": ["--criterion", "magnitude", "--unit", "channel", "--ratio", "0.3", "--allocation", "alpha"],
    "sensitivity": ["--criterion", "wanda", "--unit", "2:4", "--allocation", "sensitivity"],
    "flap": ["--criterion", "flap", "--unit", "head,channel", "--ratio", "0.3"],
    "bias": ["--criterion", "wanda", "--unit", "channel,2:4", "--ratio", "0.25", "--removal", "bias"],
    "steps": ["--criterion", "taylor", "--unit", "channel", "--ratio", "0.4", "--steps", "2"],
}


def environment(cache: Path) -> dict[str, str]:
    here = Path(__file__).parents[2] / "src"
    return {**os.environ, "SECATEUR_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)}


def prune(folder: Path, out: Path, text: Path, words: list[str], workers: int) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []
    command = [sys.executable, *launch, "-m", "secateur", "prune", str(folder), "--out", str(out)]
    command += ["--calibration", str(text), *words]
    cache = out.parent / f"cache-{out.name}"
    return subprocess.Popen(command, env=environment(cache), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def test_windows_are_dealt_out_whole():
    for count, size in ((6, 2), (7, 3), (5, 5)):
        shares = [Workers(rank, size).share(count) for rank in range(size)]
        assert [index for share in shares for index in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_statistics_add_up_to_those_of_all_windows():
    parts = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    for kind in (InputNorm, GradientMean, GradientAbs):
        whole, halves = kind(), [kind(), kind()]
        for number, part in enumerate(parts):
            whole.update(part)
            halves[number % 2].update(part)
        summed = halves[0].as_sum() + halves[1].as_sum()
        halves[0].set_sum(summed, 6)
        assert torch.allclose(halves[0].mean(), whole.mean(), rtol=1e-6)
        assert halves[0].windows == 6


def numbers_in(part: object) -> list[float]:
    """All numbers of a JSON value, in order."""
    if isinstance(part, dict):
        return [number for key in sorted(part) for number in numbers_in(part[key])]
    if isinstance(part, list):
        return [number for item in part for number in numbers_in(item)]
    return [float(part)] if isinstance(part, (int, float)) else []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_workers_make_the_plan_of_one(recipe, save, windows_file, tmp_path):
    folder = save(tiny_llama())
    finish(prune(folder, tmp_path / "one", windows_file, RECIPES[recipe], 1))
    finish(prune(folder, tmp_path / "two", windows_file, RECIPES[recipe], 2))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    plans = [json.loads((tmp_path / name / "secateur" / "plan.json").read_text()) for name in ("one", "two")]
    scores = [[block.pop("scores", None) for block in plan["blocks"]] for plan in plans]
    assert plans[0]["blocks"] == plans[1]["blocks"]
    # Sums of gradients round by how the windows were dealt out; the choices above do not move.
    for one_block, two_block in zip(*scores, strict=True):
        assert numbers_in(one_block) == pytest.approx(numbers_in(two_block), rel=1e-6)
    record = json.loads((tmp_path / "two" / "secateur" / "run.json").read_text())
    assert record["settings"]["workers"] == 2
    assert not (tmp_path / "two" / "scratch").exists()


@pytest.mark.parametrize("unit", ["weight", "channel"])
def test_two_workers_update_weights_as_one_does(unit, save, windows_file, tmp_path):
    """Sums of products come in another order, so new numbers may differ in their last bits; what leaves does not."""
    words = ["--criterion", "wanda", "--unit", unit, "--ratio", "0.5", "--removal", "sparsegpt", "--propagate", "dense"]
    folder = save(tiny_llama())
    finish(prune(folder, tmp_path / "one", windows_file, words, 1))
    finish(prune(folder, tmp_path / "two", windows_file, words, 2))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].shape == two[name].shape
        assert torch.equal(one[name] == 0, two[name] == 0), name
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_it_goes_on(save, windows_file, tmp_path):
    folder, words = save(tiny_llama(num_hidden_layers=24)), RECIPES["gblm-weights"]
    finish(prune(folder, tmp_path / "one", windows_file, words, 1))
    process = prune(folder, tmp_path / "out", windows_file, words, 2)
    started = tmp_path / "out.partial" / "scratch"
    until = time.monotonic() + 120
    while not list(started.glob("*/*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(_worker(process.pid, 1), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Traceback" not in "".join(line for line in errors.splitlines() if "secateur/" in line)
    assert not (tmp_path / "out").exists()
    alone = prune(folder, tmp_path / "out", windows_file, words, 1)
    _, errors = alone.communicate(timeout=120)
    assert alone.returncode == 2
    assert "--other-workers" in errors
    assert "goes on" not in finish(prune(folder, tmp_path / "out", windows_file, words, 2))
    one, out = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "out"))
    assert all(torch.equal(one[name], out[name]) for name in one)


def _worker(launcher: int, rank: int) -> int:
    """The process of one worker, found by its environment."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "status").read_text()
            values = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"PPid:\t{launcher}\n" in status and f"RANK={rank}".encode() in values:
            return int(entry.name)
    raise AssertionError("there is no such worker")


@pytest.mark.parametrize(
    "words", [["evaluate"], ["evaluate", "--tasks", "boolq"], ["plan"], ["compare", "--recipes", "wanda", "--out", "c"]]
)
def test_what_one_process_does_is_refused_to_several(words, llama_folder, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = command(words[0], llama_folder, *words[1:])
    assert code == 2
    assert f"not of {words[0]}; start it without torchrun and accelerate launch" in said
