"""A block in memory while its weights are fitted: float32 copies of what stays, at the places where the block reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from secateur.removal.decision import BlockDecision


class FittedBlock:
    """The block as its decision leaves it, in dense shapes, with weights that gradients may change.

    Whatever dtype the block computes in, the weights that are fitted are float32; where the block computes in another, it runs
    under autocast.

    Args:
        block: dense, its weights in memory; it is pruned here, and stays so.
        decision: what leaves it.

    Attributes:
        decision: as given, or as chosen anew.
        weights: by the parameter's name, what is fitted: float32, zero where a mask took something.
        stays: by the parameter's name, where weights stay.
    """

    def __init__(self, block: nn.Module, decision: BlockDecision) -> None:
        self.decision = decision
        self._tensors = dict(block.state_dict())
        self.stays = _stays(decision, self._tensors)
        pruned = decision.in_dense_shapes(self._tensors)
        block.load_state_dict(pruned, strict=False, assign=True)
        self.weights: dict[str, nn.Parameter] = {}
        self._left: dict[str, torch.Tensor] | None = None
        for name in self.stays:
            # Rows that a cut takes keep their numbers here, for norms that span units; nothing else reads them.
            weight = nn.Parameter(pruned[name].detach().float().clone())
            module, _, leaf = name.rpartition(".")
            block.get_submodule(module)._parameters[leaf] = weight
            self.weights[name] = weight
        first = next(iter(self.weights.values()), None)
        self._dtype = next((tensor.dtype for tensor in self._tensors.values() if tensor.is_floating_point()), None)
        self._device = first.device if first is not None else torch.device("cpu")

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the context lasts the block may run, in the numbers it computes in."""
        lower = self._dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self._device.type, self._dtype) if lower else nullcontext():
            yield

    def mask_gradients(self) -> None:
        """Forget the gradients of what left, so that it stays zero whatever the optimiser remembers."""
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self.stays[name], 0)

    def copy(self) -> dict[str, torch.Tensor]:
        """The weights as they are now."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def restore(self, weights: dict[str, torch.Tensor]) -> None:
        """Take ``weights`` of an earlier ``copy``."""
        for name, weight in weights.items():
            self.weights[name].copy_(weight)

    @torch.no_grad()
    def choose_again(self, choose: Callable[[], BlockDecision]) -> None:
        """Have masks chosen by the weights as they are now, those outside the mask as they were when they left it."""
        if self._left is None:
            self._left = {name: self._tensors[name].float() for name in self.weights}
        for name, weight in self.weights.items():
            weight.copy_(torch.where(self.stays[name], weight, self._left[name]))
        self._left = self.copy()
        self.decision = choose()
        self.stays = _stays(self.decision, self._tensors)
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.stays[name], 0)

    def numbers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Of every matrix that has something left, by name, what stays of it after the cut: ``(O', I')`` float32."""
        for name, matrix in self.decision.matrices.items():
            rows, columns = self.decision.survivors(name, self._tensors)
            if len(rows) and len(columns):
                rows, columns = (index.to(self._device) for index in (rows, columns))
                yield name, matrix.of(self.weights).detach()[rows[:, None], columns].contiguous()

    def finished(self) -> dict[str, torch.Tensor]:
        """The block's tensors in dense shapes as the decision, with its numbers as they are now, leaves them."""
        return self.decision.in_dense_shapes(self._tensors)


def _stays(decision: BlockDecision, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Where weights stay and are read, by parameter in its own layout."""
    wanted = {matrix.parameter for matrix in decision.matrices.values()}
    stays = {name: torch.zeros_like(tensors[name], dtype=torch.bool) for name in tensors if name in wanted}
    for name, matrix in decision.matrices.items():
        rows, columns = decision.survivors(name, tensors)
        if len(rows) and len(columns):
            view_OI, mask_OI = matrix.of(stays), decision.masks.get(name)
            rows, columns = rows.to(view_OI.device), columns.to(view_OI.device)
            view_OI[rows[:, None], columns] = True if mask_OI is None else mask_OI.to(view_OI.device)
    return stays
