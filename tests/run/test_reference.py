"""The real model against the reference windows and the published code's results on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.calibration import text_windows
from secateur.checkpoint.reader import open_checkpoint
from secateur.evaluation import perplexity
from secateur.statistics import GradientAbs, GradientMean, GradientSquare
from secateur.sweep import Sweep, SweepSettings

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _all_cores() -> None:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def reference_perplexity(folder: Path, reference: Path) -> float:
    windows = text_windows(str(reference / "evaluation-tokens.safetensors"), folder)
    return perplexity(secateur.load(folder), windows).value


def test_dense_and_wanda_at_half(smollm2, reference, tmp_path):
    """README of the reference: dense 28.738, Wanda 50 % by row 61.763."""
    assert reference_perplexity(smollm2, reference) == pytest.approx(28.738, rel=2e-5)
    calibration = str(reference / "calibration-tokens.safetensors")
    secateur.prune(str(smollm2), tmp_path / "out", criterion="wanda", unit="weight", ratio=0.5, calibration=calibration)
    ours, dense = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", smollm2))
    for name, kept in load_file(reference / "wanda-50-block0.safetensors").items():
        same = (ours[name] != 0) == kept.bool()
        assert float((same | (dense[name] == 0)).float().mean()) >= 0.999, name
    assert reference_perplexity(tmp_path / "out", reference) == pytest.approx(61.763, rel=0.005)


def test_sparsegpt_at_half(smollm2, reference, tmp_path):
    calibration = str(reference / "calibration-tokens.safetensors")
    secateur.prune(
        str(smollm2), tmp_path / "out", criterion="sparsegpt", unit="weight", ratio=0.5, calibration=calibration
    )
    # The published code gave 50.205. Roundings that differ between machines flip near-ties, and masks of later blocks follow:
    # ours gave 50.51 on one machine and 50.79 on another.
    assert reference_perplexity(tmp_path / "out", reference) == pytest.approx(50.205, rel=0.02)


def test_streamed_gradients_equal_plain_backpropagation(smollm2, reference, tmp_path):
    ids_NT = load_file(reference / "calibration-tokens.safetensors")["input_ids"][:2]
    model = secateur.load(smollm2)
    plain: dict[str, list[torch.Tensor]] = {}
    for ids_T in ids_NT:
        model.zero_grad()
        model(input_ids=ids_T[None], labels=ids_T[None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if "proj" in name:
                plain.setdefault(name, []).append(parameter.grad.clone())
    needs = frozenset({GradientMean, GradientAbs, GradientSquare})
    for micro_batch in (1, 2):
        sweep = Sweep(open_checkpoint(str(smollm2)), ids_NT, SweepSettings(micro_batch, 0, tmp_path / "s"))
        seen = []

        def visit(index, block, statistics, seen=seen):
            for name, kinds in statistics.items():
                gradients = torch.stack(plain[f"model.layers.{index}.{name}"])
                for kind, expected in (
                    (GradientMean, gradients.mean(0)),
                    (GradientAbs, gradients.abs().mean(0)),
                    (GradientSquare, gradients.square().mean(0)),
                ):
                    worst = (kinds[kind].mean() - expected).abs().max() / expected.abs().max()
                    assert worst <= 1e-6, (index, name, kind)
            seen.append(index)

        sweep.dense(needs, range(30), visit)
        assert seen == list(reversed(range(30)))


def test_the_quick_demo(smollm2, tmp_path, capsys):
    from secateur.demo import run_demo

    run_demo(tmp_path / "demo", quick=True)
    out = capsys.readouterr().out
    for words in ("dense", "pruned", "recovered", "perplexity", "from_pretrained"):
        assert words in out
    assert (tmp_path / "demo" / "quick" / "recovered" / "model.safetensors").is_file()
