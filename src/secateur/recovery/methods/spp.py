"""SPP: every weight that stays is scaled by low-rank factors; zeros cannot become anything else.

Shape legend: ``B`` batch, ``T`` tokens, ``I`` input features, ``O`` output features, ``R`` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.recovery.methods.base import Method, Student, Task, only_trained
from secateur.recovery.places import block_linears
from secateur.recovery.sharding import placed_like, whole


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


class ScaledLinear(nn.Module):
    """``y = W x + b + s W' dropout(x)`` with ``W' = W * RepeatRows(alpha, O / R) * beta`` (arXiv 2405.16057; methods §6.1).

    Row ``i`` is scaled by ``alpha``'s row ``i // (O / R)`` and by its own ``beta``. ``W`` and ``b`` are frozen.

    Args:
        base: the layer.
        rank: R; divides O.
        scaling: s.
        dropout: of the input of ``W'`` alone.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, nn.Dropout(dropout)
        place: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.alpha_RI = nn.Parameter(torch.empty(rank, base.in_features, **place))
        self.beta_O1 = nn.Parameter(torch.zeros(base.out_features, 1, **place))
        nn.init.kaiming_uniform_(self.alpha_RI, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The layer's own, for models that look at it."""
        return self.base.weight

    def forward(self, x_BTI: Tensor) -> Tensor:
        """``(..., I) -> (..., O)``, a chunk of rows at a time: no ``(O, I)`` matrix besides ``W`` ever exists."""
        dropped_BTI = self.dropout(x_BTI)
        parts = [
            F.linear(dropped_BTI * alpha_I, weight_KI)
            for alpha_I, weight_KI in zip(self.alpha_RI, self.base.weight.chunk(len(self.alpha_RI)), strict=True)
        ]
        result: Tensor = self.base(x_BTI) + torch.cat(parts, -1) * self.beta_O1.squeeze(1) * self.scaling
        return result

    @torch.no_grad()
    def merged(self) -> Tensor:
        """``W + s W'``, ``(O, I)``; shared out as ``W`` is."""
        weight_OI = whole(self.base.weight)
        repeated_OI = self.alpha_RI.repeat_interleave(len(weight_OI) // len(self.alpha_RI), 0)
        new_OI = weight_OI + self.scaling * (weight_OI * repeated_OI * self.beta_O1)
        return placed_like(new_OI, self.base.weight)


class ScaledStudent(Student):
    """A model whose linear layers are scaled."""

    def merged(self) -> dict[str, Tensor]:
        return {
            f"{name}.weight": module.merged()
            for name, module in self.model.named_modules()
            if isinstance(module, ScaledLinear)
        }


class SPP(Method):
    """Sparsity-preserved tuning (arXiv 2405.16057; methods §6), with the published defaults; the schedule is the house's.

    ``beta`` starts at zero, so training starts with the model as it is. Where the rank does not divide a layer's outputs,
    that layer takes the largest divisor below it. The scale stays ``alpha / rank`` as given: no sum runs over the rank.
    """

    name = "spp"
    title = "SPP"

    def defaults(self) -> dict[str, Any]:
        # Published: s = 16 / 8 beside a rank that is always 16.
        return {
            "rank": 16,
            "alpha": 32,
            "dropout": 0.05,
            "learning_rate": 4e-3,
            "weight_decay": 0.001,
            "batch_size": 128,
        }

    @contextmanager
    def student(self, task: Task) -> Iterator[Student]:
        rank, alpha, dropout = task.settings.low_rank()
        scaled, smaller = dict[str, ScaledLinear](), dict[int, int]()
        for name, base in block_linears(task.model).items():
            own = largest_divisor(base.out_features, rank)
            if own != rank:
                smaller[base.out_features] = own
            scaled[name] = ScaledLinear(base, own, alpha / rank, dropout)
        for outputs, own in sorted(smaller.items()):
            task.notes.append(f"rank {rank} does not divide {outputs} outputs; layers of that size take rank {own}")
        factors = [factor for layer in scaled.values() for factor in (layer.alpha_RI, layer.beta_O1)]
        with only_trained(task.model, []):
            try:
                for name, layer in scaled.items():
                    task.model.set_submodule(name, layer)
                for factor in factors:
                    factor.requires_grad_(True)
                yield ScaledStudent(task.model)
            finally:
                for name, layer in scaled.items():
                    task.model.set_submodule(name, layer.base)
