"""Streamed gradients beside plain backpropagation, element by element, every statistic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_methods import linears, window_gradients

from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import ModelError
from secateur.statistics import GradientAbs, GradientMean, GradientSquare, InputNorm, InputSecondMoment
from secateur.sweep import Sweep, SweepSettings
from secateur.sweep.logits import streamed_logits

KINDS = frozenset({GradientMean, GradientAbs, GradientSquare, InputNorm})


def gather(folder: Path, ids_NT, scratch: Path, micro_batch: int, memory: int, blocks=range(3), needs=KINDS):
    found = {}

    def visit(index, block, statistics):
        for name, kinds in statistics.items():
            found[f"model.layers.{index}.{name}"] = kinds

    sweep = Sweep(open_checkpoint(str(folder)), ids_NT, SweepSettings(micro_batch, memory, scratch))
    sweep.dense(needs, blocks, visit)
    return found, sweep.loss


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within 1e-6 of the matrix's largest element: what differs is the order of float32 sums."""
    return bool(((found - expected).abs() <= 1e-6 * expected.abs().max()).all())


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_every_statistic_equals_plain_backpropagation(llama_folder, windows_NT, tmp_path, micro_batch, memory):
    from tiny_models import tiny_llama

    plain = window_gradients(tiny_llama(), windows_NT)
    found, _ = gather(llama_folder, windows_NT, tmp_path / "s", micro_batch, memory)
    assert len(found) == 21
    for name, kinds in found.items():
        gradients = torch.stack([g[name] for g in plain])
        assert close(kinds[GradientMean].mean(), gradients.mean(0)), name
        assert close(kinds[GradientAbs].mean(), gradients.abs().mean(0)), name
        assert close(kinds[GradientSquare].mean(), gradients.square().mean(0)), name
        assert all(kinds[kind].windows == 6 for kind in KINDS)


def test_one_window_at_a_time_is_bit_identical(llama_folder, windows_NT, tmp_path):
    from tiny_models import tiny_llama

    plain = window_gradients(tiny_llama(), windows_NT[:1])
    found, _ = gather(llama_folder, windows_NT[:1], tmp_path / "s", 1, 0)
    for name, kinds in found.items():
        assert torch.equal(kinds[GradientMean].mean(), plain[0][name]), name


def test_loss_is_the_mean_of_the_windows_losses(llama_folder, windows_NT, tmp_path):
    from tiny_models import tiny_llama

    model = tiny_llama()
    losses = [float(model(input_ids=w[None], labels=w[None]).loss.detach()) for w in windows_NT]
    _, loss = gather(llama_folder, windows_NT, tmp_path / "s", 4, 0)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_kept_activations_change_no_bit(llama_folder, windows_NT, tmp_path):
    """With memory for everything nothing is recomputed; with some, a part is; with none, all is."""
    runs = [gather(llama_folder, windows_NT, tmp_path / "s", 2, memory)[0] for memory in (0, 400_000, 1 << 30)]
    for name in runs[0]:
        for kind in KINDS:
            assert torch.equal(runs[0][name][kind].total, runs[1][name][kind].total)
            assert torch.equal(runs[0][name][kind].total, runs[2][name][kind].total)


def test_nothing_stays_in_scratch_or_in_memory(llama_folder, windows_NT, tmp_path):
    checkpoint = open_checkpoint(str(llama_folder))
    sweep = Sweep(checkpoint, windows_NT, SweepSettings(2, 0, tmp_path / "s"))
    resident = []

    def visit(index, block, statistics):
        weights = [name for name, parameter in checkpoint.skeleton.model.named_parameters() if not parameter.is_meta]
        resident.append((index, weights))

    sweep.dense(frozenset({GradientMean}), range(3), visit)
    assert not list((tmp_path / "s").glob("*"))
    assert [index for index, _ in resident] == [2, 1, 0]
    for index, weights in resident:
        assert weights
        assert all(name.startswith(f"model.layers.{index}.") for name in weights)
    assert all(parameter.is_meta for parameter in checkpoint.skeleton.model.parameters())


def test_tied_embeddings_and_a_range_of_blocks(save, windows_NT, tmp_path):
    from tiny_models import tiny_llama

    model = tiny_llama(tie_word_embeddings=True)
    folder = save(model)
    plain = window_gradients(model, windows_NT)
    found, _ = gather(folder, windows_NT, tmp_path / "s", 3, 0, blocks=range(1, 2))
    assert {name.split(".")[2] for name in found} == {"1"}
    for name, kinds in found.items():
        assert close(kinds[GradientMean].mean(), torch.stack([g[name] for g in plain]).mean(0)), name


def test_input_statistics_equal_hooks_on_the_whole_model(llama_folder, windows_NT, tmp_path):
    from tiny_models import tiny_llama

    model = tiny_llama()
    inputs: dict[str, list[torch.Tensor]] = {}
    for index, block in enumerate(model.model.layers):
        for name, module in linears(block).items():
            key = f"model.layers.{index}.{name}.weight"
            module.register_forward_pre_hook(lambda m, a, key=key: inputs.setdefault(key, []).append(a[0].detach()))
    with torch.no_grad():
        model(input_ids=windows_NT)
    needs = frozenset({InputNorm, InputSecondMoment})
    found, loss = gather(llama_folder, windows_NT, tmp_path / "s", 4, 0, needs=needs)
    assert loss is None, "a pass that needs no loss never runs the head"
    for name, kinds in found.items():
        x_NTI = inputs[name][0]
        assert torch.allclose(kinds[InputNorm].norm_I(), x_NTI.square().sum(1).mean(0).sqrt(), rtol=1e-5)
        second = torch.einsum("nti,ntj->ij", x_NTI, x_NTI) / len(x_NTI)
        assert torch.allclose(kinds[InputSecondMoment].mean(), second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [GradientMean, GradientAbs, GradientSquare])
def test_statistics_go_on_from_their_state(kind):
    gradients = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    whole, half = kind(), kind()
    for i, gradient in enumerate(gradients):
        whole.update(gradient)
        if i == 1:
            half = kind.from_state({name: tensor.clone() for name, tensor in whole.state().items()})
        elif i > 1:
            half.update(gradient)
    assert half.windows == 4
    assert torch.equal(half.mean(), whole.mean())
    assert torch.equal(gradients[0], torch.randn(3, 4, generator=torch.Generator().manual_seed(0))), "the caller's own"


def test_streamed_logits_equal_the_model(llama_folder, windows_NT):
    from tiny_models import tiny_llama

    with torch.no_grad():
        expected = tiny_llama()(input_ids=windows_NT[:2]).logits
    assert torch.allclose(streamed_logits(open_checkpoint(str(llama_folder)), windows_NT[:2]), expected, atol=1e-5)


def test_values_that_overflow_are_refused_by_block(save, windows_NT, tmp_path):
    from tiny_models import tiny_llama

    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(ModelError, match="block 1"):
        gather(save(model), windows_NT, tmp_path / "s", 2, 0)
