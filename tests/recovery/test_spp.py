"""SPP: the published formula written out, zeros that cannot be revived, and a merge that is what was trained."""

from __future__ import annotations

import pytest
import torch
from tiny_recovery import learnable_windows, mask_half, mask_two_of_four, same_bits, tiny_llama, weights
from torch import nn

from secateur.recovery import RecoverySettings, recover_model
from secateur.recovery.merging import replace_weights, rounded
from secateur.recovery.methods import Task
from secateur.recovery.methods.spp import SPP, ScaledLinear, largest_divisor

FAST = RecoverySettings(method="spp", steps=4, batch_size=4, learning_rate=5e-2, warmup=1, held_out=2)


def disturbed(layer: ScaledLinear) -> ScaledLinear:
    with torch.no_grad():
        layer.alpha_RI.normal_()
        layer.beta_O1.normal_()
    return layer


def test_a_row_is_scaled_by_its_chunks_factor_and_its_own():
    """Number by number, as the paper has it: W'_ij = W_ij alpha_{i // (m/r), j} beta_i and y = W x + s W' x."""
    torch.manual_seed(0)
    base = nn.Linear(5, 12)
    layer = disturbed(ScaledLinear(base, rank=4, scaling=2.0, dropout=0.0))
    x_BI = torch.randn(3, 5)
    merged_OI = torch.zeros(12, 5)
    for i in range(12):
        for j in range(5):
            added = base.weight[i, j] * layer.alpha_RI[i // 3, j] * layer.beta_O1[i, 0]
            merged_OI[i, j] = base.weight[i, j] + 2.0 * added
    torch.testing.assert_close(layer.merged(), merged_OI.detach())
    torch.testing.assert_close(layer(x_BI), x_BI @ merged_OI.T.detach() + base.bias)


def test_dropout_is_of_the_scaled_part_alone():
    base = nn.Linear(6, 4)
    layer = disturbed(ScaledLinear(base, rank=2, scaling=1.5, dropout=0.5)).train()
    x_BI = torch.randn(3, 6)
    torch.manual_seed(9)
    found = layer(x_BI)
    torch.manual_seed(9)
    dropped = nn.functional.dropout(x_BI, 0.5)
    torch.testing.assert_close(found, base(x_BI) + dropped @ (layer.merged() - base.weight).T)


def test_gradients_are_those_of_the_merged_weight():
    base = nn.Linear(6, 8).double()
    layer = disturbed(ScaledLinear(base, rank=4, scaling=2.0, dropout=0.0))
    base.requires_grad_(False)
    x_BI = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    layer(x_BI).square().sum().backward()
    found = [x_BI.grad, layer.alpha_RI.grad, layer.beta_O1.grad]
    alpha, beta, x = (t.detach().requires_grad_() for t in (layer.alpha_RI, layer.beta_O1, x_BI))
    whole = base.weight * (1 + 2.0 * alpha.repeat_interleave(2, 0) * beta)
    nn.functional.linear(x, whole, base.bias).square().sum().backward()
    for one, other in zip(found, (x.grad, alpha.grad, beta.grad), strict=True):
        torch.testing.assert_close(one, other)


def test_no_temporary_of_the_weights_size():
    """Nothing that the forward pass keeps for the backward pass has as many numbers as the weight but the weight itself."""
    base = nn.Linear(64, 96, bias=False).requires_grad_(False)
    layer = disturbed(ScaledLinear(base, rank=16, scaling=2.0, dropout=0.0))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 64, requires_grad=True))
    own = base.weight.untyped_storage().data_ptr()
    assert max(t.numel() for t in kept if t.untyped_storage().data_ptr() != own) < 64 * 96 / 4


def test_it_starts_as_the_model_it_was_given():
    model, ids_NT = tiny_llama(), learnable_windows(2)
    before = model(ids_NT).logits
    task = Task(model, {}, dict.fromkeys(weights(model), torch.float32), FAST)
    with SPP().student(task) as student:
        assert torch.equal(model(ids_NT).logits, before)
        assert all((p.shape[1] == 1) == (not p.any()) for p in student.trained().values())
        assert len(student.trained()) == 28
        sizes = [type(module) for module in model.modules()]
        assert sizes.count(ScaledLinear) == 14
    assert torch.equal(model(ids_NT).logits, before)
    assert sum(isinstance(module, ScaledLinear) for module in model.modules()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merged_model_is_the_trained_one(dtype):
    model, ids_NT = tiny_llama(), learnable_windows(2)
    masks = mask_half(model)
    before = model(ids_NT).logits.detach()
    dtypes = dict.fromkeys(weights(model), dtype)
    with SPP().student(Task(model, masks, dtypes, FAST)) as student:
        for layer in (module for module in model.modules() if isinstance(module, ScaledLinear)):
            with torch.no_grad():
                layer.beta_O1.normal_(std=0.5)
        unmerged = student.eval().model(ids_NT).logits.detach()
        new = student.merged()
    replace_weights(model, rounded(model, new, dtypes, masks))
    after = model(ids_NT).logits.detach()
    assert (unmerged - before).abs().max() > 0.2
    torch.testing.assert_close(after, unmerged, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [mask_half, mask_two_of_four])
def test_zeros_stay_bit_for_bit(dtype, mask):
    model = tiny_llama(dtype)
    masks = mask(model)
    before = weights(model)
    recover_model(model, learnable_windows(), FAST, masks)
    changed = 0
    for name, after in weights(model).items():
        if name in masks:
            assert torch.equal(after == 0, before[name] == 0), name
            assert same_bits(after[~masks[name]], before[name][~masks[name]]), name
            changed += not torch.equal(after, before[name])
        else:
            assert same_bits(after, before[name]), name
    assert changed == len(masks)


def test_the_loss_falls():
    model = tiny_llama()
    masks = mask_half(model)
    done = recover_model(
        model, learnable_windows(), FAST.model_copy(update={"steps": 30, "held_out": 4, "dropout": 0.0}), masks
    )
    assert done.held_out_after < done.held_out_before - 0.3


def test_a_rank_that_does_not_divide_is_lowered_and_said():
    assert [largest_divisor(number, 16) for number in (64, 48, 26, 17, 8)] == [16, 16, 13, 1, 8]
    model = tiny_llama(intermediate_size=26)
    done = recover_model(model, learnable_windows(), FAST)
    assert done.notes == ["rank 16 does not divide 26 outputs; layers of that size take rank 13"]


def test_the_defaults_are_the_published_ones():
    settings = RecoverySettings(method="spp")
    given = (settings.rank, settings.alpha, settings.dropout, settings.learning_rate, settings.weight_decay)
    assert (given, settings.batch_size) == ((16, 32, 0.05, 4e-3, 0.001), 128)
