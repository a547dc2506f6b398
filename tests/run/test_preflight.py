"""What a run will take is said before it begins, and what cannot fit is refused with what would help."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama

import secateur
from secateur import preflight, stepping
from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import ResourceError
from secateur.gathering import Workplace
from secateur.memory import memory_now, peak_of
from secateur.planning import Planner
from secateur.preflight import Preflight, limit_of
from secateur.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("same_process")


def planner(folder, windows_file, tmp_path, **fields) -> Planner:
    recipe = recipe_from(model=str(folder), calibration=str(windows_file), **fields)
    return Planner(open_checkpoint(str(folder)), recipe, Workplace(tmp_path / "scratch", None))


def test_it_is_said_and_recorded(llama_folder, windows_file, tmp_path, command):
    code, _, said = command("prune", llama_folder, "--out", tmp_path / "o", "--calibration", windows_file)
    assert code == 0
    assert "This will take about" in said
    events = [json.loads(line) for line in (tmp_path / "o" / "secateur" / "log.jsonl").read_text().splitlines()]
    (estimate,) = [event for event in events if event.get("event") == "preflight"]
    assert estimate["output"] == sum(t.bytes for t in open_checkpoint(str(llama_folder)).tensors.values())
    assert estimate["memory"] > 0
    assert estimate["seconds"] > 0


@pytest.mark.parametrize("command_name", ["plan", "prune"])
def test_too_little_memory_is_refused_and_leaves_nothing(llama_folder, windows_file, tmp_path, command, command_name):
    out = tmp_path / ("p.json" if command_name == "plan" else "o")
    words = ("--out", out, "--calibration", windows_file)
    code, _, said = command(command_name, llama_folder, *words, "--memory", "64MiB")
    assert code == 2
    assert "more than --memory 64MiB; give --memory" in said
    assert "GiB" in said
    assert not out.exists()
    assert not (tmp_path / "o.partial").exists()


def test_less_is_needed_by_what_needs_less(llama_folder, windows_file, tmp_path):
    """A block's gradient statistics are as large as its weights; norms of inputs are not."""
    model = tiny_llama(
        hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_key_value_heads=8, head_dim=64
    )
    folder = tmp_path / "wide"
    model.save_pretrained(folder)
    needed = {}
    for criterion in ("taylor:order=mixed", "taylor", "wanda"):
        found = planner(folder, windows_file, tmp_path, criterion=criterion, unit="channel", ratio=0.3).estimate(None)
        needed[criterion] = found.memory - memory_now()
    assert needed["taylor:order=mixed"] > needed["taylor"] > needed["wanda"]


def test_disk_is_counted_where_it_is_used(llama_folder, windows_file, tmp_path, monkeypatch):
    fields = {"criterion": "gblm", "unit": "weight", "ratio": 0.5}
    made = planner(llama_folder, windows_file, tmp_path, **fields)
    estimate = made.estimate(tmp_path / "o")
    weights = sum(made.checkpoint.skeleton.prunable(0)[name].shape(made.checkpoint.skeleton.block_shapes(0))[0]
                  * made.checkpoint.skeleton.prunable(0)[name].shape(made.checkpoint.skeleton.block_shapes(0))[1]
                  for name in made.checkpoint.skeleton.prunable(0))  # fmt: skip
    assert estimate.cache == 2 * 3 * weights, "gradients of pruned propagation wait on disk in 16 bits"
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(ResourceError, match=r"on the disk of .* which has 1000 B free .* for the result"):
        preflight.refuse_what_cannot_fit(estimate, made.recipe, tmp_path, tmp_path, tmp_path)


def test_the_limit_is_what_is_free_or_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(preflight, "memory_available", lambda: 1000)
    monkeypatch.setattr(preflight, "memory_now", lambda: 50)
    assert limit_of(recipe_from(model="x")) == 900
    assert limit_of(recipe_from(model="x"), workers=2) == 475
    assert limit_of(recipe_from(model="x", memory="4GiB")) == 4 << 30


def test_the_peak_is_seen(tmp_path):
    def work():
        held = torch.ones(32 << 20)
        held.add_(1)

    assert 100 << 20 <= peak_of(work) <= 300 << 20


def test_memory_changes_no_bit_and_is_spilled_to_disk(llama_folder, windows_file, tmp_path, monkeypatch):
    """Everything on disk between blocks, or everything in memory."""
    given = []
    for name, spare in (("none", 0), ("all", 1 << 30)):
        monkeypatch.setattr(preflight.Estimate, "spare", property(lambda self, spare=spare: spare))
        monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / f"cache-{name}"))
        secateur.prune(str(llama_folder), tmp_path / name, calibration=str(windows_file), criterion="gblm", unit="2:4")
        given.append((tmp_path / name / "model.safetensors").read_bytes())
    assert given[0] == given[1]


def test_a_micro_batch_too_large_for_the_device_is_halved_before_anything_is_fixed(
    llama_folder, windows_file, tmp_path, monkeypatch, command
):
    probe = Preflight._probe

    def small_device(self, micro_batch):
        if micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return probe(self, micro_batch)

    monkeypatch.setattr(Preflight, "_probe", small_device)
    monkeypatch.setattr(preflight.torch.cuda, "empty_cache", lambda: None)
    words = ("--calibration", windows_file, "--criterion", "wanda", "--unit", "weight")
    code, _, said = command("prune", llama_folder, "--out", tmp_path / "a", *words, "--micro-batch", 6)
    assert code == 0
    assert "the micro-batch is now 3" in said
    assert "the micro-batch is now 1" in said
    monkeypatch.undo()
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "other"))
    code, _, _ = command("prune", llama_folder, "--out", tmp_path / "b", *words, "--micro-batch", 1)
    one, _ = (json.loads((tmp_path / name / "secateur" / "run.json").read_text()) for name in "ab")
    assert one["settings"]["micro_batch"] == 1
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_device_that_is_not_there(llama_folder, windows_file, tmp_path, command):
    code, _, said = command(
        "prune", llama_folder, "--out", tmp_path / "o", "--calibration", windows_file, "--device", "cuda:7"
    )
    assert code == 2
    assert "--device cuda:7 is not on this machine" in said
    assert not (tmp_path / "o.partial").exists()


def test_masks_decided_on_the_way_are_those_of_kept_scores(llama_folder, windows_file, tmp_path, monkeypatch):
    """Backwards or forwards, with nothing kept but the masks."""
    from secateur import planning

    for number, criterion in enumerate(("taylor", "wanda", "magnitude")):
        given = []
        for limit in (1 << 40, -1):
            monkeypatch.setattr(planning, "KEPT_SCORES", limit)
            out = tmp_path / f"{number}-{limit}"
            monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / f"cache-{number}-{limit}"))
            fields = {"criterion": criterion, "unit": "weight", "ratio": 0.4, "propagate": "dense"}
            secateur.prune(str(llama_folder), out, calibration=str(windows_file), **fields)
            given.append((out / "model.safetensors").read_bytes())
            kept = list((tmp_path / f"cache-{number}-{limit}" / "scores").rglob("*.safetensors"))
            assert bool(kept) == (limit > 0 and criterion != "magnitude")
        assert given[0] == given[1]


def test_preparing_happens_once(llama_folder, windows_file, tmp_path, monkeypatch):
    seen = []
    original = stepping.prepare
    monkeypatch.setattr(stepping, "prepare", lambda *a: (seen.append(1), original(*a)))
    secateur.prune(str(llama_folder), tmp_path / "o", calibration=str(windows_file), unit="channel", ratio=0.4, steps=2)
    assert seen == [1]


def test_an_allocation_that_is_measured_is_counted(tmp_path, save, windows_file):
    """Even where the criterion itself reads no text."""

    def estimate(allocation):
        fields = {
            "criterion": "magnitude",
            "unit": "weight",
            "calibration": str(windows_file),
            "allocation": allocation,
        }
        recipe = recipe_from(model=str(folder), memory="100MiB", **fields)
        planner = Planner(open_checkpoint(str(folder)), recipe, Workplace(tmp_path / "scratch", None))
        return planner.estimate(None)

    folder = save(tiny_llama(num_hidden_layers=6))
    plain, measured = estimate("uniform"), estimate("sensitivity:windows=4")
    assert measured.scratch + measured.kept > plain.scratch + plain.kept
    assert measured.seconds > plain.seconds


def test_a_removals_own_time_is_counted(llama_folder, windows_file, tmp_path, monkeypatch):
    """What it is asked to do, in operations as long as those of a product, which is timed."""
    probe = Preflight._probe

    def operations_alone(self, micro_batch):
        found = probe(self, micro_batch)
        assert (found.operation > 0) == (self.removal.operations(8, 8) > 0)
        found.read = found.forward = found.both = found.scored = 0.0
        found.operation = 1e-9  # what was timed differs from one time to the next
        return found

    monkeypatch.setattr(Preflight, "_probe", operations_alone)
    seconds = []
    for removal in ("mask", "sparsegpt", "alps:steps=12,fit_steps=4", "alps:steps=24,fit_steps=8"):
        fields = {"criterion": "sparsegpt", "unit": "weight", "ratio": 0.5, "removal": removal}
        seconds.append(planner(llama_folder, windows_file, tmp_path, **fields).estimate(None).seconds)
    assert seconds[0] == 0 < seconds[1] < seconds[2] < seconds[3]
