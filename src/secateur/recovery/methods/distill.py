"""The dense model as teacher: what its pruned version should say again, token by token.

Shape legend: ``B`` batch, ``T`` tokens, ``V`` vocabulary, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import ModelError, RecipeError
from secateur.options import Options
from secateur.recovery.lending import lent
from secateur.recovery.losses import cross_entropy
from secateur.recovery.methods.base import Method, Student, Task
from secateur.recovery.methods.full import Full
from secateur.recovery.methods.lora import LoRA
from secateur.recovery.places import blocks_of
from secateur.recovery.teacher import Teacher

INNER: dict[str, type[Method]] = {method.name: method for method in (LoRA, Full)}


def divergence(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float) -> Tensor:
    """``temperature^2 KL(teacher || student)`` of the softened next-token distributions, a mean over tokens; nats.

    Source: arXiv 1503.02531 §2; its factor keeps gradients of one size whatever the temperature.
    """
    student_BTV, teacher_BTV = (
        logits.float().div(temperature).log_softmax(-1) for logits in (student_BTV, teacher_BTV)
    )
    loss_BT = F.kl_div(student_BTV, teacher_BTV, reduction="none", log_target=True).sum(-1)
    return loss_BT.mean() * temperature**2


def hidden_error(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """Squared distance of two hidden states in parts of the teacher's own size, a mean over tokens."""
    student_BTD, teacher_BTD = student_BTD.float(), teacher_BTD.float()
    size_BT = teacher_BTD.square().sum(-1).clamp_min(1e-12)
    return ((student_BTD - teacher_BTD).square().sum(-1) / size_BT).mean()


class DistilledStudent(Student):
    """Another method's student with the teacher's answers for its loss."""

    def __init__(
        self, inner: Student, teacher: Teacher, options: DistillOptions, pairs: list[tuple[nn.Module, nn.Module]]
    ):
        super().__init__(inner.model)
        # Held as a tuple: as a submodule the teacher would be put into training mode with the student.
        self._others = (inner, teacher, pairs)
        self.options = options

    def forward(self, ids_BT: Tensor) -> Tensor:
        _, teacher, pairs = self._others
        options = self.options
        with _outputs([block for _, block in pairs]) as wanted, torch.no_grad():
            teacher_BTV = teacher.model(input_ids=ids_BT, use_cache=False).logits
        with _outputs([block for block, _ in pairs]) as given:
            student_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        loss = divergence(student_BTV, teacher_BTV, options.temperature)
        if options.labels:
            loss = (1 - options.labels) * loss + options.labels * cross_entropy(student_BTV, ids_BT)
        if pairs:
            errors = [hidden_error(mine, theirs) for mine, theirs in zip(given, wanted, strict=True)]
            loss = loss + options.hidden * torch.stack(errors).mean()
        return loss

    def merged(self) -> dict[str, Tensor]:
        return self._others[0].merged()


class DistillOptions(Options):
    student: Literal["lora", "full"] = "lora"
    temperature: float = Field(default=1.0, gt=0, le=100)
    hidden: float = Field(default=0.0, ge=0, le=1000)
    labels: float = Field(default=0.0, ge=0, lt=1)


class Distill(Method):
    """KL to the dense model's next-token distributions, at every position; it needs no labels, and any text will do.

    ``student`` is what is trained of the pruned model, as by the method of that name. ``hidden`` weighs the error of hidden
    states after the blocks that both have; ``labels`` is the share of plain next-token loss. Source: arXiv 1503.02531.
    """

    name = "distill"
    title = "distillation from the dense model"
    options_type = DistillOptions
    needs_teacher = True

    def defaults(self) -> dict[str, Any]:
        return self._inner().defaults()

    def check(self, model: nn.Module) -> None:
        self._inner().check(model)

    def _inner(self) -> Method:
        return INNER[self.options.student]()

    @contextmanager
    def student(self, task: Task) -> Iterator[Student]:
        teacher = task.teacher
        if teacher is None:
            raise RecipeError("distillation needs the dense model as its teacher; give it")
        with lent(teacher.model, task.workers):
            pairs = self._pairs(task, teacher) if self.options.hidden else []
            with self._inner().student(task) as inner:
                yield DistilledStudent(inner, teacher, self.options, pairs)

    def _pairs(self, task: Task, teacher: Teacher) -> list[tuple[nn.Module, nn.Module]]:
        mine, theirs = list(blocks_of(task.model)), list(blocks_of(teacher.model))
        kept = teacher.kept if teacher.kept is not None else range(len(theirs))
        if len(kept) != len(mine):
            raise ModelError(
                f"the teacher has {len(theirs)} blocks and the pruned model {len(mine)}, and its plan does not say which "
                "they are; leave the option hidden out"
            )
        sizes = [model.get_input_embeddings().embedding_dim for model in (task.model, teacher.model)]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"hidden channels were cut ({sizes[1]} to {sizes[0]}), so hidden states cannot be compared; leave the option "
                "hidden out"
            )
        return [(block, theirs[index]) for block, index in zip(mine, kept, strict=True)]


@contextmanager
def _outputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The hidden states that these modules give while the context lasts, in order."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    kept: Callable[..., None] = keep
    hooks = [module.register_forward_hook(kept) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
