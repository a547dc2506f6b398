"""Second moments of too few tokens: said loudly, dampened, and what was raised is reported; and what is refused before measuring."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import secateur
from secateur import gathering
from secateur.errors import RecipeError
from secateur.plans import load_plan


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--criterion", "sparsegpt", "--unit", "weight"], "sparsegpt"),
        (["--criterion", "wanda", "--unit", "2:4", "--removal", "alps:steps=3"], "alps"),
        (["--criterion", "magnitude", "--unit", "channel", "--removal", "sparsegpt"], "sparsegpt"),
    ],
)
def test_too_little_text_to_fit_weights_is_said_once_and_first(words, named, llama_folder, command, tmp_path):
    for tokens, said in ((95, 1), (96, 0)):
        file = tmp_path / f"{tokens}.safetensors"
        save_file({"input_ids": torch.arange(tokens)[None] % 60}, file)
        code, _, err = command(
            "plan", llama_folder, "--out", tmp_path / f"{tokens}.json", "--calibration", file, *words
        )
        assert code == 0, err
        lines = [line for line in err.splitlines() if line.startswith("TOO LITTLE TEXT")]
        assert len(lines) == said
        if said:
            assert lines[0].startswith(
                f"TOO LITTLE TEXT: {named} has 95 calibration tokens for matrices of up to 96 inputs"
            )
            assert "give at least 96 tokens with --windows" in lines[0]
            assert err.index(lines[0]) < err.index("This will take")


def test_what_fits_nothing_needs_no_more_text(llama_folder, command, tmp_path):
    save_file({"input_ids": torch.tensor([[3, 5]])}, tmp_path / "w.safetensors")
    words = ["--unit", "weight", "--calibration", tmp_path / "w.safetensors", "--removal", "dsnot"]
    code, _, err = command("plan", llama_folder, "--out", tmp_path / "p.json", "--criterion", "wanda", *words)
    assert code == 0, err
    assert "TOO LITTLE TEXT" not in err


@pytest.mark.parametrize("unit", ["weight", "channel", "channel,weight"])
def test_raised_dampening_is_reported(unit, llama_folder, command, tmp_path):
    """Two tokens, and a dampening that float64 cannot tell from none."""
    save_file({"input_ids": torch.tensor([[3, 5]])}, tmp_path / "w.safetensors")
    plan = tmp_path / "p.json"
    words = ["--unit", unit, "--calibration", tmp_path / "w.safetensors", "--removal", "sparsegpt:dampening=1e-30"]
    code, _, err = command("plan", llama_folder, "--out", plan, "--criterion", "wanda", *words)
    assert code == 0, err
    raised = load_plan(plan).notes["removal"]["dampening"]
    assert 1e-30 < raised < 1e-2
    assert "mlp.down_proj.weight: dampening" in err
    assert all(entry.updated for entry in load_plan(plan).blocks), "fitted all the same"


def test_a_pattern_that_does_not_divide_is_refused_before_a_policy_measures(llama_folder, windows_file, monkeypatch):
    monkeypatch.setattr(gathering, "allocation_figures", lambda *_: pytest.fail("measured"))
    with pytest.raises(RecipeError, match="1:96 needs widths that 96 divides"):
        secateur.plan(
            str(llama_folder), criterion="wanda", unit="1:96", allocation="sensitivity", calibration=str(windows_file)
        )
