"""Training all weights of the blocks: zeros stay through gradient, optimiser and weight decay; masters are float32."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_recovery import (
    learnable_windows,
    mask_half,
    mask_two_of_four,
    same_bits,
    tiny_llama,
    weights,
)

from secateur.errors import RecipeError
from secateur.recovery import RecoverySettings, recover_model, recovery_settings
from secateur.recovery import training as training_module
from secateur.recovery.methods import Task
from secateur.recovery.methods.full import Full

FULL = RecoverySettings(
    method="full", steps=4, batch_size=4, learning_rate=1e-2, weight_decay=0.1, warmup=1, held_out=2
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [mask_half, mask_two_of_four])
def test_zeros_stay_bit_for_bit_and_everything_else_in_the_blocks_moves(dtype, mask):
    model = tiny_llama(dtype, mlp_bias=True)
    masks = mask(model)
    some = model.get_parameter(name := next(iter(masks))).data
    some[~masks[name]] = -0.0  # a zero with a sign is a zero whose bits stay as well
    before = weights(model)
    recover_model(model, learnable_windows(), FULL, masks)
    for name, after in weights(model).items():
        assert after.dtype == dtype
        if name in masks:
            assert torch.equal(after == 0, before[name] == 0), name
            assert same_bits(after[~masks[name]], before[name][~masks[name]]), name
        changed = not same_bits(after, before[name])
        assert changed == name.startswith("model.layers."), name
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_moments_of_removed_weights_stay_zero_and_so_do_the_masters(monkeypatch):
    model, seen = tiny_llama(), []
    masks = mask_half(model)
    name = "model.layers.1.mlp.up_proj.weight"

    class Looking(training_module._StudentTrainer):
        def _clip_grad_norm(self, module):
            found = super()._clip_grad_norm(module)
            weight = model.get_parameter(name)
            moments = self.optimizer.state.get(weight, {})
            seen.append((weight.dtype, weight.grad, moments.get("exp_avg"), weight.data))
            for tensor in (weight.grad, weight.data, *(moments[key] for key in moments if "exp" in key)):
                assert not tensor[~masks[name]].any()
            return found

    monkeypatch.setattr(training_module, "_StudentTrainer", Looking)
    recover_model(model, learnable_windows(), FULL, masks)
    assert len(seen) == 4
    assert seen[-1][2] is not None


def test_masters_are_float32_so_that_small_steps_add_up():
    """Steps of at most 3e-5 are below half a unit in the last place of most bf16 weights: without masters nothing would move."""
    settings = FULL.model_copy(update={"steps": 30, "learning_rate": 3e-5, "weight_decay": 0.0})
    model = tiny_llama(torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    before = model.get_parameter(name).data.clone()
    recover_model(model, learnable_windows(), settings)
    moved = (model.get_parameter(name).data != before).float().mean()
    assert moved > 0.2


def test_the_loss_falls():
    done = recover_model(
        tiny_llama(), learnable_windows(), FULL.model_copy(update={"steps": 20, "held_out": 4, "weight_decay": 0.0})
    )
    assert done.held_out_after < done.held_out_before - 0.5
    assert done.looks[0] == (0, pytest.approx(done.held_out_before, abs=1e-6))
    assert done.looks[-1] == (20, pytest.approx(done.held_out_after, abs=1e-5))


def test_one_step_is_that_of_plain_adamw():
    ids_NT = learnable_windows(8)
    settings = RecoverySettings(method="full", steps=1, batch_size=1, warmup=0, held_out=0, learning_rate=1e-3, seed=4)
    ours, plain = tiny_llama(), tiny_llama()
    recover_model(ours, ids_NT, settings)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    parameters = [p for name, p in plain.named_parameters() if "layers" in name]
    plain.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    plain(input_ids=ids_NT[order[:1]], labels=ids_NT[order[:1]]).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0).step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


def test_afterwards_the_model_is_as_it_came():
    model = tiny_llama(torch.bfloat16)
    masks, before = mask_half(model), None
    before = weights(model)
    task = Task(model.float(), masks, dict.fromkeys(masks | before, torch.bfloat16), FULL)
    with Full().student(task) as student:
        for parameter in student.trained().values():
            parameter.data.add_(1.0)
    assert all(same_bits(t.to(torch.bfloat16), before[name]) for name, t in weights(model).items())


def test_a_weight_that_would_round_to_zero_keeps_its_value():
    model = tiny_llama(torch.float16)
    masks = mask_half(model)
    name = next(iter(masks))
    model.get_parameter(name).data[masks[name]] = 6e-8  # the smallest number of float16 there is
    before = weights(model)[name]
    settings = FULL.model_copy(update={"steps": 1, "warmup": 0, "learning_rate": 4e-8})
    recover_model(model, learnable_windows(), settings, masks)
    assert torch.equal(model.get_parameter(name) == 0, before == 0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_under_autocast_zeros_stay_and_the_loss_falls(method, monkeypatch):
    """What a GPU does, on the CPU."""
    monkeypatch.setattr(training_module, "autocast_here", lambda: True)
    model = tiny_llama()
    masks = mask_half(model)
    settings = RecoverySettings(
        method=method, steps=12, batch_size=4, learning_rate=1e-2, held_out=4, **({"dropout": 0.0} if method == "lora" else {})
    )  # fmt: skip
    exact = copy.deepcopy(model)
    done = recover_model(model, learnable_windows(), settings, masks)
    assert done.held_out_after < done.held_out_before - 0.05
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    monkeypatch.setattr(training_module, "autocast_here", lambda: False)
    plain = recover_model(exact, learnable_windows(), settings, masks)
    assert done.losses != plain.losses
    assert done.losses[0] == pytest.approx(plain.losses[0], abs=0.02)
    assert {type(module) for module in model.modules()} == {type(module) for module in tiny_llama().modules()}


def test_what_full_training_does_not_have_is_refused():
    with pytest.raises(RecipeError, match="has no --rank"):
        recovery_settings(method="full", rank=4)
    with pytest.raises(RecipeError, match="no method 'ful'; did you mean 'full'"):
        recovery_settings(method="ful")
