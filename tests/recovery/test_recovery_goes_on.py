"""Recoveries that die, diverge or stop getting better."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from resumable import different
from tiny_models import tiny_llama as larger_llama
from tiny_recovery import learnable_windows, mask_half, same_bits, tiny_llama, weights

import secateur
from secateur.errors import SecateurError
from secateur.recovery import RecoverySettings, Teacher, checkpoints, recover_model, training
from secateur.recovery.training import gave_up


class Died(BaseException):
    """Stands in for ``kill -9``: nothing of ours catches it by name."""


METHODS = {
    "lora": {"method": "lora", "learning_rate": 1e-2},
    "full": {"method": "full", "weight_decay": 0.01, "learning_rate": 1e-2},
    "spp": {"method": "spp", "learning_rate": 5e-2},
    "distill": {"method": "distill:hidden=1", "learning_rate": 1e-2},
}


def teacher_of(name: str) -> Teacher | None:
    return Teacher(tiny_llama()) if name == "distill" else None


@pytest.fixture
def always(monkeypatch):
    """A checkpoint after every step, however little it saves; not waiting for the disk, as no power is lost here."""
    for name in ("recovery.checkpoints.sync_tree", "recovery.checkpoints.sync", "files.sync", "run.sync_tree"):
        monkeypatch.setattr(f"secateur.{name}", lambda path: None)
    monkeypatch.setattr(checkpoints, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", 0)


def dies_at(step: int):
    def on_step(done: int, steps: int, loss: float) -> None:
        if done == step:
            raise Died

    return on_step


@pytest.mark.parametrize("name", METHODS)
def test_killed_anywhere_it_ends_with_the_same_bits_and_the_same_curve(name, always, tmp_path):
    settings = RecoverySettings(steps=6, batch_size=4, micro_batch=2, warmup=1, held_out=4, **METHODS[name])
    straight = tiny_llama(torch.bfloat16)
    masks = mask_half(straight)
    wanted = recover_model(straight, learnable_windows(), settings, masks, teacher=teacher_of(name))
    step = random.Random(name).randint(2, 5)
    model = tiny_llama(torch.bfloat16)
    mask_half(model)
    steps: list[int] = []
    with pytest.raises(Died):
        recover_model(
            model, learnable_windows(), settings, masks, dies_at(step), tmp_path / str(step), teacher_of(name)
        )
    found = recover_model(
        model, learnable_windows(), settings, masks, lambda done, *_, s=steps: s.append(done), tmp_path / str(step),
        teacher_of(name),
    )  # fmt: skip
    assert steps == list(range(step, 7)), "the step whose checkpoint was not yet written is taken again, no other"
    assert found == wanted
    assert all(same_bits(tensor, weights(straight)[n]) for n, tensor in weights(model).items())


@pytest.mark.parametrize(
    "file", ["trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_damaged_checkpoint_costs_time_alone(file, damage, always, tmp_path, caplog):
    settings = RecoverySettings(steps=4, batch_size=4, micro_batch=2, held_out=4, **METHODS["lora"])
    straight, model = tiny_llama(), tiny_llama()
    wanted = recover_model(straight, learnable_windows(), settings)
    with pytest.raises(Died):
        recover_model(model, learnable_windows(), settings, None, dies_at(3), tmp_path / "t")
    (place,) = (tmp_path / "t").glob("checkpoint-*")
    if damage == "gone":
        (place / file).unlink()
    else:
        (place / file).write_bytes((place / file).read_bytes()[: (place / file).stat().st_size // 2])
    fresh, steps = tiny_llama(), []
    found = recover_model(
        fresh, learnable_windows(), settings, None, lambda done, *_: steps.append(done), tmp_path / "t"
    )
    assert found == wanted
    assert steps == [1, 2, 3, 4]
    assert all(same_bits(tensor, weights(straight)[n]) for n, tensor in weights(fresh).items())
    assert "is damaged" in caplog.text


def test_a_damaged_best_state_is_said(tmp_path):
    file = tmp_path / "best.safetensors"
    checkpoints.write_state(file, {"a": torch.ones(3)})
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(SecateurError, match=r"best.safetensors.*is damaged.*--overwrite"):
        checkpoints.read_state(file)


def test_one_killed_after_its_last_checkpoint_trains_no_more(always, tmp_path):
    settings = RecoverySettings(steps=3, batch_size=4, held_out=4, learning_rate=1e-2)
    first, again, steps = tiny_llama(), tiny_llama(), []
    wanted = recover_model(first, learnable_windows(), settings, folder=tmp_path)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["best.safetensors", "checkpoint-3"]
    found = recover_model(again, learnable_windows(), settings, on_step=lambda *_: steps.append(1), folder=tmp_path)
    assert (found, steps) == (wanted, [])
    assert all(same_bits(tensor, weights(first)[name]) for name, tensor in weights(again).items())


def test_nothing_in_a_checkpoint_is_unpickled(always, tmp_path, monkeypatch):
    real, calls = torch.load, []

    def safe(*arguments, **options):
        calls.append(options.get("weights_only"))
        return real(*arguments, **options)

    settings = RecoverySettings(steps=3, batch_size=4, held_out=4)
    with pytest.raises(Died):
        recover_model(tiny_llama(), learnable_windows(), settings, None, dies_at(2), tmp_path)
    monkeypatch.setattr(torch, "load", safe)
    recover_model(tiny_llama(), learnable_windows(), settings, None, None, tmp_path)
    assert calls
    assert set(calls) == {True}


def test_the_command_killed_for_good_goes_on_to_the_same_files(tmp_path, save, same_process, always, monkeypatch):
    model = larger_llama()
    mask_half(model)
    folder, tokens = save(model), tmp_path / "tokens.safetensors"
    from safetensors.torch import save_file

    save_file({"input_ids": learnable_windows(24)}, tokens)
    fields = dict(data=str(tokens), steps=6, batch_size=2, held_out=4, **METHODS["full"])
    secateur.recover(folder, tmp_path / "straight", **fields)
    child = os.fork()
    if child == 0:
        try:
            real = training._StudentTrainer._save_checkpoint

            def dies_in_a_checkpoint(self, *arguments):
                if self.state.global_step == 4:
                    Path(self.folder / ".checkpoint.half_one").mkdir()
                    os.kill(os.getpid(), signal.SIGKILL)
                real(self, *arguments)

            training._StudentTrainer._save_checkpoint = dies_in_a_checkpoint
            secateur.recover(folder, tmp_path / "out", **fields)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    result = secateur.recover(folder, tmp_path / "out", **fields)
    assert len(result.record["attempts"]) == 2
    assert different(tmp_path / "straight", tmp_path / "out") == []
    assert not list((tmp_path / "out").rglob("*checkpoint*"))
    steps = [json.loads(line) for line in (tmp_path / "out" / "secateur" / "log.jsonl").read_text().splitlines()]
    assert any("Going on after step 3 of 6" in str(line) for line in steps)


def nan_at(step: int, monkeypatch) -> None:
    real = training._StudentTrainer.compute_loss

    def breaks(self, model, inputs, *arguments, **options):
        loss = real(self, model, inputs, *arguments, **options)
        return loss * float("nan") if self.state.global_step + 1 == step else loss

    monkeypatch.setattr(training._StudentTrainer, "compute_loss", breaks)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "distill"])  # whose looks are of another loss
def test_nan_ends_training_and_the_last_good_state_is_kept_and_said(name, monkeypatch, caplog):
    settings = RecoverySettings(steps=20, batch_size=4, held_out=4, warmup=1, **METHODS[name])
    kept: dict[str, torch.Tensor] = {}
    real = training.write_state
    monkeypatch.setattr(training, "write_state", lambda file, state: (kept.update(
        {name: tensor.clone() for name, tensor in state.items()}), real(file, state)))  # fmt: skip
    nan_at(13, monkeypatch)
    model = tiny_llama()
    masks = mask_half(model)
    monkeypatch.setattr("secateur.console.log.propagate", True)
    done = recover_model(model, learnable_windows(), settings, masks)
    assert done.stopped == "the loss became nan in recovery step 13"
    assert done.kept_step == min(done.looks[1:], key=lambda look: look[1])[0] <= 12
    assert done.held_out_after == pytest.approx(min(loss for _, loss in done.looks), abs=1e-4)
    assert len(done.losses) == 12
    assert f"the state of step {done.kept_step} is kept" in caplog.text
    if name == "full":
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, kept["model.model.layers.0.mlp.up_proj.weight"])


def test_nan_before_anything_was_gained_is_an_error(monkeypatch):
    nan_at(1, monkeypatch)
    model = tiny_llama()
    before = weights(model)
    with pytest.raises(SecateurError, match="nan in recovery step 1 of 4, so the model is left as it was"):
        recover_model(model, learnable_windows(), RecoverySettings(steps=4, batch_size=4, held_out=4))
    assert all(same_bits(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize("dies", [False, True])
def test_patience_ends_training_with_the_best_state(dies, always, tmp_path):
    """Windows to train on that have nothing to do with those held out: the more is learnt, the worse."""
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 128, (12, 16), generator=generator)
    settings = RecoverySettings(
        method="full", steps=60, batch_size=8, held_out=4, warmup=1, learning_rate=1e-2, patience=2
    )
    model = tiny_llama()
    if dies:
        with pytest.raises(Died):
            recover_model(model, windows, settings, None, dies_at(12), tmp_path)
    done = recover_model(model, windows, settings, folder=tmp_path)
    assert done.stopped == "no better on held-out windows in 2 looks"
    assert len(done.losses) == done.looks[-1][0] < 60
    best = min(done.looks[1:], key=lambda look: look[1])
    assert done.kept_step == best[0] == done.looks[-3][0] or done.kept_step == done.looks[1][0]
    assert done.held_out_after == pytest.approx(best[1], abs=1e-5)
    again = tiny_llama()
    assert recover_model(again, windows, settings, folder=tmp_path) == done  # killed after its last step
    assert all(same_bits(tensor, weights(model)[name]) for name, tensor in weights(again).items())


def test_when_patience_ends():
    def looks(*losses: float) -> list[tuple[int, float]]:
        return list(enumerate(losses))

    assert not gave_up(looks(5, 6, 7, 8), None)
    assert not gave_up(looks(5, 6), 2)
    assert gave_up(looks(5, 6, 7), 2)
    assert not gave_up(looks(5, 4, 6), 2)
    assert gave_up(looks(5, 4, 6, 4), 2)
    assert not gave_up(looks(5, 4, 6, 3.9), 2)


def test_patience_is_a_number_of_looks(command, llama_folder, windows_file, tmp_path):
    words = ["recover", llama_folder, "--out", tmp_path / "out", "--data", windows_file, "--patience", "0"]
    code, _, err = command(*words)
    assert (code, "--patience cannot be 0" in err, "Traceback" in err) == (2, True, False)
    assert not list(tmp_path.glob("out*"))
    assert sys.exc_info() == (None, None, None)
