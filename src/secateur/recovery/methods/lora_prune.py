"""LoRAPrune: heads and channels leave while LoRA trains, chosen by the gradients of its factors alone.

Shape legend: ``O`` output features, ``I`` input features, ``R`` LoRA rank, ``U`` units of a group, ``C`` indices of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.errors import RecipeError, StructureError
from secateur.options import Options
from secateur.recovery.methods.base import Method, Student, Task
from secateur.recovery.methods.lora import LoraStudent
from secateur.recovery.places import block_linears
from secateur.recovery.sharding import whole
from secateur.structure import UnitGroup

KINDS = ("head", "channel")


def expected_change(lora_A_RI: Tensor, lora_B_OR: Tensor, gradient_A_RI: Tensor, gradient_B_OR: Tensor) -> Tensor:
    """``gB A + B gA - gB gA``, ``(O, I)``: by how much a step of SGD of rate 1 lowers ``B A`` (arXiv 2305.18403 eq. 8)."""
    return gradient_B_OR @ lora_A_RI + lora_B_OR @ gradient_A_RI - gradient_B_OR @ gradient_A_RI


def ratio_at(step: int, steps: int, final: float) -> float:
    """The share of units that is to be gone: 0 for a tenth of the run, then cubic, ``final`` for the last tenth."""
    if step >= 0.9 * steps:
        return final
    if step <= 0.1 * steps:
        return 0.0
    return final - final * (1 - (step - 0.1 * steps) / (0.8 * steps)) ** 3


def unit_sums(importance_OI: Tensor, dim: int, index_UC: Tensor) -> Tensor:
    """The importance of each unit in one matrix, ``(U,)``: the sum over all it owns along ``dim``."""
    return importance_OI.sum(1 - dim)[index_UC].sum(1)


class _Units:
    """One group of a block under training.

    Attributes:
        scores: for each matrix of the group, the running importance of its units, ``(U,)``.
        keep_U: true for units that are still there.
    """

    def __init__(self, group: UnitGroup, prefix: str, layers: Mapping[str, nn.Module], device: torch.device) -> None:
        self.group = group
        self.members = []
        self.consumers: dict[str, Tensor] = {}
        for member in group.members:
            name = prefix + member.parameter
            if name not in layers:
                continue  # biases and norms follow their matrices
            index_UC = torch.as_tensor(member.index_UC, device=device)
            self.members.append((layers[name], member.dim, index_UC))
            if member.role == "consumer":
                self.consumers[name] = index_UC
        if not self.members or not self.consumers:
            raise StructureError(
                f"the {group.kind} units of block {group.block} are not in nn.Linear layers alone, so LoRAPrune cannot score them"
            )
        self.scores = [torch.zeros(group.count, device=device) for _ in self.members]
        self.keep_U = torch.ones(group.count, dtype=torch.bool, device=device)

    def total_U(self) -> Tensor:
        """Each matrix's scores in parts of their norm, added up: units are compared within their group alone."""
        return torch.stack([score_U / (score_U.norm() + 1e-8) for score_U in self.scores]).sum(0)

    def remove(self, ratio: float) -> None:
        """Leave out the lowest ``int(U * ratio)`` units; those that are gone stay so."""
        total_U = self.total_U().masked_fill(~self.keep_U, -1.0)
        lowest = total_U.argsort(stable=True)[: int(self.group.count * ratio)]
        self.keep_U.fill_(True)[lowest] = False


class PruningStudent(LoraStudent):
    """A LoRA student that loses units on its way."""

    finishes = True

    def __init__(self, wrapped: Any, units: Sequence[_Units], options: LoRAPruneOptions) -> None:
        super().__init__(wrapped)
        self._units, self.options = list(units), options

    @torch.no_grad()
    def before_update(self, step: int, steps: int) -> None:
        """Fold this step's gradients into the scores, and every so often let the lowest units go."""
        found = [
            [unit_sums(_importance(layer), dim, index_UC) for layer, dim, index_UC in units.members]
            for units in self._units
        ]
        if all(bool(sum_U.isfinite().all()) for sums in found for sum_U in sums):
            for units, sums in zip(self._units, found, strict=True):
                for score_U, sum_U in zip(units.scores, sums, strict=True):
                    score_U.mul_(self.options.decay).add_(sum_U, alpha=1 - self.options.decay)
        last = step >= 0.9 * steps
        if (last and step - 1 < 0.9 * steps) or (not last and step % self.options.every == 0):
            for units in self._units:
                units.remove(ratio_at(step, steps, self.options.ratio))

    def state(self) -> dict[str, Tensor]:
        state = super().state()
        for number, units in enumerate(self._units):
            state[f"keep.{number}"] = units.keep_U
            state |= {f"score.{number}.{place}": score_U for place, score_U in enumerate(units.scores)}
        return state

    def removed(self) -> list[tuple[UnitGroup, list[int]]]:
        gone = [(units.group, (~units.keep_U).nonzero().squeeze(1).tolist()) for units in self._units]
        return [(group, removed) for group, removed in gone if removed]

    def silenced(self) -> dict[str, Tensor]:
        return {
            name: index_UC[~units.keep_U].flatten()
            for units in self._units
            for name, index_UC in units.consumers.items()
        }


def _importance(layer: Any) -> Tensor:
    """``(Ghat * (W + s B A))^2``, ``(O, I)``, from whole gradients that nothing has clipped."""
    (adapter,) = layer.active_adapters
    lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    change_OI = expected_change(lora_A, lora_B, lora_A.grad, lora_B.grad)
    return (change_OI * (whole(layer.get_base_layer().weight) + layer.get_delta_weight(adapter))).square_()


class LoRAPruneOptions(Options):
    ratio: float = Field(default=0.5, gt=0, lt=1)
    every: int = Field(default=10, ge=1)
    decay: float = Field(default=0.9, ge=0, lt=1)


class LoRAPrune(Method):
    """Prunes while it tunes (arXiv 2305.18403; methods §5): ``ratio`` of the heads and MLP channels of every block leave.

    Importance is ``(Ghat * (W + s B A))^2`` with ``Ghat`` from the factors' gradients, a running mean over steps (``decay``),
    summed over what a unit owns; with grouped queries the unit is a whole KV group. The schedule is the published one, every
    ``every`` steps, and the ratio is exact from nine tenths of the run on. What leaves is masked in training and cut after it.
    """

    name = "lora-prune"
    title = "LoRAPrune"
    options_type = LoRAPruneOptions
    needs_units = True

    def defaults(self) -> dict[str, Any]:
        return {"rank": 8, "alpha": 16, "dropout": 0.05, "learning_rate": 1e-4, "batch_size": 128}

    @contextmanager
    def student(self, task: Task) -> Iterator[Student]:
        from secateur.recovery.adapters import adapted

        if task.structure is None:
            raise RecipeError("LoRAPrune needs the units of the model; give its structure")
        if task.settings.patience is not None:
            raise RecipeError("lora-prune reaches its ratio at the end of the run and has no --patience; leave it out")
        groups = [group for group in task.structure.units if group.kind in KINDS]
        if not groups:
            raise StructureError("no heads or channels were found that could leave, so LoRAPrune has nothing to prune")
        linears = block_linears(task.model)
        prefix = task.blocks_name()
        with adapted(task.model, linears, task.masks, *task.settings.low_rank()) as wrapped:
            base = wrapped.get_base_model()
            layers = {f"{name}.weight": base.get_submodule(name) for name in linears}
            device = next(base.parameters()).device
            units = [_Units(group, f"{prefix}.{group.block}.", layers, device) for group in groups]
            hooks = [
                layers[name].register_forward_pre_hook(_gate(one, index_UC))
                for one in units
                for name, index_UC in one.consumers.items()
            ]
            try:
                yield PruningStudent(wrapped, units, self.options)
            finally:
                for hook in hooks:
                    hook.remove()


def _gate(units: _Units, index_UC: Tensor) -> Any:
    """Zeroes what removed units feed a layer, which is exactly their removal."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        x_BTI, *others = arguments
        keep_I = torch.ones(x_BTI.shape[-1], dtype=x_BTI.dtype, device=x_BTI.device)
        keep_I[index_UC[~units.keep_U].flatten()] = 0
        return (x_BTI * keep_I, *others)

    return hook
