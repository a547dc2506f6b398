"""Forward-only gradients beside SPSA written plainly on the whole model, with the same noise (methods §4.3, §13.10)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from plain_gradients import plain_quotients, whole_noise
from published_methods import linears, window_gradients
from tiny_models import tiny_llama

from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.errors import ModelError
from secateur.statistics import GradientAbs, GradientMean, GradientSquare, InputNorm
from secateur.sweep import Queries, Sweep, SweepSettings, forward_only, noise
from secateur.sweep.forward_only import ForwardOnlyWalk, estimated, perturbed

MOMENTS = frozenset({GradientMean, GradientAbs, GradientSquare})


def quotients(
    folder: Path, ids_NT, scratch: Path, queries: Queries, blocks=range(3), memory=1 << 30, micro_batch=2
) -> torch.Tensor:
    settings = SweepSettings(micro_batch, memory, scratch, queries=queries)
    return ForwardOnlyWalk(open_checkpoint(str(folder)), ids_NT, settings).measure_QN(blocks)


def in_range(model, blocks: range) -> list[str]:
    layers = model.model.layers
    return [f"model.layers.{index}.{name}.weight" for index in blocks for name in linears(layers[index])]


@pytest.mark.parametrize("blocks", [range(3), range(1, 2), range(2, 3)])
@pytest.mark.parametrize("chunk", [noise.CHUNK, 1000])
def test_quotients_equal_plain_spsa(llama_folder, windows_NT, tmp_path, monkeypatch, blocks, chunk):
    monkeypatch.setattr(noise, "CHUNK", chunk)
    queries = Queries(5, 1e-2, seed=4)
    found = quotients(llama_folder, windows_NT, tmp_path / "s", queries, blocks)
    expected = plain_quotients(tiny_llama(), in_range(tiny_llama(), blocks), windows_NT, queries)
    assert found.shape == (5, 6)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean()))


@pytest.mark.parametrize("kinds", [MOMENTS, {GradientMean}, {GradientSquare}, {GradientAbs, GradientMean}])
@pytest.mark.parametrize("chunk", [noise.CHUNK, 100])
def test_estimated_moments_equal_the_mean_over_queries(monkeypatch, kinds, chunk):
    monkeypatch.setattr(noise, "CHUNK", chunk)
    monkeypatch.setattr(forward_only, "AT_ONCE", 3)
    queries = Queries(7, seed=1)
    c_QN = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = estimated(frozenset(kinds), "some.matrix", (12, 33), c_QN, queries)
    noise_QOI = torch.stack([whole_noise(queries, query, "some.matrix", (12, 33)) for query in range(7)])
    gradient_NOI = torch.einsum("qn,qoi->noi", c_QN.float(), noise_QOI) / 7
    expected = {
        GradientMean: gradient_NOI.mean(0),
        GradientAbs: gradient_NOI.abs().mean(0),
        GradientSquare: gradient_NOI.square().mean(0),
    }
    assert set(found) == set(kinds)
    for kind in kinds:
        assert found[kind].windows == 4
        assert torch.allclose(found[kind].mean(), expected[kind], rtol=1e-5, atol=1e-6)


def test_noise_is_normal_and_depends_on_all_that_names_it():
    queries = Queries(2, seed=3)
    noise_RI = queries.noise_RI(0, "m", 0, (400, 500))
    assert abs(float(noise_RI.mean())) < 0.01
    assert abs(float(noise_RI.var()) - 1) < 0.02
    assert torch.equal(noise_RI, queries.noise_RI(0, "m", 0, (400, 500)))
    others = [queries.noise_RI(1, "m", 0, (400, 500)), queries.noise_RI(0, "n", 0, (400, 500))]
    others += [queries.noise_RI(0, "m", 1, (400, 500)), Queries(2, seed=4).noise_RI(0, "m", 0, (400, 500))]
    for other in others:
        assert abs(float((noise_RI * other).mean())) < 0.01


def test_noise_cares_neither_for_the_global_generator_nor_for_threads():
    queries = Queries()
    torch.manual_seed(1)
    first = queries.noise_RI(2, "m", 0, (20, 20))
    torch.manual_seed(2)
    torch.set_num_threads(2)
    try:
        assert torch.equal(first, queries.noise_RI(2, "m", 0, (20, 20)))
    finally:
        torch.set_num_threads(1)


def test_weights_come_back_bit_for_bit(llama_folder):
    checkpoint, queries = open_checkpoint(str(llama_folder)), Queries(perturbation=0.3)
    matrices, prefix = checkpoint.skeleton.prunable(1), checkpoint.skeleton.block_prefix(1)
    with resident_block(checkpoint, 1) as block:
        before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in block.named_parameters()}
        for sign in (1, -1):
            with perturbed(block, matrices, prefix, queries, 0, sign):
                for name, parameter in block.named_parameters():
                    expected = before[name][2]
                    if name in matrices:
                        expected = expected + sign * 0.3 * whole_noise(queries, 0, prefix + name, expected.shape)
                        assert torch.allclose(parameter, expected, rtol=1e-6, atol=1e-6)
                    else:
                        assert torch.equal(parameter, expected)
            with pytest.raises(KeyboardInterrupt), perturbed(block, matrices, prefix, queries, 0, sign):
                raise KeyboardInterrupt
            for name, parameter in block.named_parameters():
                tensor, pointer, copy = before[name]
                assert parameter is tensor
                assert parameter.data_ptr() == pointer
                assert torch.equal(parameter, copy)


def test_transposed_and_packed_matrices_are_moved_where_they_lie(save):
    """GPT-2 keeps its matrices as (I, O), Mixtral its experts in one parameter."""
    from tiny_families import tiny

    for family in ("gpt2", "mixtral"):
        checkpoint, queries = open_checkpoint(str(save(tiny(family), family))), Queries(perturbation=0.1)
        matrices, prefix = checkpoint.skeleton.prunable(0), checkpoint.skeleton.block_prefix(0)
        with resident_block(checkpoint, 0) as block:
            parameters = dict(block.named_parameters())
            before = {name: matrix.of(parameters).clone() for name, matrix in matrices.items()}
            with perturbed(block, matrices, prefix, queries, 3, 1):
                for name, matrix in matrices.items():
                    moved_OI = matrix.of(parameters) - before[name]
                    noise_OI = whole_noise(queries, 3, prefix + name, tuple(moved_OI.shape))
                    assert torch.allclose(moved_OI, 0.1 * noise_OI, atol=1e-6), name


def test_quotients_are_directional_derivatives(llama_folder, windows_NT, tmp_path):
    """To first order c[q, s] is z_q . g_s, with g_s the exact gradient of window s."""
    queries = Queries(6, 2e-4)
    found = quotients(llama_folder, windows_NT, tmp_path / "s", queries)
    expected = torch.zeros_like(found)
    for window, gradients in enumerate(window_gradients(tiny_llama(), windows_NT)):
        for query in range(6):
            for name in in_range(tiny_llama(), range(3)):
                noise_OI = whole_noise(queries, query, name, tuple(gradients[name].shape))
                expected[query, window] += float((noise_OI * gradients[name]).double().sum())
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_the_estimate_nears_the_gradient(save, windows_NT, tmp_path):
    """In P dimensions the cosine with the true gradient is about sqrt(Q / (Q + P)) after Q queries."""
    model = tiny_llama(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    gradients = window_gradients(model, windows_NT)
    names = in_range(model, range(1))
    exact = torch.cat([torch.stack([g[name] for g in gradients]).mean(0).flatten() for name in names])
    queries = Queries(400, 1e-3)
    c_QN = quotients(save(model), windows_NT, tmp_path / "s", queries, range(1), micro_batch=6)
    cosines, lengths = [], []
    for count in (25, 100, 400):
        parts = [
            estimated(frozenset({GradientMean}), name, tuple(gradients[0][name].shape), c_QN[:count], queries)
            for name in names
        ]
        estimate = torch.cat([part[GradientMean].mean().flatten() for part in parts])
        cosines.append(float(F.cosine_similarity(estimate, exact, dim=0)))
        lengths.append(float(estimate @ exact / exact.square().sum()))
        assert cosines[-1] == pytest.approx((count / (count + exact.numel())) ** 0.5, abs=0.12)
    assert cosines == sorted(cosines)
    assert lengths[-1] == pytest.approx(1, abs=0.25), "the estimate is right on average, not only in direction"


def gather(folder: Path, ids_NT, scratch: Path, micro_batch: int, memory: int, blocks=range(3), seed=0):
    found = {}

    def visit(index, block, statistics):
        for name, kinds in statistics.items():
            found[f"model.layers.{index}.{name}"] = kinds

    settings = SweepSettings(micro_batch, memory, scratch, gradient="forward", queries=Queries(5, seed=seed))
    Sweep(open_checkpoint(str(folder)), ids_NT, settings).dense(MOMENTS | {InputNorm}, blocks, visit)
    return found


def test_memory_and_with_it_the_grouping_of_queries_change_no_bit(llama_folder, windows_NT, tmp_path, monkeypatch):
    sizes = []
    groups = ForwardOnlyWalk._groups

    def remember(self, missing):
        found = groups(self, missing)
        sizes.append([len(group) for group in found])
        return found

    monkeypatch.setattr(ForwardOnlyWalk, "_groups", remember)
    entering = windows_NT.numel() * 64 * 4
    runs = [gather(llama_folder, windows_NT, tmp_path / "s", 2, memory) for memory in (0, 5 * entering, 1 << 30)]
    assert sizes == [[1] * 5, [2, 2, 1], [5]]
    assert not list((tmp_path / "s").glob("*"))
    for name, kinds in runs[0].items():
        for kind in kinds:
            assert torch.equal(kinds[kind].total, runs[1][name][kind].total)
            assert torch.equal(kinds[kind].total, runs[2][name][kind].total)
            assert kinds[kind].windows == 6


def test_micro_batches_change_roundings_alone(llama_folder, windows_NT, tmp_path):
    one, four = (gather(llama_folder, windows_NT, tmp_path / "s", micro, 1 << 30) for micro in (1, 4))
    assert len(one) == 21
    for name, kinds in one.items():
        for kind in kinds:
            total = kinds[kind].total
            assert (total - four[name][kind].total).abs().max() < 5e-3 * total.abs().max(), (name, kind)


def test_a_sweep_gives_the_moments_of_the_quotients(llama_folder, windows_NT, tmp_path):
    found = gather(llama_folder, windows_NT, tmp_path / "s", 2, 1 << 30, range(1, 3))
    c_QN = quotients(llama_folder, windows_NT, tmp_path / "s", Queries(5), range(1, 3))
    assert {name.split(".")[2] for name in found} == {"1", "2"}
    for name, kinds in found.items():
        expected = estimated(MOMENTS, name, tuple(kinds[GradientMean].total.shape), c_QN, Queries(5))
        for kind in MOMENTS:
            assert torch.equal(kinds[kind].total, expected[kind].total)


def test_input_norms_beside_estimated_gradients_are_the_dense_models(llama_folder, windows_NT, tmp_path):
    found = gather(llama_folder, windows_NT, tmp_path / "s", 2, 1 << 30)
    dense = {}

    def visit(index, block, statistics):
        dense.update({f"model.layers.{index}.{name}": kinds for name, kinds in statistics.items()})

    settings = SweepSettings(2, 1 << 30, tmp_path / "s")
    Sweep(open_checkpoint(str(llama_folder)), windows_NT, settings).dense(frozenset({InputNorm}), range(3), visit)
    for name, kinds in found.items():
        assert torch.equal(kinds[InputNorm].total, dense[name][InputNorm].total)


def test_fewer_queries_are_the_first_of_more(llama_folder, windows_NT, tmp_path):
    more, fewer = (quotients(llama_folder, windows_NT, tmp_path / "s", Queries(count)) for count in (4, 2))
    assert torch.equal(more[:2], fewer)
    other = quotients(llama_folder, windows_NT, tmp_path / "s", Queries(2, seed=1))
    assert not torch.allclose(fewer, other, rtol=0.1)


def test_a_step_that_overflows_is_refused(llama_folder, windows_NT, tmp_path):
    with pytest.raises(ModelError, match="smaller --perturbation"):
        quotients(llama_folder, windows_NT, tmp_path / "s", Queries(1, 1e30))
