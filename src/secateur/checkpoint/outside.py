"""Large tables outside the blocks, embeddings and heads, used without being in memory as a whole.

A vocabulary of 128 thousand words times a hidden size of 8192 is four gigabytes in float32, twice where the head is not
tied: more than any block. Rows of an embedding are read as tokens ask for them; a head multiplies in pieces of rows. The
pieces depend on the table's shape alone, so results do not depend on how much memory there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.checkpoint.placement import Placement
from secateur.checkpoint.reader import Checkpoint

PIECE = 256 << 20
"""Bytes of float32 that are multiplied with at once; tables up to this size are brought in whole."""

Pieces = Callable[[], Iterator[tuple[slice, torch.Tensor]]]
"""Gives the pieces of a table ``(V, D)`` anew each time, each with its rows."""


def large_tables(checkpoint: Checkpoint) -> dict[str, nn.Parameter]:
    """Embeddings and heads that are worth leaving on disk, by the names they are stored under."""
    model, tied, inside = checkpoint.skeleton.model, checkpoint.skeleton.tied(), checkpoint.skeleton.blocks_name + "."
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stored = tied.get(name, name)
        if name.startswith(inside) or stored not in checkpoint.tensors or parameter.numel() * 4 <= PIECE:
            continue
        if isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Embedding, nn.Linear)):
            found[stored] = parameter
    return found


class OnDisk(TorchFunctionMode):
    """While active, products and look-ups with the given weightless parameters read what they need from the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, tables: dict[str, nn.Parameter], placement: Placement) -> None:
        super().__init__()
        self._checkpoint, self._placement, self._names = checkpoint, placement, set(tables)
        self._tied = checkpoint.skeleton.tied()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._names and function in (F.embedding, F.linear):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if weight.is_meta:
                return self._look_up(function, weight, args, kwargs)
        return function(*args, **kwargs)

    def _look_up(self, function: Any, weight: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
        name = self._name_of(weight)
        if function is F.embedding:
            ids = args[0] if args else kwargs["input"]
            rows = self._checkpoint.read([name])[name]  # mapped: only the rows that are asked for are read
            return self._placement.numbers(F.embedding(ids.cpu(), rows))
        x = args[0] if args else kwargs["input"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        out: torch.Tensor = _Product.apply(x, lambda: self._pieces(name))
        return out if bias is None else out + bias

    def _name_of(self, weight: torch.Tensor) -> str:
        """The stored name; the model's own tensors are asked, as tying may have replaced the parameter."""
        model = self._checkpoint.skeleton.model
        for name in self._names:
            aliases = [name, *(alias for alias, source in self._tied.items() if source == name)]
            if any(model.get_parameter(alias) is weight for alias in aliases):
                return name
        raise KeyError("a weightless table that is not on disk")

    def _pieces(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        rows, columns = self._checkpoint.tensors[name].shape
        each = max(1, PIECE // (4 * columns))
        for start in range(0, rows, each):
            place = slice(start, min(start + each, rows))
            # Read anew for each piece: mapped pages of the others would count as memory.
            yield place, self._placement.numbers(self._checkpoint.read([name])[name][place])


class _Product(torch.autograd.Function):
    """``x @ weight.T`` and its gradient for ``x``, the weight coming in pieces of rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pieces: Pieces) -> torch.Tensor:
        ctx.pieces = pieces
        return torch.cat([F.linear(x, weight) for _, weight in pieces()], dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total: torch.Tensor | None = None
        for place, weight in ctx.pieces():
            part = gradient[..., place] @ weight
            total = part if total is None else total.add_(part)
        assert total is not None
        return total, None
