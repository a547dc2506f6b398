"""All weights of the blocks, trained themselves; zeros stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from secateur.recovery.methods.base import Method, Student, Task, only_trained
from secateur.recovery.places import block_parameters
from secateur.recovery.sharding import local, placed_like


class FullStudent(Student):
    """A plain model; ``names`` are what is trained of it."""

    def __init__(self, model: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model)
        self._names = list(parameters)

    def merged(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach().clone() for name in self._names}


class Full(Method):
    """Every parameter of the blocks: matrices, biases and norms. Embeddings and head stay as they are.

    Masters, gradients and AdamW's moments are float32, whatever the checkpoint is stored in. A weight under a mask gets no
    gradient, so its moments stay zero and its update is zero; decoupled weight decay multiplies it, and zero stays zero.
    """

    name = "full"
    title = "training all weights of the blocks"

    def defaults(self) -> dict[str, Any]:
        return {"learning_rate": 2e-5}

    def check(self, model: nn.Module) -> None:
        block_parameters(model)

    @contextmanager
    def student(self, task: Task) -> Iterator[Student]:
        parameters = block_parameters(task.model)
        # In the dtype they came in: exact, and half the memory where that is of 16 bits.
        originals = {
            name: local(parameter).to(task.dtypes[name], copy=True).cpu() for name, parameter in parameters.items()
        }
        with only_trained(task.model, parameters.values()):
            hooks = [
                parameter.register_post_accumulate_grad_hook(_masks_gradient(task.masks[name], parameter))
                for name, parameter in parameters.items()
                if name in task.masks
            ]
            try:
                yield FullStudent(task.model, parameters)
            finally:
                for hook in hooks:
                    hook.remove()
                for name, parameter in parameters.items():
                    local(parameter).copy_(originals[name])


def _masks_gradient(mask: Tensor, parameter: Tensor) -> Callable[[Tensor], None]:
    """Takes what reaches removed weights out of a gradient, before anything reads it: the norm it is clipped by included."""
    gone = local(placed_like(~mask.to(parameter.device), parameter))

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        local(parameter.grad).masked_fill_(gone, 0.0)

    return hook
