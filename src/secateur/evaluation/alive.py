"""The most memory that a forward's tensors take at once, counted and not observed: the same on every machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.checkpoint.architecture import call_model
from secateur.evaluation.perplexity import evaluating


def peak_memory(model: nn.Module, ids_BT: torch.Tensor) -> int:
    """Bytes of the weights and of the tensors alive beside them, at most, in one forward over ``(B, T)`` without a cache.

    What an operator takes for itself while it runs is not counted.
    """
    held = {
        id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]
    }
    storages = {storage.data_ptr(): storage.nbytes() for storage in held.values()}
    with evaluating(model), Alive(set(storages)) as alive:
        call_model(model, {"input_ids": ids_BT.to(next(model.parameters()).device)})
    return sum(storages.values()) + alive.most


class Alive(TorchDispatchMode):
    """Adds up the storages that operators return, each once, until nothing holds them any more.

    Attributes:
        most: bytes alive at once at most.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.seen, self.now, self.most = known, weakref.WeakSet[Any](), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen or storage.data_ptr() in self.known:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
