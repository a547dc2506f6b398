"""Large tables outside the blocks stay on disk, and the model computes the same."""

from __future__ import annotations

import pytest
import torch
from published_methods import window_gradients
from tiny_families import tiny
from tiny_models import tiny_llama

from secateur.checkpoint import outside
from secateur.checkpoint.outside import large_tables
from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.residency import resident_outer
from secateur.statistics import GradientMean
from secateur.sweep import Sweep, SweepSettings, backward
from secateur.sweep.logits import streamed_logits

IDS_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("piece", [1 << 10, 1 << 12, 5000])
def test_pieces_of_the_head_give_the_whole_heads_logits(tied, piece, save, monkeypatch):
    model = tiny_llama(tie_word_embeddings=tied)
    checkpoint = open_checkpoint(str(save(model)))
    monkeypatch.setattr(outside, "PIECE", piece)
    assert set(large_tables(checkpoint)) == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    with torch.no_grad():
        expected = model(input_ids=IDS_BT).logits
    assert torch.allclose(streamed_logits(checkpoint, IDS_BT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "opt", "bloom", "gpt2", "phi", "granite", "cohere"])
def test_scaled_embeddings_biased_heads_and_soft_caps(family, save, monkeypatch):
    model = tiny(family)
    checkpoint = open_checkpoint(str(save(model)))
    monkeypatch.setattr(outside, "PIECE", 1 << 10)
    assert large_tables(checkpoint)
    with torch.no_grad():
        expected = model(input_ids=IDS_BT, use_cache=False).logits
    assert torch.allclose(streamed_logits(checkpoint, IDS_BT), expected, rtol=1e-4, atol=1e-5)


def test_the_tables_are_not_brought_in(llama_folder, monkeypatch):
    monkeypatch.setattr(outside, "PIECE", 1 << 10)
    checkpoint = open_checkpoint(str(llama_folder))
    with resident_outer(checkpoint) as model:
        assert model.lm_head.weight.is_meta
        assert model.model.embed_tokens.weight.is_meta
        assert not model.model.norm.weight.is_meta


@pytest.mark.parametrize("logits", [64 << 20, 4 * 128 * 5])
def test_gradients_through_pieces_of_head_and_window(logits, llama_folder, windows_NT, tmp_path, monkeypatch):
    """Pieces of the vocabulary and pieces of five tokens: the gradients of plain backpropagation."""
    monkeypatch.setattr(outside, "PIECE", 1 << 12)
    monkeypatch.setattr(backward, "LOGITS", logits)
    plain = window_gradients(tiny_llama(), windows_NT)
    found = {}

    def visit(index, block, statistics):
        found.update({f"model.layers.{index}.{name}": kinds[GradientMean].mean() for name, kinds in statistics.items()})

    sweep = Sweep(open_checkpoint(str(llama_folder)), windows_NT, SweepSettings(2, 0, tmp_path / "s"))
    sweep.dense(frozenset({GradientMean}), range(3), visit)
    for name, gradient in found.items():
        expected = torch.stack([window[name] for window in plain]).mean(0)
        assert (gradient - expected).abs().max() <= 2e-6 * expected.abs().max(), name
    model = tiny_llama()
    losses = [float(model(input_ids=w[None], labels=w[None]).loss.detach()) for w in windows_NT]
    assert sweep.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
