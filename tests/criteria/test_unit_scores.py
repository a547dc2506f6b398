"""A unit's score equals a loop over its members, for every criterion and every reduction."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_families import tiny
from tiny_models import tiny_llama

from secateur.checkpoint.matrices import in_own_layout
from secateur.checkpoint.skeleton import Skeleton
from secateur.criteria import criterion_from
from secateur.criteria.base import Matrix
from secateur.criteria.units import unit_scores
from secateur.statistics import GradientAbs, GradientMean, GradientSquare, InputMoments, InputNorm
from secateur.structure import find_all_units, find_units

TEXTS = ["random", "magnitude", "magnitude:norm=l2", "wanda", "gblm", "gblm:norm=l2"]
TEXTS += [f"taylor:order={order}" for order in ("vector", "first", "second", "mixed")]
TEXTS += ["fms", "fms:signed=true", "flap"]


def is_signed(criterion) -> bool:
    """Whether contributions may cancel within a row or column."""
    return "vector" in str(criterion) or "signed=true" in str(criterion)


def input_statistics(inputs, generator):
    statistics = {InputNorm: InputNorm(), InputMoments: InputMoments()}
    x_TI = torch.randn(5, inputs, generator=generator)
    for statistic in statistics.values():
        statistic.update(x_TI)
    return statistics


def contributions_of(model, criterion):
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, parameter in model.model.layers[0].named_parameters():
        if parameter.dim() == 2:
            statistics = input_statistics(parameter.shape[1], generator)
            for kind in (GradientMean, GradientAbs, GradientSquare):
                statistics[kind] = kind()
                statistics[kind].update(torch.randn(parameter.shape, generator=generator))
            found[name] = criterion.score_OI(Matrix(name, parameter.detach(), statistics))
    return found


def by_hand(kind, unit, contributions, criterion, reduce, kv_heads, heads=8, width=8):
    """Channel by channel, member by member, with the indices of a Llama block spelled out."""
    repeats = heads // kv_heads

    def part(name, dim, index):
        matrix = contributions[name].double()
        total = float((matrix[index] if dim == 0 else matrix[:, index]).sum())
        return abs(total) if is_signed(criterion) else total

    attention = [f"self_attn.{n}_proj.weight" for n in "qkvo"]
    if kind == "channel":
        places = [
            ("mlp.gate_proj.weight", 0, [[unit]]),
            ("mlp.up_proj.weight", 0, [[unit]]),
            ("mlp.down_proj.weight", 1, [[unit]]),
        ]
    else:
        own = [unit] if kind == "query" else [unit * repeats + r for r in range(repeats)]
        queries = [[h * width + d for h in own] for d in range(width)]
        shared = [[unit * width + d] for d in range(width)]
        places = [(attention[0], 0, queries)]
        if kind == "head":
            places += [(attention[1], 0, shared), (attention[2], 0, shared)]
        places += [(attention[3], 1, queries)]
    if criterion.name == "flap":
        places = places[-1:]  # what reads the unit, and nothing else
    members = [[sum(part(name, dim, i) for i in indices) for indices in channels] for name, dim, channels in places]
    if reduce == "first":
        return sum(members[0])
    if reduce == "last":
        return sum(members[-1])
    reductions = {"sum": sum, "max": max, "prod": math.prod, "mean": lambda values: sum(values) / len(values)}
    return sum(reductions[reduce]([member[channel] for member in members]) for channel in range(len(members[0])))


@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "first", "last"])
def test_vectorised_equals_a_loop(kv_heads, text, reduce):
    model = tiny_llama(num_key_value_heads=kv_heads, num_hidden_layers=1)
    criterion = criterion_from(text)
    contributions = contributions_of(model, criterion)
    for group in find_units(model, "model.layers", 0):
        found = unit_scores(group, contributions, criterion, reduce)
        for unit in range(0, group.count, 5 if group.kind == "channel" else 1):
            expected = by_hand(group.kind, unit, contributions, criterion, reduce, kv_heads)
            assert found[unit].item() == pytest.approx(expected, rel=1e-9, abs=1e-300), (group.kind, unit)


def own_layout_contributions(skeleton, block, index, criterion):
    """Contributions of every matrix the block has, however it keeps them, from random statistics."""
    generator = torch.Generator().manual_seed(11)
    parameters = dict(block.named_parameters())
    matrices, values = skeleton.prunable(index), {}
    for name, matrix in matrices.items():
        weight_OI = matrix.of(parameters).detach()
        statistics = input_statistics(weight_OI.shape[1], generator)
        for kind in (GradientMean, GradientAbs, GradientSquare):
            statistics[kind] = kind()
            statistics[kind].update(torch.randn(weight_OI.shape, generator=generator))
        values[name] = criterion.score_OI(Matrix(name, weight_OI, statistics))
    return in_own_layout(matrices, values)


def member_by_member(group, unit, contributions, criterion, reduce):
    """One weight after the other: every member, every channel of the unit, every index the channel owns."""
    members = []
    for member in group.members:
        if member.parameter not in contributions or (criterion.name == "flap" and member.role != "consumer"):
            continue
        values = contributions[member.parameter].double().movedim(member.dim, 0).flatten(1)
        sums = [math.fsum(values[i].tolist()) for i in member.index_UC[unit]]
        members.append([abs(total) if is_signed(criterion) else total for total in sums])
    if not members or reduce in ("first", "last"):
        return sum(members[0 if reduce == "first" else -1]) if members else 0.0
    width = math.gcd(*(len(member) for member in members))
    aligned = [[sum(member[channel::width]) for channel in range(width)] for member in members]
    reductions = {"sum": sum, "max": max, "prod": math.prod, "mean": lambda values: sum(values) / len(values)}
    return sum(reductions[reduce]([member[channel] for member in aligned]) for channel in range(width))


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "first", "last"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("family", ["gpt2", "phi3", "phi3 of 12", "bloom", "mixtral", "gpt_oss", "deepseek_v3"])
def test_transposed_fused_and_packed_matrices(family, text, reduce):
    twelve = {
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "hidden_size": 96,
    }  # fused rows: no multiple of o_proj's
    model = tiny("phi3", **twelve) if family == "phi3 of 12" else tiny(family)
    skeleton = Skeleton(model)
    block = skeleton.blocks[0]
    criterion = criterion_from(text)
    contributions = own_layout_contributions(skeleton, block, 0, criterion)
    groups = [g for g in find_all_units(model, skeleton.blocks_name).units if g.block == 0]
    kinds = {group.kind for group in groups}
    assert {"head", "channel"} <= kinds or family == "deepseek_v3"
    for group in groups:
        found = unit_scores(group, contributions, criterion, reduce)
        assert found.shape == (group.count,)
        for unit in range(0, group.count, max(1, group.count // 5)):
            expected = member_by_member(group, unit, contributions, criterion, reduce)
            assert found[unit].item() == pytest.approx(expected, rel=1e-8, abs=1e-12), (group.kind, unit)


def test_units_without_a_scored_member_are_worth_nothing():
    group = next(g for g in find_units(tiny_llama(), "model.layers", 0) if g.kind == "channel")
    assert torch.equal(unit_scores(group, {}, criterion_from("magnitude")), torch.zeros(group.count).double())
