"""Whole runs beside the published algorithms: the masks and the units that leave are theirs."""

from __future__ import annotations

import pytest
import torch
from published_methods import (
    channel_scores,
    folded_gradients,
    gblm_metric,
    head_scores,
    lowest_of_groups,
    lowest_of_rows,
    prune_block_by_block,
    taylor_terms,
    wanda_metric,
    window_gradients,
)
from safetensors.torch import load_file
from tiny_models import tiny_llama

import secateur
from secateur.plans import load_plan

pytestmark = pytest.mark.usefixtures("same_process")


def kept_by_us(folder):
    return {name: tensor != 0 for name, tensor in load_file(folder / "model.safetensors").items()}


CASES = {
    "wanda": (dict(criterion="wanda", unit="weight", ratio=0.5), None, lowest_of_rows(0.5)),
    "wanda-70": (dict(criterion="wanda", unit="weight", ratio=0.7), None, lowest_of_rows(0.7)),
    "wanda-2:4": (dict(criterion="wanda", unit="2:4"), None, lowest_of_groups(2, 4)),
    "wanda-keep-1-of-4": (dict(criterion="wanda", unit="1:4"), None, lowest_of_groups(3, 4)),
    "gblm-l1": (dict(criterion="gblm", unit="weight", ratio=0.5), "l1", lowest_of_rows(0.5)),
    "gblm-l2": (dict(criterion="gblm:norm=l2", unit="weight", ratio=0.5), "l2", lowest_of_rows(0.5)),
    "gblm-4:8": (dict(criterion="gblm", unit="4:8"), "l1", lowest_of_groups(4, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_are_the_published_codes(case, llama_folder, windows_file, windows_NT, tmp_path):
    fields, norm, mask = CASES[case]
    model = tiny_llama()
    metric = wanda_metric if norm is None else gblm_metric(folded_gradients(model, windows_NT), norm)
    published = prune_block_by_block(model, windows_NT, metric, mask)
    secateur.prune(str(llama_folder), tmp_path / "out", calibration=str(windows_file), **fields)
    ours = kept_by_us(tmp_path / "out")
    different = sum(int((ours[name] != kept).sum()) for name, kept in published.items())
    total = sum(kept.numel() for kept in published.values())
    assert total == sum(w.numel() for n, w in ours.items() if "proj" in n)
    assert different <= 0.0005 * total


@pytest.mark.parametrize("order", ["vector", "first", "second", "mixed"])
def test_taylor_cuts_the_published_channels_and_heads(order, llama_folder, windows_file, windows_NT, tmp_path):
    model = tiny_llama()
    terms = taylor_terms(model, folded_gradients(model, windows_NT), len(windows_NT), order)
    plan = secateur.plan(
        str(llama_folder),
        unit="channel,head",
        ratio=0.25,
        criterion=f"taylor:order={order}",
        calibration=str(windows_file),
    )
    for entry in plan.blocks:
        channels = channel_scores(terms, entry.block, order)
        heads = head_scores(terms, entry.block, order, kv_heads=4, heads=8, width=8)
        expected = {"channel": channels.argsort()[:24], "head": heads.argsort()[:1]}
        assert {cut.kind: cut.removed for cut in entry.cuts} == {
            kind: sorted(units.tolist()) for kind, units in expected.items()
        }


def test_first_order_taylor_tracks_the_true_loss_change(windows_NT, llama_folder, windows_file, tmp_path):
    """Scaling a channel down by a little changes the loss by sum(w g) times that little (methods §14, acceptance)."""
    model = tiny_llama().double()
    gradients = window_gradients(model, windows_NT)
    mean = {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}

    def loss() -> float:
        with torch.no_grad():
            return sum(float(model(input_ids=w[None], labels=w[None]).loss) for w in windows_NT) / len(windows_NT)

    step = 2e-2  # float32 inside the norms drowns smaller ones
    mlp, names = model.model.layers[1].mlp, [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    weights = [mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7]]
    originals = [weight.detach().clone() for weight in weights]
    slices = [mean[names[0]][7], mean[names[1]][7], mean[names[2]][:, 7]]
    predicted = step * sum(float((w * g).sum()) for w, g in zip(originals, slices, strict=True))
    losses = {}
    for sign in (1, -1):
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original * (1 + sign * step))
        losses[sign] = loss()
    assert (losses[1] - losses[-1]) / 2 == pytest.approx(predicted, rel=2e-2)


def test_magnitude_by_layer_and_global(llama_folder, tmp_path):
    model = tiny_llama()
    weights = {n: p.detach().abs() for n, p in model.named_parameters() if "proj" in n}
    secateur.prune(str(llama_folder), tmp_path / "l", criterion="magnitude", unit="weight", within="layer", ratio=0.5)
    secateur.prune(str(llama_folder), tmp_path / "g", criterion="magnitude", unit="weight", within="global", ratio=0.37)
    by_layer, by_all = kept_by_us(tmp_path / "l"), kept_by_us(tmp_path / "g")
    everything = torch.cat([w.reshape(-1) for w in weights.values()])
    threshold = everything.sort().values[int(len(everything) * 0.37) - 1]
    for name, weight in weights.items():
        middle = weight.reshape(-1).sort().values[weight.numel() // 2 - 1]
        assert torch.equal(by_layer[name], weight > middle)
        assert torch.equal(by_all[name], weight > threshold)


def test_a_plan_saved_and_applied_gives_the_same_bytes(llama_folder, windows_file, tmp_path):
    fields = dict(unit="head,channel,2:4", criterion="wanda", ratio=0.25, calibration=str(windows_file))
    secateur.prune(str(llama_folder), tmp_path / "pruned", **fields)
    secateur.plan(str(llama_folder), tmp_path / "p.json", **fields)
    secateur.apply(tmp_path / "p.json", tmp_path / "applied")
    secateur.apply(tmp_path / "pruned", tmp_path / "again")
    weights = (tmp_path / "pruned" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "applied" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "again" / "model.safetensors").read_bytes()
    plan = (tmp_path / "pruned" / "secateur" / "plan.json").read_bytes()
    assert plan == (tmp_path / "p.json").read_bytes() == (tmp_path / "again" / "secateur" / "plan.json").read_bytes()
    assert load_plan(tmp_path / "p.json").removed_by_kind() == {"head": (3, 12), "channel": (72, 288)}


@pytest.mark.parametrize("unit", ["weight", "head,channel"])
@pytest.mark.parametrize("criterion", ["taylor:order=mixed", "gblm", "wanda", "random"])
def test_the_same_command_twice_is_byte_identical(unit, criterion, llama_folder, windows_file, tmp_path, monkeypatch):
    for run in "ab":
        monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / f"cache-{run}"))  # nothing is shared through the cache
        secateur.prune(
            str(llama_folder), tmp_path / run, unit=unit, ratio=0.5, criterion=criterion, calibration=str(windows_file)
        )
    files = ["model.safetensors", "config.json", "secateur/plan.json", "README.md"]
    for name in files + (["secateur/masks.safetensors"] if unit == "weight" else []):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_dense_scores_and_gradients_are_used_again(llama_folder, windows_file, tmp_path, caplog, monkeypatch):
    from secateur.sweep import Sweep

    sweeps = []
    for name in ("dense", "pruned"):
        original = getattr(Sweep, name)
        monkeypatch.setattr(
            Sweep, name, lambda self, *a, n=name, o=original, **k: (sweeps.append(n), o(self, *a, **k))[1]
        )
    fields = dict(unit="weight", calibration=str(windows_file))
    secateur.plan(str(llama_folder), criterion="taylor", ratio=0.3, **fields)
    other = secateur.plan(str(llama_folder), criterion="taylor", ratio=0.6, **fields)
    assert sweeps == ["dense"], "another ratio needs no new sweep"
    fresh = secateur.plan(str(llama_folder), criterion="taylor", ratio=0.6, seed=5, **fields)
    for entry in fresh.blocks:
        reused = other.masks(entry.block)
        assert all(torch.equal(reused[name], mask) for name, mask in fresh.masks(entry.block).items())
    sweeps.clear()
    secateur.plan(str(llama_folder), criterion="gblm", ratio=0.3, **fields)
    secateur.plan(str(llama_folder), criterion="gblm", ratio=0.6, **fields)
    assert sweeps == ["dense", "pruned", "pruned"], "gradients are reused, the forward sweep is not"


@pytest.mark.parametrize("criterion", ["random", "magnitude", "wanda", "gblm", "taylor", "taylor:order=vector"])
@pytest.mark.parametrize("unit", ["weight", "1:3", "head", "query", "channel", "head,channel,4:8"])
@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_any_criterion_works_with_any_unit(criterion, unit, propagate, save, windows_file, tmp_path):
    folder = save(tiny_llama(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2))
    fields = dict(criterion=criterion, unit=unit, propagate=propagate, ratio=0.5, calibration=str(windows_file))
    if ":" in unit and unit != "head,channel,4:8":
        fields.pop("ratio")
    plan = secateur.plan(str(folder), **fields)
    kinds = {"head": (2, 6), "query": (6, 18), "channel": (96, 192)}
    assert plan.removed_by_kind() == {kind: kinds[kind] for kind in unit.split(",") if kind in kinds}
    zeros, masked = plan.zeros()
    share = {"weight": 0.5, "1:3": 2 / 3, "head,channel,4:8": 0.5}.get(unit, 0)
    assert zeros == pytest.approx(share * masked)
