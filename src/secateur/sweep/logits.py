"""Logits of a model, or of a variant of it, with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.sweep.entrance import enter, head

Variant = Callable[[int, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@torch.no_grad()
def streamed_logits(checkpoint: Checkpoint, ids_BT: torch.Tensor, variant: Variant | None = None) -> torch.Tensor:
    """Logits ``(B, T, V)`` of ``checkpoint``, each block's tensors replaced by what ``variant`` makes of them.

    Meant for a few tokens: it builds the logits of all of them at once.
    """
    entering: list[torch.Tensor] = []
    calls = enter(checkpoint, [ids_BT], lambda number, hidden: entering.append(hidden))
    x_BTD = entering.pop()
    for index in range(len(checkpoint.skeleton.blocks)):
        with resident_block(checkpoint, index) as block:
            if variant is not None:
                block.load_state_dict(variant(index, block.state_dict()), assign=True)
            x_BTD = calls.run(block, index, 0, x_BTD)
    with head(checkpoint, calls) as logits:
        return logits(ids_BT, x_BTD)
