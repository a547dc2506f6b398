"""The contract of a recovery method: what of the model is trained, towards what, and what becomes of it at the end.

Shape legend: ``B`` batch, ``T`` tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.options import Named, Options
from secateur.recovery.losses import next_token_loss
from secateur.recovery.places import block_linears, blocks_of
from secateur.recovery.sharding import local
from secateur.recovery.teacher import Teacher
from secateur.structure import Structure, UnitGroup
from secateur.workers import ALONE, Workers

if TYPE_CHECKING:
    from secateur.recovery.settings import RecoverySettings


@dataclass(frozen=True)
class Task:
    """One model to recover.

    Attributes:
        model: a causal language model of transformers in float32, where it will be trained; lent.
        masks: by parameter name, true where a weight is kept; of matrices that are sparse on purpose.
        dtypes: by parameter name, the dtype that a weight is rounded to in the end.
        settings: what the user asked for.
        teacher: the dense model, for a method that ``needs_teacher``.
        structure: the model's units, for a method that ``needs_units``.
        workers: the processes that train it together.
        notes: what is worth telling, a sentence each.
    """

    model: Any
    masks: Mapping[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    settings: RecoverySettings
    teacher: Teacher | None = None
    structure: Structure | None = None
    workers: Workers = ALONE
    notes: list[str] = field(default_factory=list)

    def blocks_name(self) -> str:
        """The qualified name of the decoder blocks, for example ``model.layers``."""
        blocks = blocks_of(self.model)
        return next(name for name, module in self.model.named_modules() if module is blocks)


class Student(nn.Module):
    """A model under training, as the loss that is to go down: ``forward(ids_BT)`` is a scalar, a mean over tokens.

    Attributes:
        finishes: only the last step's state is a result.
    """

    finishes: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Mean next-token cross-entropy, unless the method has another loss."""
        return next_token_loss(self.model, ids_BT)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves, by names that are the same in every attempt at the same run."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """All that training changes beside the optimiser's own state; what a checkpoint holds of this worker."""
        return {name: local(parameter) for name, parameter in self.trained().items()}

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor]) -> None:
        """Bring back what ``state`` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def before_update(self, step: int, steps: int) -> None:
        """Called with the gradients of optimiser step ``step`` (from 1) of ``steps``, whole and not yet clipped."""

    def merged(self) -> dict[str, Tensor]:
        """The new float32 values of everything that changed, by the plain model's parameter names; shared out as those are."""
        raise NotImplementedError

    def removed(self) -> list[tuple[UnitGroup, list[int]]]:
        """Units that have left and are still to be cut."""
        return []

    def silenced(self) -> dict[str, Tensor]:
        """By the plain model's parameter names, the inputs (numbers of columns) that removed units gave."""
        return {}


class Method(Named, ABC):
    """How a model is recovered.

    Attributes:
        title: what people call it.
        needs_teacher: whether the dense model has to be there.
        needs_units: whether the model's units have to be known, some of which will leave.
    """

    flag = "method"
    title: ClassVar[str]
    needs_teacher: ClassVar[bool] = False
    needs_units: ClassVar[bool] = False
    options_type: ClassVar[type[Options]] = Options

    @abstractmethod
    def defaults(self) -> dict[str, Any]:
        """The settings that a user did not give; ``rank``, ``alpha`` and ``dropout`` among them if it has them."""

    def check(self, model: nn.Module) -> None:
        """Refuse, by a weightless model, what it cannot train.

        Raises:
            StructureError: the blocks hold no ``nn.Linear``.
        """
        block_linears(model, self.title)

    @abstractmethod
    def student(self, task: Task) -> AbstractContextManager[Student]:
        """Lend the task's model for training; afterwards it is the plain model again, as it came, whatever happened."""


@contextmanager
def only_trained(model: nn.Module, parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let nothing but ``parameters`` require gradients; afterwards all is as before, and no gradient is left."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
        for parameter in parameters:
            parameter.grad = None
