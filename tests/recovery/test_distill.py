"""Distillation: the dense model teaches, no labels are needed, and what cannot teach is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_models import tiny_llama as larger_llama
from tiny_recovery import learnable_windows, mask_half, tiny_llama, weights
from torch.nn import functional as F

import secateur
from secateur.errors import ModelError, RecipeError
from secateur.recovery import RecoverySettings, Teacher, recover_model
from secateur.recovery.methods import Task
from secateur.recovery.methods.distill import Distill, DistillOptions, divergence, hidden_error


def distilled(**options) -> RecoverySettings:
    named = ",".join(f"{name}={value}" for name, value in options.items())
    return RecoverySettings(
        method=f"distill:{named}" if named else "distill",
        steps=16,
        batch_size=4,
        held_out=8,
        learning_rate=1e-2,
    )


def divergence_from(teacher, model, ids_NT) -> float:
    with torch.no_grad():
        log_p, log_q = (m(input_ids=ids_NT).logits.double().log_softmax(-1) for m in (teacher, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_the_loss_is_the_divergence_written_out():
    student_BTV, teacher_BTV = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    wanted = 0.0
    for b in range(2):
        for t in range(3):
            p, q = (F.softmax(logits[b, t] / 2.5, -1) for logits in (teacher_BTV, student_BTV))
            wanted += float((p * (p / q).log()).sum())
    assert float(divergence(student_BTV, teacher_BTV, 2.5)) == pytest.approx(2.5**2 * wanted / 6, rel=1e-5)
    assert float(divergence(teacher_BTV, teacher_BTV, 2.5)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("student", ["lora", "full"])
def test_random_text_brings_the_student_nearer_to_its_teacher_and_zeros_stay(student):
    """Tokens drawn at random have nothing to teach but what the dense model says of them."""
    ids_NT = torch.randint(0, 128, (40, 16), generator=torch.Generator().manual_seed(7))
    teacher, model = tiny_llama(), tiny_llama()
    masks, before = mask_half(model), weights(teacher)
    first = divergence_from(teacher, model, ids_NT)
    done = recover_model(model, ids_NT, distilled(student=student), masks, teacher=Teacher(teacher))
    assert divergence_from(teacher, model, ids_NT) < 0.8 * first
    assert done.looks[-1][1] < 0.9 * done.looks[0][1]
    assert done.looks[0][1] != pytest.approx(done.held_out_before, abs=0.1)  # what is looked at is the divergence
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(teacher).items())
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_hidden_states_of_the_blocks_that_both_have_come_nearer():
    teacher, model = tiny_llama(num_hidden_layers=3), tiny_llama(num_hidden_layers=3)
    del model.model.layers[1]
    mask_half(model)
    known = Teacher(teacher, kept=[0, 2])
    ids_BT = learnable_windows(4)
    method = Distill(DistillOptions(student="full", hidden=1.0))
    task = Task(model, {}, dict.fromkeys(weights(model), torch.float32), distilled(student="full", hidden=1.0), known)
    with method.student(task) as student:
        loss = student(ids_BT).item()
    with torch.no_grad():
        theirs = teacher.model(ids_BT, output_hidden_states=True).hidden_states
        seen = []
        hook = teacher.model.layers[2].register_forward_hook(lambda m, a, out: seen.append(out))
        logits = teacher(ids_BT).logits
        hook.remove()
        hook = model.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out))
        mine = model.model(ids_BT, output_hidden_states=True).hidden_states
        hook.remove()
        wanted = float(divergence(model(ids_BT).logits, logits, 1.0))
    errors = [hidden_error(mine[1], theirs[1]), hidden_error(seen[1], seen[0])]
    assert loss == pytest.approx(wanted + float(sum(errors) / 2), rel=1e-5)
    with pytest.raises(ModelError, match="3 blocks and the pruned model 2"), method.student(
        Task(model, {}, {}, task.settings, Teacher(teacher))
    ):  # fmt: skip
        pass
    wide = Teacher(tiny_llama(hidden_size=64, head_dim=16))
    with pytest.raises(ModelError, match="hidden channels were cut"), method.student(
        Task(model, {}, {}, task.settings, wide)
    ):  # fmt: skip
        pass


def test_a_share_of_labels():
    teacher, model = tiny_llama(), tiny_llama()
    mask_half(model)
    ids_BT, settings = learnable_windows(4), distilled(labels=0.25)
    plain = float(model(input_ids=ids_BT, labels=ids_BT).loss.detach())
    task = Task(model, {}, dict.fromkeys(weights(model), torch.float32), settings, Teacher(teacher))
    with settings.parsed_method().student(task) as student:
        loss = float(student.eval()(ids_BT).detach())
    assert loss == pytest.approx(0.75 * divergence_from(teacher, model, ids_BT) + 0.25 * plain, rel=1e-4)


def test_without_a_teacher_it_is_refused():
    with pytest.raises(RecipeError, match="needs the dense model"):
        recover_model(tiny_llama(), learnable_windows(), distilled())


def test_the_command_finds_the_teacher_and_refuses_what_cannot_teach(
    llama_folder, windows_file, tmp_path, command, same_process
):
    secateur.prune(str(llama_folder), tmp_path / "cut", unit="channel", ratio=0.5, calibration=str(windows_file))
    words = ["recover", tmp_path / "cut", "--data", windows_file, "--method", "distill:student=full", "--steps", 4]
    code, out, _ = command(*words, "--out", tmp_path / "tuned", "--learning-rate", "1e-3", "--json")
    assert code == 0
    training = json.loads(out)["training"]
    assert training["method"] == "distill:student=full,temperature=1.0,hidden=0.0,labels=0.0"
    assert [step for step, _ in training["looks"]] == [0, 1, 2, 3, 4]

    def refused(*given) -> str:
        code, out, err = command(*given, "--out", tmp_path / "new")
        assert (code, out, "Traceback" in err) == (2, "", False)
        assert not list(tmp_path.glob("new*"))
        return err

    assert "which model it was pruned from" in refused("recover", llama_folder, *words[2:])
    assert "no option 'temp'" in refused(*words, "--method", "distill:temp=2")
    assert "has no --rank" in refused(*words, "--rank", 4)
    shutil.copytree(llama_folder, tmp_path / "kept")
    larger_llama(initializer_range=0.1).save_pretrained(llama_folder)
    assert "is not the model any more" in refused(*words)
    shutil.rmtree(llama_folder)
    assert "cannot be opened" in refused(*words)
    larger_llama(vocab_size=130).save_pretrained(llama_folder)
    (tmp_path / "cut" / "secateur" / "plan.json").unlink()
    assert "different tokenizers" in refused(*words)
