"""Block-local gradients beside plain autograd of ||block(x)||_2, one window after the other (Wanda++, methods §12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_gradients import own_output_gradients
from tiny_families import tiny

from secateur.checkpoint.reader import open_checkpoint
from secateur.statistics import GradientAbs, GradientMean, GradientSquare, InputNorm
from secateur.sweep import Sweep, SweepSettings
from secateur.sweep.block_local import gradient_of_norm

KINDS = frozenset({GradientMean, GradientAbs, GradientSquare, InputNorm})
MOMENTS = {
    GradientMean: lambda g_N: g_N.mean(0),
    GradientAbs: lambda g_N: g_N.abs().mean(0),
    GradientSquare: lambda g_N: g_N.square().mean(0),
}


def sweep(folder: Path, ids_NT, scratch: Path, micro_batch: int, gradient="block") -> Sweep:
    return Sweep(open_checkpoint(str(folder)), ids_NT, SweepSettings(micro_batch, 1 << 30, scratch, gradient=gradient))


def gather(folder: Path, ids_NT, scratch: Path, micro_batch: int, blocks=range(2)):
    found: dict[tuple[int, str], Any] = {}

    def visit(index, block, statistics):
        found.update({(index, name): kinds for name, kinds in statistics.items()})

    walk = sweep(folder, ids_NT, scratch, micro_batch)
    walk.dense(KINDS, blocks, visit)
    assert walk.loss is None, "the head is never run"
    return found


def blocks_of(model) -> Any:
    from secateur.checkpoint.skeleton import Skeleton

    return Skeleton(model).blocks


def ids(windows=5, tokens=12) -> torch.Tensor:
    return torch.randint(96, (windows, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gemma2", "phi3"])
def test_every_moment_equals_plain_autograd(family, micro_batch, save, tmp_path):
    model = tiny(family)
    found = gather(save(model), ids(), tmp_path / "s", micro_batch)
    expected = own_output_gradients(model, blocks_of(model), ids())
    assert {index for index, _ in found} == {0, 1}
    for (index, name), kinds in found.items():
        for kind, moment in MOMENTS.items():
            wanted = moment(expected[index, name])
            difference = (kinds[kind].mean() - wanted).abs().max()
            assert difference <= 2e-5 * wanted.abs().max(), (index, name, kind)
            assert kinds[kind].windows == 5


def test_a_range_of_blocks_and_input_norms(save, tmp_path):
    folder = save(tiny("llama"))
    everything, second = (gather(folder, ids(), tmp_path / "s", 2, blocks) for blocks in (range(2), range(1, 2)))
    assert {index for index, _ in second} == {1}
    norms = {}

    def visit(index, block, statistics):
        norms.update({(index, name): kinds[InputNorm] for name, kinds in statistics.items()})

    sweep(folder, ids(), tmp_path / "s", 2).dense(frozenset({InputNorm}), range(2), visit)
    for key, kinds in everything.items():
        assert torch.equal(kinds[InputNorm].total, norms[key].total)
        if key in second:
            assert all(torch.equal(kinds[kind].total, second[key][kind].total) for kind in KINDS)


def test_under_pruned_propagation_blocks_see_what_pruned_ones_give(save, tmp_path):
    """Dense weights, inputs of the pruned blocks before."""
    folder, found = save(tiny("llama")), {}

    def visit(index, block, statistics):
        found.update({(index, name): kinds for name, kinds in statistics.items()})
        return {name: tensor * (tensor.abs() > 0.15) for name, tensor in block.state_dict().items() if name in kept}

    kept = set(open_checkpoint(str(folder)).skeleton.prunable(0))
    sweep(folder, ids(), tmp_path / "s", 2).pruned(KINDS, range(2), visit)

    model = tiny("llama")
    blocks = blocks_of(model)
    first = own_output_gradients(model, blocks, ids())
    with torch.no_grad():
        for name, parameter in blocks[0].named_parameters():
            if name in kept:
                parameter.mul_(parameter.abs() > 0.15)
    second = own_output_gradients(model, blocks, ids())
    for (index, name), kinds in found.items():
        wanted = (first if index == 0 else second)[index, name].abs().mean(0)
        assert (kinds[GradientAbs].mean() - wanted).abs().max() <= 2e-5 * wanted.abs().max(), (index, name)
        if index == 1:
            dense = first[index, name].abs().mean(0)
            assert (dense - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_experts_without_a_token_have_no_gradient(save, tmp_path):
    model = tiny("mixtral")
    found = gather(save(model), ids(1, 2), tmp_path / "s", 1)
    idle = [key for key, kinds in found.items() if not kinds[GradientAbs].mean().any()]
    assert idle
    assert all("experts" in name for _, name in idle)
    assert all(kinds[GradientAbs].windows == 1 for kinds in found.values())


def test_a_window_of_zeros_has_no_gradient():
    out_BTD = torch.zeros(2, 3, 4)
    out_BTD[1, 0, 0] = -2.0
    gradient_BTD = gradient_of_norm(out_BTD)
    assert not gradient_BTD[0].any()
    assert gradient_BTD[1, 0, 0] == -1
    assert gradient_BTD[1].count_nonzero() == 1


def test_gradients_of_the_loss_are_not_gathered_on_a_pruned_walk(save, tmp_path):
    with pytest.raises(AssertionError):
        sweep(save(tiny("llama")), ids(), tmp_path / "s", 1, "exact").pruned(KINDS, range(2), lambda *_: None)
