"""Blocks in bfloat16, as on a GPU: what crosses between them is bfloat16, what is measured is float32."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import tiny
from tiny_models import tiny_llama

import secateur
from secateur.checkpoint.placement import HERE, Placement, placement_for
from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import ResourceError
from secateur.statistics import GradientAbs, GradientMean, InputNorm
from secateur.sweep import Sweep, SweepSettings

BF16 = Placement(dtype=torch.bfloat16)
KINDS = frozenset({GradientMean, GradientAbs, InputNorm})


def gather(folder, ids_NT, scratch, placement, **more):
    found = {}

    def visit(index, block, statistics):
        for name, kinds in statistics.items():
            found[index, name] = kinds

    settings = SweepSettings(2, 0, scratch, placement, **more)
    Sweep(open_checkpoint(str(folder)), ids_NT, settings).dense(KINDS, range(2), visit)
    return found


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
@pytest.mark.parametrize("gradient", ["exact", "block"])
def test_bfloat16_measures_nearly_the_same(family, gradient, save, tmp_path):
    folder = save(tiny(family))
    ids_NT = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    whole = gather(folder, ids_NT, tmp_path / "a", HERE, gradient=gradient)
    coarse = gather(folder, ids_NT, tmp_path / "b", BF16, gradient=gradient)
    assert whole.keys() == coarse.keys()
    for key, kinds in coarse.items():
        for kind, statistic in kinds.items():
            assert statistic.total.dtype == torch.float32, (key, kind)
            expected = whole[key][kind].mean().flatten()
            similarity = torch.nn.functional.cosine_similarity(statistic.mean().flatten(), expected, dim=0)
            assert similarity > 0.95 or expected.norm() < 1e-6, (key, kind)


def test_a_whole_run_in_bfloat16(save, windows_file, tmp_path, monkeypatch, same_process):
    from secateur import run

    folder = save(tiny_llama().to(torch.bfloat16))
    monkeypatch.setattr(run, "placement_for", lambda device, stored: BF16)
    for number, fields in enumerate(
        (
            {"criterion": "gblm", "unit": "2:4"},
            {"criterion": "fms", "unit": "channel", "ratio": 0.3, "queries": 2},
            {"criterion": "wanda", "unit": "2:4", "reconstruct": "block:epochs=2"},
        )
    ):
        result = secateur.prune(str(folder), tmp_path / str(number), calibration=str(windows_file), **fields)
        assert result.record["settings"]["device"] == "cpu, bfloat16"


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_blocks_in_bfloat16_are_fitted_nearly_as_well(family, save, tmp_path, monkeypatch, same_process):
    from secateur import run
    from secateur.plans import load_plan

    folder = save(tiny(family).to(torch.bfloat16))
    windows = tmp_path / "windows.safetensors"
    save_file({"input_ids": torch.randint(3, 60, (6, 16), generator=torch.Generator().manual_seed(0))}, windows)
    fields = {"criterion": "wanda", "unit": "2:4", "reconstruct": "block:held_out=0", "calibration": str(windows)}
    after = {}
    for placement in (HERE, BF16):
        monkeypatch.setattr(run, "placement_for", lambda device, stored, placement=placement: placement)
        secateur.plan(str(folder), out=tmp_path / "p.json", overwrite=True, **fields)
        errors = load_plan(tmp_path / "p.json").fit_errors()
        after[placement] = errors["error_after"]
        assert errors["error_after"] < errors["error_before"]
    assert after[BF16] == pytest.approx(after[HERE], rel=0.2)


def test_which_numbers_where(monkeypatch):
    assert placement_for("auto", torch.bfloat16) == HERE
    assert placement_for("cpu", torch.float16) == HERE
    with pytest.raises(ResourceError, match="no GPU that torch can use"):
        placement_for("cuda", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert placement_for("auto", torch.bfloat16) == Placement(torch.device("cuda", 1), torch.bfloat16)
    assert placement_for("cuda:0", torch.float32) == Placement(torch.device("cuda", 0), torch.float32)
    with pytest.raises(ResourceError, match="cuda:0 to cuda:1"):
        placement_for("cuda:2", torch.float16)
