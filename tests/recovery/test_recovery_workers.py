"""Recovery by several processes: the steps of one, a death that is gone on from, and what cannot be shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resumable import different
from safetensors.torch import load_file, save_file

import secateur
from secateur.errors import RecipeError
from secateur.recovery import RecoverySettings
from secateur.recovery.settings import schedule
from secateur.workers import SHARDING, USE_FSDP

pytestmark = pytest.mark.usefixtures("same_process")

Launcher = Callable[[int], list[str]]
SOURCES = str(Path(__file__).parents[2] / "src")


@pytest.fixture
def sparse(llama_folder: Path, windows_file: Path, tmp_path: Path) -> Path:
    secateur.prune(str(llama_folder), tmp_path / "sparse", criterion="wanda", unit="2:4", calibration=str(windows_file))
    return tmp_path / "sparse"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    start_N1 = torch.randint(0, 128, (40, 1), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": (start_N1 + 3 * torch.arange(24)) % 128}, tmp_path / "text.safetensors")
    return tmp_path / "text.safetensors"


OFTEN = """
from secateur.recovery import checkpoints
checkpoints.LEAST_SECONDS, checkpoints.SHARE = 0.0, 0  # after every step
from secateur.cli import main
main()
"""


def torchrun(workers: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []


def fsdp(workers: int) -> list[str]:
    options = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", str(workers), "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", *options]


def recover(
    folder: Path, out: Path, text: Path, words: list[str], workers: int, launcher: Launcher = torchrun
) -> subprocess.Popen:
    script = out.parent / "often.py"
    script.write_text(OFTEN)
    command = [sys.executable, *launcher(workers), str(script), "recover", str(folder), "--out", str(out)]
    words = ["--data", str(text), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCES}
    return subprocess.Popen(
        [*command, *words], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def kill_all_that_write(out: Path) -> None:
    """torchrun and its workers, which have sessions of their own."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(f"--out\0{out}\0") in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended by itself


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def training(folder: Path) -> dict:
    return json.loads((folder / "secateur" / "run.json").read_text())["training"]


SETTINGS = ["--steps", "6", "--batch-size", "4", "--micro-batch", "2", "--held-out", "4"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "spp", "distill"])
def test_two_workers_take_the_steps_of_one(method, sparse, text, tmp_path):
    words = [*SETTINGS, "--method", method, "--learning-rate", "1e-3"]
    # Dropout is drawn anew for every window, and each worker sees other ones.
    words += [] if method == "full" else ["--dropout", "0"]
    for workers in (1, 2):
        finish(recover(sparse, tmp_path / str(workers), text, words, workers))
    one, two = (training(tmp_path / str(workers)) for workers in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert [loss for _, loss in two["looks"]] == pytest.approx([loss for _, loss in one["looks"]], rel=1e-4)
    dense, *tuned = (load_file(folder / "model.safetensors") for folder in (sparse, tmp_path / "1", tmp_path / "2"))
    moved = max((tuned[0][name] - weight).abs().max() for name, weight in dense.items())
    for name, weight in tuned[0].items():
        assert (weight - tuned[1][name]).abs().max() <= 0.02 * moved
        assert torch.equal(weight == 0, tuned[1][name] == 0)


@pytest.mark.slow
def test_sharing_out_weights_is_a_launch_command_away(sparse, text, tmp_path):
    """The very command of the walkthrough; on a CPU accelerate starts it as on GPUs."""
    words = [*SETTINGS, "--method", "full", "--learning-rate", "1e-3", "--data", str(text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": SOURCES}
    for name, launch in {"plain": [], "1": fsdp(1), "2": fsdp(2)}.items():
        command = [sys.executable, *launch, "-m", "secateur", "recover", str(sparse), "--out", str(tmp_path / name)]
        subprocess.run([*command, *words], env=environment, check=True, timeout=300)
    assert different(tmp_path / "plain", tmp_path / "1") == []
    one, two = (training(tmp_path / name) for name in ("1", "2"))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)
        assert torch.equal(two[name] == 0, weight == 0)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, fsdp])
def test_two_workers_that_die_go_on_to_the_same_bytes(launcher, sparse, text, tmp_path):
    words = ["--steps", "60", "--batch-size", "4", "--micro-batch", "2", "--held-out", "4"]
    finish(recover(sparse, tmp_path / "whole", text, words, 2, launcher))
    died = recover(sparse, tmp_path / "out", text, words, 2, launcher)
    until = time.monotonic() + 120
    while not list((tmp_path / "out.partial").rglob("checkpoint-1?")) and time.monotonic() < until:
        time.sleep(0.02)
    kill_all_that_write(tmp_path / "out")
    died.wait(timeout=60)
    again = recover(sparse, tmp_path / "out", text, words, 1)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 2
    assert ("2 workers" if launcher is torchrun else "weights that are shared out") in said
    assert "other-workers" not in said
    finish(recover(sparse, tmp_path / "out", text, words, 2, launcher))
    assert different(tmp_path / "whole", tmp_path / "out") == []


@pytest.mark.parametrize("word", ["recover", "prune"])
@pytest.mark.parametrize(("name", "called"), SHARDING.items())
def test_what_cannot_be_shared_out_is_refused(name, called, word, llama_folder, tmp_path, monkeypatch, command):
    if (word, name) == ("recover", USE_FSDP):
        pytest.skip("that it can")
    monkeypatch.setenv(name, "true")
    code, _, said = command(word, llama_folder, "--out", tmp_path / "out")
    assert code == 2
    assert f"{called} shares out the weights" in said
    assert not list(tmp_path.glob("out*"))


def test_a_step_is_shared_in_whole_micro_batches():
    settings = RecoverySettings(batch_size=16, micro_batch=4)
    assert schedule(settings, 400, 2) == schedule(settings, 400)
    three = schedule(settings, 400, 3)
    assert three.accumulation % 3 == 0
    assert three.batch_size <= 16
    with pytest.raises(RecipeError, match="8 workers cannot share a step of 4 windows"):
        schedule(RecoverySettings(batch_size=4), 400, 8)
