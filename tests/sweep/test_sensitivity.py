"""What each block means, beside the whole model with that block changed, one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_families import tiny
from tiny_models import tiny_llama

from secateur.allocation.alpha import Alpha, AlphaOptions
from secateur.allocation.owl import OWL, OWLOptions
from secateur.allocation.sensitivity import Sensitivity, SensitivityOptions
from secateur.checkpoint import reader
from secateur.checkpoint.reader import open_checkpoint
from secateur.errors import CalibrationError, ModelError
from secateur.evaluation.alive import Alive
from secateur.spreading import allocation_figures
from secateur.statistics import InputNorm
from secateur.sweep import SweepSettings, backward, sensitivity
from secateur.sweep.backward import LOGITS
from secateur.sweep.sensitivity import SensitivityWalk, window_changes


@torch.no_grad()
def log_probabilities(model, ids_NT):
    return model(input_ids=ids_NT, use_cache=False).logits.double().log_softmax(-1)[:, :-1]


def loss_and_divergence(model, dense_NTV, ids_NT):
    log_NTV = log_probabilities(model, ids_NT)
    loss = F.nll_loss(log_NTV.flatten(0, 1), ids_NT[:, 1:].flatten()).item()
    return loss, (dense_NTV.exp() * (dense_NTV - log_NTV)).sum(-1).mean().item()


@torch.no_grad()
def by_brute_force(build, layers_of, ids_NT, ratio):
    """Dense loss; and for every block loss and divergence with Wanda's rows of that block masked, from plain hooks."""
    dense_NTV = log_probabilities(build(), ids_NT)
    dense = F.nll_loss(dense_NTV.flatten(0, 1), ids_NT[:, 1:].flatten()).item()
    found = []
    for index in range(len(layers_of(build()))):
        model = build()
        linears = [m for m in layers_of(model)[index].modules() if isinstance(m, torch.nn.Linear)]
        squares = {}

        def watch(module, args, squares=squares):
            squares[module] = args[0].flatten(0, -2).square().sum(0)

        handles = [linear.register_forward_pre_hook(watch) for linear in linears]
        model(input_ids=ids_NT, use_cache=False)
        for handle in handles:
            handle.remove()
        for linear in linears:
            order_OI = (linear.weight.abs() * squares[linear].sqrt()).sort(dim=1, stable=True).indices
            gone = int(linear.in_features * ratio)
            linear.weight.scatter_(1, order_OI[:, :gone], 0.0)
        found.append(loss_and_divergence(model, dense_NTV, ids_NT))
    return dense, found


def figures(
    folder, ids_NT, scratch, policy=None, blocks=range(3), ratio=0.5, memory=1 << 30, micro_batch=2, cache=None
):
    settings = SweepSettings(micro_batch, memory, scratch)
    checkpoint = open_checkpoint(str(folder))
    return allocation_figures(policy or Sensitivity(), checkpoint, ids_NT, settings, blocks, ratio, cache)


@pytest.mark.parametrize("memory", [0, 40_000, 1 << 30])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_every_block_equals_the_whole_model_with_that_block_masked(llama_folder, windows_NT, tmp_path, memory, ratio):
    dense, expected = by_brute_force(tiny_llama, lambda model: model.model.layers, windows_NT, ratio)
    found = figures(llama_folder, windows_NT, tmp_path / "s", ratio=ratio, memory=memory)
    assert [own["dense_loss"] for own in found] == pytest.approx([dense] * 3, rel=1e-5)
    for own, (loss, divergence) in zip(found, expected, strict=True):
        assert own["masked_loss"] == pytest.approx(loss, rel=1e-4)
        assert own["divergence"] == pytest.approx(divergence, rel=1e-3)
    assert len({round(own["masked_loss"], 3) for own in found}) == 3
    assert not list((tmp_path / "s").rglob("*"))


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "mixtral"])
def test_every_family_is_walked_as_the_model_runs(save, tmp_path, family):
    """A change that is no mask: halved norms, products and all. The walk knows no family."""
    ids_NT = torch.randint(96, (3, 11), generator=torch.Generator().manual_seed(0))
    checkpoint = open_checkpoint(str(save(tiny(family), family)))
    dense_NTV = log_probabilities(tiny(family), ids_NT)

    def halve(index, block, statistics):
        return {name: tensor * 0.5 for name, tensor in block.state_dict().items()}

    walk = SensitivityWalk(checkpoint, ids_NT, SweepSettings(1, 1 << 30, tmp_path / "s"), "walk")
    found = walk.run(frozenset(), range(2), halve)
    for index, change in found.items():
        model = tiny(family)
        prefix = checkpoint.skeleton.block_prefix(index)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(prefix):
                    parameter.mul_(0.5)
        loss, divergence = loss_and_divergence(model, dense_NTV, ids_NT)
        assert change.loss == pytest.approx(loss, rel=1e-4)
        assert change.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("blocks", [range(1, 3), range(1, 2), range(2, 3)])
def test_a_range_gives_what_all_blocks_give(llama_folder, windows_NT, tmp_path, blocks):
    whole = figures(llama_folder, windows_NT, tmp_path / "a")
    assert figures(llama_folder, windows_NT, tmp_path / "b", blocks=blocks) == whole[blocks.start : blocks.stop]


def test_a_block_that_is_not_changed_costs_nothing(llama_folder, windows_NT, tmp_path):
    checkpoint = open_checkpoint(str(llama_folder))
    walk = SensitivityWalk(checkpoint, windows_NT, SweepSettings(2, 0, tmp_path), "walk")
    for change in walk.run(frozenset({InputNorm}), range(3), lambda index, block, statistics: None).values():
        assert change.loss == walk.loss
        assert change.divergence == 0


def test_logits_in_pieces_change_nothing(llama_folder, windows_NT, tmp_path, monkeypatch):
    whole = figures(llama_folder, windows_NT, tmp_path / "a")
    monkeypatch.setattr(backward, "LOGITS", 4 * 128 * 5)  # five tokens at once
    pieces = figures(llama_folder, windows_NT, tmp_path / "b")
    for own, other in zip(whole, pieces, strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def test_each_block_is_read_once(llama_folder, windows_NT, tmp_path, monkeypatch):
    read = []
    original = sensitivity.SensitivityWalk.block
    monkeypatch.setattr(
        sensitivity.SensitivityWalk,
        "block",
        lambda self, index, ahead: read.append(index) or original(self, index, ahead),
    )
    figures(llama_folder, windows_NT, tmp_path)
    assert read == [0, 1, 2]


def test_only_the_first_windows_are_run(llama_folder, windows_NT, tmp_path):
    two = Sensitivity(SensitivityOptions(windows=2))
    assert figures(llama_folder, windows_NT, tmp_path, two) == figures(llama_folder, windows_NT[:2], tmp_path)
    assert figures(llama_folder, windows_NT, tmp_path, two) != figures(llama_folder, windows_NT, tmp_path)


def test_weights_that_overflow_are_an_error(save, windows_NT, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(ModelError, match="block 1 gives values that are not finite"):
        figures(save(model), windows_NT, tmp_path / "s")


# -- the other passes, and what is kept


def test_figures_of_weights_are_those_of_the_policy(llama_folder, tmp_path):
    found = figures(llama_folder, None, tmp_path, Alpha(), range(1, 3))
    layers = tiny_llama().model.layers
    for own, layer in zip(found, layers[1:], strict=True):
        matrices = {name: p.detach() for name, p in layer.named_parameters() if p.dim() == 2}
        assert own == Alpha().figure(matrices, {})
        assert len(own) == 7


@torch.no_grad()
def test_figures_of_inputs_are_those_of_the_dense_model(llama_folder, windows_NT, tmp_path):
    policy, model = OWL(OWLOptions(by="matrix", outlier=2.0)), tiny_llama()
    found = figures(llama_folder, windows_NT, tmp_path / "s", policy)
    squares = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: squares.update({name: args[0].square().sum((0, 1)) / 6})
            )
    model(input_ids=windows_NT, use_cache=False)
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                score_OI = module.weight.abs() * squares[f"{index}.{name}"].sqrt()
                expected = float((score_OI > 2 * score_OI.mean()).float().mean())
                assert found[index][f"{name}.weight"] == pytest.approx(expected, abs=1e-6)
    assert not list((tmp_path / "s").rglob("*"))


def test_policies_that_run_the_model_need_windows(llama_folder, tmp_path):
    for policy in (OWL(), Sensitivity()):
        with pytest.raises(CalibrationError, match="give --calibration"):
            figures(llama_folder, None, tmp_path, policy)


@pytest.mark.parametrize("policy", [Alpha(), OWL(), Sensitivity()], ids=["alpha", "owl", "sensitivity"])
def test_figures_are_kept_and_damaged_ones_made_again(llama_folder, windows_NT, tmp_path, policy, monkeypatch):
    cache = tmp_path / "cache"
    first = figures(llama_folder, windows_NT, tmp_path / "s", policy, cache=cache)
    (file,) = (cache / "figures").iterdir()
    reads = []
    original = reader.Checkpoint.block_tensors
    monkeypatch.setattr(
        reader.Checkpoint, "block_tensors", lambda self, index: reads.append(index) or original(self, index)
    )
    assert figures(llama_folder, windows_NT, tmp_path / "s", policy, cache=cache) == first
    assert not reads
    for damage in ("", "{", '[{"q": 1}]', '[{"q": NaN}, {}, {}]', "[1, 2, 3]", '[{"q": "x"}, {}, {}]'):
        file.write_text(damage)
        assert figures(llama_folder, windows_NT, tmp_path / "s", policy, cache=cache) == first
        assert reads
        reads.clear()


def test_what_is_kept_depends_on_all_that_it_is_made_of_and_on_nothing_else(llama_folder, save, windows_NT, tmp_path):
    cache, scratch = tmp_path / "cache", tmp_path / "s"

    def kept(policy, folder=llama_folder, ids_NT=windows_NT, **options):
        figures(folder, ids_NT, scratch, policy, cache=cache, **options)
        return len(list((cache / "figures").iterdir()))

    assert kept(Alpha()) == 1
    assert kept(Alpha(AlphaOptions(spread=0.1, by="matrix")), ids_NT=windows_NT[:3], ratio=0.2) == 1
    assert kept(Alpha(AlphaOptions(metric="mid"))) == 2
    assert kept(Alpha(), blocks=range(2)) == 3
    assert kept(Alpha(), folder=save(tiny_llama(rms_norm_eps=1e-3), "other")) == 4
    assert kept(OWL()) == 5
    assert kept(OWL(OWLOptions(spread=0.2)), ratio=0.2) == 5
    assert kept(OWL(OWLOptions(outlier=3.0))) == 6
    assert kept(OWL(), ids_NT=windows_NT[:3]) == 7
    assert kept(Sensitivity()) == 8
    assert kept(Sensitivity(SensitivityOptions(spread=0.1, metric="divergence", windows=7))) == 8
    assert kept(Sensitivity(), ratio=0.2) == 9
    assert kept(Sensitivity(SensitivityOptions(windows=3))) == 10


def test_comparing_two_ways_takes_no_more_than_the_forecast_counts():
    """The peak is forecast with four times the logits that may exist at once."""
    vocabulary, generator = 49_152, torch.Generator().manual_seed(0)
    table_DV = torch.randn(8, vocabulary, generator=generator)
    ids_T = torch.randint(0, vocabulary, (1024,), generator=generator)
    hidden_WTD = [torch.randn(1024, 8, generator=generator) for _ in range(2)]

    with Alive(set()) as alive:
        changes_WS = window_changes(lambda inputs, hidden_BTD: hidden_BTD @ table_DV, ids_T, hidden_WTD, vocabulary)
    assert alive.most < 4 * LOGITS
    assert torch.isfinite(changes_WS).all()
