"""A model lent to training: in float32, where it is trained, shared out among workers or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from secateur.recovery.sharding import is_shared, shared_out
from secateur.workers import Workers


@contextmanager
def lent(model: Any, workers: Workers, products: torch.dtype | None = None) -> Iterator[None]:
    """Lend the model in float32 on the device that trains; where weights are shared out, no device ever holds all blocks.

    Going to float32 and back is exact, so what was not trained returns bit for bit. Buffers that are computed in float32
    (rotary frequencies) must not be cast back with the weights: each tensor returns to its own dtype, and to its own device.

    Args:
        products: see ``shared_out``.
    """
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    before = [(tensor, tensor.device, tensor.dtype) for tensor in _tensors(model)]
    sharing = shared_out(model, workers, here or torch.device("cpu"), products) if workers.shards else nullcontext()
    try:
        with sharing:
            for tensor in _tensors(model):
                if not is_shared(tensor):
                    tensor.data = tensor.data.to(
                        device=here, dtype=torch.float32 if tensor.is_floating_point() else None
                    )
            yield
    finally:
        for tensor, device, dtype in before:
            tensor.data = tensor.data.to(device, dtype)
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache  # the Trainer switches it off


def _tensors(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
