"""Logits of a model, or of a variant of it, with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from secateur.checkpoint.architecture import ModelInputs, named_inputs
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import OuterChange, resident_block
from secateur.sweep.entrance import enter, head

Variant = Callable[[int, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@torch.no_grad()
def streamed_logits(
    checkpoint: Checkpoint,
    inputs: torch.Tensor | ModelInputs,
    variant: Variant | None = None,
    change_outside: OuterChange | None = None,
) -> torch.Tensor:
    """Logits of ``checkpoint``, each block's tensors replaced by what ``variant`` makes of them.

    Meant for a few tokens: it builds the logits of all of them at once. A ``forward`` patched onto a module, of a block
    as well, is used as it is.

    Args:
        inputs: token ids ``(B, T)``, or the model's inputs by name.
        change_outside: gets the tensors outside the blocks by their full names and returns replacements.
    """
    named = named_inputs(inputs)
    entering: list[torch.Tensor] = []
    calls = enter(checkpoint, [named], lambda number, hidden: entering.append(hidden), change_outside)
    x_BTD = entering.pop()
    for index in range(len(checkpoint.skeleton.blocks)):
        with resident_block(checkpoint, index) as block:
            if variant is not None:
                block.load_state_dict(variant(index, block.state_dict()), assign=True)
            x_BTD = calls.run(block, index, 0, x_BTD)
    with head(checkpoint, calls, change_outside) as logits:
        return logits(named, x_BTD)
