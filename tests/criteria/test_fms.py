"""FMS against its formula, and every source of gradients with every criterion that needs them, on whole models."""

from __future__ import annotations

import pytest
import torch
from plain_gradients import own_output_gradients, plain_quotients, whole_noise
from published_methods import window_gradients
from tiny_families import tiny

import secateur
from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.skeleton import Skeleton
from secateur.criteria import criterion_from
from secateur.criteria.base import Matrix
from secateur.recipe import recipe_from
from secateur.scoring import BlockScorer, unit_key
from secateur.statistics import GradientMean, InputNorm
from secateur.structure import find_all_units
from secateur.sweep import Queries, Sweep, SweepSettings

QUERIES = Queries(3, 1e-2, seed=2)


def matrix() -> Matrix:
    generator = torch.Generator().manual_seed(6)
    statistics = {GradientMean: GradientMean(), InputNorm: InputNorm()}
    for _ in range(4):
        statistics[GradientMean].update(torch.randn(6, 10, generator=generator))
        statistics[InputNorm].update(torch.randn(7, 10, generator=generator))
    return Matrix("m", torch.randn(6, 10, generator=generator), statistics)


def test_fms_is_weight_times_gradient_times_activation():
    m, norms = matrix(), matrix().of(InputNorm).norm_I()
    gradient_OI = m.of(GradientMean).mean()
    for o in range(6):
        for i in range(10):
            signed = float(m.weight_OI[o, i]) * float(gradient_OI[o, i]) * float(norms[i])
            assert criterion_from("fms").score_OI(m)[o, i].item() == pytest.approx(abs(signed), rel=1e-5)
            assert criterion_from("fms:signed=true").score_OI(m)[o, i].item() == pytest.approx(signed, rel=1e-5)


def test_signed_fms_may_cancel_within_a_row_and_never_in_single_weights():
    signed, plain, m = criterion_from("fms:signed=true"), criterion_from("fms"), matrix()
    assert torch.equal(signed.weight_score_OI(m), plain.weight_score_OI(m))
    rows, all_rows = (c.channel_score(c.score_OI(m), 0) for c in (signed, plain))
    assert (rows >= 0).all()
    assert (rows < all_rows).all()
    assert torch.allclose(rows, signed.score_OI(m).double().sum(1).abs())


def plain_mean_gradients(source: str, model, skeleton: Skeleton, names, ids_NT) -> dict[str, torch.Tensor]:
    """The mean over windows of each matrix's gradient, by full name, ``(O, I)``."""
    if source == "exact":
        windows = window_gradients(model, ids_NT)
        return {name: torch.stack([g[name] for g in windows]).mean(0) for name in names}
    if source == "block":
        found = own_output_gradients(model, skeleton.blocks, ids_NT)
        return {f"{skeleton.block_prefix(index)}{name}": g.mean(0) for (index, name), g in found.items()}
    c_Q = plain_quotients(model, names, ids_NT, QUERIES).mean(1).float()
    shapes = {name: model.get_parameter(name).shape for name in names}
    return {
        name: sum(c_Q[q] * whole_noise(QUERIES, q, name, shapes[name]) for q in range(QUERIES.count)) / QUERIES.count
        for name in names
    }


def input_norms(model, names, ids_NT) -> dict[str, torch.Tensor]:
    """``sqrt(mean over windows of the sum over tokens of x_j^2)`` of each linear, by hooks."""
    found = {}

    def hook(name):
        def keep(module, args):
            found[name] = args[0].detach().reshape(len(ids_NT), -1, args[0].shape[-1]).square().sum(1).mean(0).sqrt()

        return keep

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook(name)) for name in names
    ]
    with torch.no_grad():
        model(input_ids=ids_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("source", ["exact", "block", "forward"])
@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_heads_and_channels_are_scored_by_the_formula(family, source, save, tmp_path):
    model = tiny(family)
    ids_NT = torch.randint(96, (4, 12), generator=torch.Generator().manual_seed(8))
    checkpoint = open_checkpoint(str(save(model)))
    skeleton = checkpoint.skeleton
    recipe = recipe_from(model="-", criterion="fms", unit="head,channel", gradient=source)
    units = find_all_units(skeleton.model, skeleton.blocks_name)
    found = {}

    def visit(index, block, statistics):
        groups = [group for group in units.of_block(index) if group.kind in ("head", "channel")]
        scores = BlockScorer(skeleton, index, block, statistics, recipe).of_units(groups)
        found.update({(index, group.kind): (group, scores[unit_key(group)]) for group in groups})

    settings = SweepSettings(2, 1 << 30, tmp_path / "s", gradient=source, queries=QUERIES)
    Sweep(checkpoint, ids_NT, settings).dense(recipe.parsed_criterion().needs(), range(2), visit)
    assert set(found) == {(index, kind) for index in range(2) for kind in ("head", "channel")}

    names = [skeleton.block_prefix(index) + name for index in range(2) for name in skeleton.prunable(index)]
    gradients = plain_mean_gradients(source, model, Skeleton(model), names, ids_NT)
    norms = input_norms(model, names, ids_NT)
    worth = {name: (model.get_parameter(name).detach() * gradients[name] * norms[name]).abs() for name in names}
    for (index, _), (group, scores) in found.items():
        members = [m for m in group.members if skeleton.block_prefix(index) + m.parameter in worth]
        assert members
        for unit in range(group.count):
            parts = [
                worth[skeleton.block_prefix(index) + m.parameter].movedim(m.dim, 0)[torch.as_tensor(m.index_UC[unit])]
                for m in members
            ]
            expected = sum(float(part.sum()) for part in parts)
            assert float(scores[unit]) == pytest.approx(expected, rel=2e-3), (index, group.kind, unit)


@pytest.mark.parametrize("source", ["exact", "block", "forward"])
@pytest.mark.parametrize(
    "criterion", ["taylor", "taylor:order=mixed", "gblm", "gblm:norm=l2", "fms", "fms:signed=true"]
)
@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("propagate", ["dense", "pruned"])
def test_every_source_serves_every_criterion(source, criterion, family, propagate, save, windows_file):
    few = {"queries": 2} if source == "forward" else {}
    fields = dict(unit="head,channel", ratio=0.5, calibration=str(windows_file), windows=2, window_length=24)
    plan = secateur.plan(
        str(save(tiny(family, vocab_size=128))),
        criterion=criterion,
        gradient=source,
        propagate=propagate,
        **few,
        **fields,
    )
    removed = plan.removed_by_kind()
    assert {kind: removed[kind][0] * 2 for kind in removed} == {kind: removed[kind][1] for kind in removed}
    assert set(removed) == {"head", "channel"}
    assert plan.recipe.gradient == source


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_a_cut_by_fms_loads(family, save, windows_file, tmp_path, same_process):
    fields = dict(criterion="fms", unit="head,channel", ratio=0.5, calibration=str(windows_file), queries=2)
    secateur.prune(str(save(tiny(family, vocab_size=128))), tmp_path / "out", **fields)
    assert secateur.load(tmp_path / "out") is not None
