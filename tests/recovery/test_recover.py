"""Recovery by LoRA: what changes, what must not, and what happens when it goes wrong."""

from __future__ import annotations

import copy
import json
import random

import numpy
import pytest
import torch
from pydantic import ValidationError
from tiny_recovery import learnable_windows, mask_half, mask_two_of_four, same_bits, tiny_llama, weights
from torch import nn

from secateur.errors import CalibrationError, ModelError, PlanError, RecipeError, SecateurError, StructureError
from secateur.recovery.places import block_linears
from secateur.recovery.recover import recover_model
from secateur.recovery.settings import RecoverySettings, schedule

FAST = RecoverySettings(steps=4, batch_size=4, learning_rate=1e-2, warmup=1, held_out=2)


def test_the_loss_falls_and_the_log_says_so():
    seen = []
    settings = RecoverySettings(steps=30, batch_size=8, learning_rate=2e-2, held_out=4)
    done = recover_model(
        tiny_llama(), learnable_windows(), settings, on_step=lambda step, steps, loss: seen.append((step, steps, loss))
    )
    assert done.losses[-1] < done.losses[0] - 0.5
    assert done.held_out_after < done.held_out_before - 0.5
    assert [step for step, _, _ in seen] == list(range(1, 31))
    assert {steps for _, steps, _ in seen} == {30}
    assert [loss for _, _, loss in seen] == done.losses
    # 36 windows are trained on, so a batch may hold no more than an eighth of them.
    assert (done.steps, done.batch_size, done.windows, done.held_out_windows) == (30, 4, 36, 4)
    assert done.tokens == 30 * 4 * 16
    assert json.loads(json.dumps(done.to_json())) == done.to_json()


def test_the_first_loss_is_plain_cross_entropy_and_accumulation_does_not_change_it():
    ids_NT = learnable_windows(32)
    plain = RecoverySettings(steps=1, batch_size=4, micro_batch=4, held_out=0, dropout=0.0)
    model = tiny_llama()
    with torch.no_grad():
        every = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids_NT]
    whole = recover_model(copy.deepcopy(model), ids_NT, plain).losses[0]
    pieces = recover_model(copy.deepcopy(model), ids_NT, plain.model_copy(update={"micro_batch": 1})).losses[0]
    assert whole == pytest.approx(pieces, abs=1e-6)
    assert min(every) < whole < max(every)
    # All windows in one epoch, each once: the mean of the eight steps' losses at (almost) no learning is the mean loss.
    still = recover_model(
        model, ids_NT, RecoverySettings(epochs=1, batch_size=4, learning_rate=1e-12, held_out=0, dropout=0)
    )
    assert sum(still.losses) / len(still.losses) == pytest.approx(sum(every) / len(every), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_only_block_matrices_change_and_the_model_stays_what_it_was(dtype, masked):
    model = tiny_llama(dtype, attention_bias=True)
    masks = mask_half(model) if masked else None
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    before, modules, config = weights(model), [*model.named_modules()], model.config.to_dict()
    buffers = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.named_buffers()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    attributes = set(vars(model))
    recover_model(model, learnable_windows(), FAST, masks)
    after = weights(model)

    assert [(name, type(module)) for name, module in model.named_modules()] == [(n, type(m)) for n, m in modules]
    assert all(module is now for (_, module), (_, now) in zip(modules, model.named_modules(), strict=True))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert set(vars(model)) == attributes
    assert model.config.to_dict() == config
    assert not model.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [*before] == [*after]
    adapted = {f"{name}.weight" for name in block_linears(model)}
    assert len(adapted) == 14
    for name in before:
        assert before[name].shape == after[name].shape
        assert same_bits(before[name], after[name]) == (name not in adapted), name
    for name, tensor in model.named_buffers():
        assert (tensor.dtype, True) == (buffers[name][0], torch.equal(tensor, buffers[name][1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_stay_zeros_bit_for_bit(dtype):
    model = tiny_llama(dtype)
    masks = mask_half(model)
    recover_model(model, learnable_windows(), FAST, {name: mask.to(torch.uint8) for name, mask in masks.items()})
    for name, mask_OI in masks.items():
        weight_OI = model.get_parameter(name).data
        assert same_bits(weight_OI[~mask_OI], torch.zeros_like(weight_OI[~mask_OI])), name
        assert (weight_OI[mask_OI] != 0).all(), name


def test_an_n_m_pattern_stays():
    model = tiny_llama()
    masks = mask_two_of_four(model)
    recover_model(model, learnable_windows(), FAST, masks)
    for name, mask_OI in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask_OI)
        assert ((model.get_parameter(name) != 0).unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_layers_without_a_mask_are_trained_densely():
    model = tiny_llama()
    masks = mask_half(model)
    some = {name: mask for name, mask in masks.items() if ".0." in name}
    recover_model(model, learnable_windows(), FAST, some)
    assert all(model.get_parameter(name).data[~mask].any() != (name in some) for name, mask in masks.items())


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_the_same_settings_give_the_same_bits_and_another_seed_others(masked):
    def run(seed: int) -> dict[str, torch.Tensor]:
        model = tiny_llama()
        masks = mask_half(model) if masked else None
        torch.manual_seed(random.randrange(1000))  # what the caller drew before must not matter
        recover_model(model, learnable_windows(), FAST.model_copy(update={"seed": seed}), masks)
        return weights(model)

    first, again, other = run(0), run(0), run(1)
    assert all(same_bits(first[name], again[name]) for name in first)
    assert not all(same_bits(first[name], other[name]) for name in first)


def test_the_callers_randomness_and_stdout_are_left_alone(capsys):
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    expected = torch.rand(1).item(), random.random(), numpy.random.rand()
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    model = tiny_llama()
    torch.manual_seed(5)
    recover_model(model, learnable_windows(), FAST)
    assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == expected
    assert capsys.readouterr().out == ""


def test_it_can_be_run_again_on_its_own_result():
    model = tiny_llama()
    masks = mask_half(model)
    first = recover_model(model, learnable_windows(), FAST, masks)
    second = recover_model(model, learnable_windows(), FAST, masks)
    assert second.held_out_before == pytest.approx(first.held_out_after, abs=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("settings", [FAST, FAST.model_copy(update={"held_out": 0})], ids=["held-out", "none"])
def test_a_model_with_inf_is_refused_and_left_as_it_was(settings, masked):
    model = tiny_llama(torch.bfloat16)
    masks = mask_half(model) if masked else None
    model.model.layers[1].mlp.down_proj.weight.data[0, :] = float("inf")
    masks = masks and {name: mask for name, mask in masks.items() if "down_proj" not in name}
    before, modules = weights(model), [type(module) for module in model.modules()]
    with pytest.raises(SecateurError, match=r"nan|inf"):
        recover_model(model, learnable_windows(), settings, masks)
    assert all(same_bits(tensor, before[name]) for name, tensor in weights(model).items())
    assert [type(module) for module in model.modules()] == modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_is_one_sentence_and_leaves_the_model(dtype):
    model = tiny_llama(dtype)
    masks = mask_half(model)
    before, modules = weights(model), [type(module) for module in model.modules()]
    with pytest.raises(SecateurError, match="learning rate"):
        recover_model(model, learnable_windows(), FAST.model_copy(update={"learning_rate": 1e30}), masks)
    assert all(same_bits(tensor, before[name]) for name, tensor in weights(model).items())
    assert [type(module) for module in model.modules()] == modules


def test_an_interruption_leaves_the_model():
    def stop(step: int, steps: int, loss: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    model = tiny_llama()
    before, modules = weights(model), [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        recover_model(model, learnable_windows(), FAST, on_step=stop)
    assert all(same_bits(tensor, before[name]) for name, tensor in weights(model).items())
    assert [type(module) for module in model.modules()] == modules


def test_a_loss_that_breaks_after_the_merge_takes_the_merge_back(monkeypatch):
    from secateur.recovery import recover

    real, calls = recover.held_out_loss, []

    def breaks_the_second_time(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise ModelError("the model's loss on held-out windows is nan")
        return real(*arguments)

    monkeypatch.setattr(recover, "held_out_loss", breaks_the_second_time)
    model = tiny_llama(torch.bfloat16)
    before = weights(model)
    with pytest.raises(ModelError):
        recover_model(model, learnable_windows(), FAST)
    assert all(same_bits(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize(
    ("windows", "batch_size", "micro_batch", "epochs", "expected"),
    [
        # windows, batch, micro, epochs -> steps, micro, accumulation, warm-up
        (50_000, 64, 4, 2, (1562, 4, 16, 100)),  # LLM-Pruner's own run
        (200_000, 64, 4, 2, (6250, 4, 16, 100)),
        (64, 64, 4, 2, (16, 4, 2, 1)),
        (120, 64, 4, 2, (20, 3, 4, 1)),  # 15 is cut into four micro-batches of three
        (7, 64, 4, 1, (7, 1, 1, 1)),
        (1, 64, 4, 1, (1, 1, 1, 0)),
        (1000, 6, 4, 1, (167, 3, 2, 11)),
        (1000, 2, 4, 1, (500, 2, 1, 32)),
    ],
)
def test_the_schedule_scales_to_the_data(windows, batch_size, micro_batch, epochs, expected):
    settings = RecoverySettings(batch_size=batch_size, micro_batch=micro_batch, epochs=epochs)
    plan = schedule(settings, windows)
    assert (plan.steps, plan.micro_batch, plan.accumulation, plan.warmup) == expected
    assert plan.batch_size <= batch_size


def test_the_number_of_steps_can_be_given():
    assert schedule(RecoverySettings(steps=3), 1000).steps == 3
    assert schedule(RecoverySettings(steps=3, warmup=50), 1000).warmup == 2


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (19, 1), (40, 2)])
def test_a_twentieth_is_held_out(count, held_out):
    done = recover_model(tiny_llama(), learnable_windows(count), RecoverySettings(steps=1))
    assert (done.held_out_windows, done.windows) == (held_out, count - held_out)
    assert (done.held_out_before is None) == (held_out == 0)


@pytest.mark.parametrize(
    ("ids_NT", "error"),
    [
        (learnable_windows().float(), CalibrationError),
        (learnable_windows()[0], CalibrationError),
        (learnable_windows()[:0], CalibrationError),
        (learnable_windows()[:, :1], CalibrationError),
        (learnable_windows() + 100, CalibrationError),
        (learnable_windows() - 1000, CalibrationError),
        (learnable_windows()[:2], RecipeError),
    ],
    ids=["float", "one-dimension", "no-windows", "one-token", "token-too-large", "token-negative", "all-held-out"],
)
def test_bad_windows_are_refused(ids_NT, error):
    with pytest.raises(error):
        recover_model(tiny_llama(), ids_NT, FAST)


def test_masks_that_do_not_fit_are_refused():
    model = tiny_llama()
    name = "model.layers.0.mlp.up_proj.weight"
    shape = model.get_parameter(name).shape
    with pytest.raises(PlanError, match="does not have"):
        recover_model(model, learnable_windows(), FAST, {"model.layers.9.weight": torch.ones(2, 2)})
    with pytest.raises(PlanError, match="48, 32"):
        recover_model(model, learnable_windows(), FAST, {name: torch.ones(32, 48)})
    with pytest.raises(PlanError, match="not zero"):
        recover_model(model, learnable_windows(), FAST, {name: torch.zeros(shape)})


def test_a_model_without_blocks_is_refused():
    with pytest.raises(StructureError, match="like blocks"):
        recover_model(nn.Linear(3, 3), learnable_windows(), FAST)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"learning_rate": 0}, {"epochs": 0}, {"ranks": 8}])
def test_settings_are_validated(wrong):
    with pytest.raises(ValidationError):
        RecoverySettings(**wrong)
