"""What precedes and what follows the blocks, run through the model's own forward with the blocks as pass-throughs.

Because the model itself calls the blocks, every argument (rotary embeddings, masks, sliding windows) is right without
being known by name, and soft caps and scales after the head stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.checkpoint.architecture import ModelInputs, call_model
from secateur.checkpoint.placement import HERE, Placement
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import OuterChange, resident_block, resident_outer
from secateur.checkpoint.skeleton import Skeleton
from secateur.errors import ModelError


class _LastBlockReached(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside the model's forward once the last block has been reached."""


@dataclass
class BlockCalls:
    """How the model calls its blocks.

    Attributes:
        arguments: for each block, for each micro-batch, what came beside the hidden states.
        returns_tuple: whether the model expects a tuple of a block, whose first item is the hidden states.
    """

    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]
    returns_tuple: bool = False
    _known: list[Any] = field(default_factory=list)

    def run(self, block: nn.Module, index: int, batch: int, x_BTD: torch.Tensor) -> torch.Tensor:
        """Run one block on one micro-batch the way the model would."""
        args, kwargs = self.arguments[index][batch]
        out = block(x_BTD, *args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.shape != x_BTD.shape:
            raise ModelError(f"block {index} does not return hidden states as it was given; this model cannot be swept")
        return hidden

    def record(self, index: int, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        """Keep ``arguments``; equal tensors of earlier calls are shared, not kept again."""
        self.arguments[index].append(pytree.tree_map(self._shared, arguments))

    def _shared(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        for known in self._known:
            if known is value or (
                known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)
            ):
                return known
        self._known.append(value)
        return value


@contextmanager
def _blocks_replaced(skeleton: Skeleton, forward: Callable[..., Any]) -> Iterator[None]:
    """While the context lasts every block's forward is ``forward(index, hidden, args, kwargs)``; attributes stay.

    A forward that was patched before (a block made the identity) is back afterwards.
    """

    def bound(index: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if args:
                return forward(index, args[0], args[1:], kwargs)
            return forward(index, kwargs.pop("hidden_states"), (), kwargs)

        return call

    before = [block.__dict__.get("forward") for block in skeleton.blocks]
    try:
        for index, block in enumerate(skeleton.blocks):
            block.forward = bound(index)
        yield
    finally:
        for block, patched in zip(skeleton.blocks, before, strict=True):
            del block.__dict__["forward"]
            if patched is not None:
                block.forward = patched


def enter(
    checkpoint: Checkpoint,
    batches: Sequence[ModelInputs],
    take: Callable[[int, torch.Tensor], None],
    change: OuterChange | None = None,
    placement: Placement = HERE,
) -> BlockCalls:
    """Run what precedes the blocks on every micro-batch of inputs.

    Args:
        change: what becomes of the tensors outside the blocks.
        placement: where it is computed.
        take: called with each micro-batch's number and the hidden states ``(B, T, D)`` that enter block 0.

    Returns:
        how the blocks are called.
    """
    skeleton = checkpoint.skeleton
    last = len(skeleton.blocks) - 1
    calls = BlockCalls([[] for _ in skeleton.blocks])

    def pass_through(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.record(index, (args, kwargs))
        if index == 0:
            number = len(calls.arguments[0]) - 1
            if number == 0:
                calls.returns_tuple = _returns_tuple(checkpoint, placement, hidden, args, kwargs)
            take(number, hidden)
        if index == last:
            raise _LastBlockReached
        return (hidden,) if calls.returns_tuple else hidden

    outer = resident_outer(checkpoint, change, placement)
    with torch.no_grad(), outer as model, _blocks_replaced(skeleton, pass_through):
        for inputs in batches:
            try:
                call_model(model, {name: tensor.to(placement.device) for name, tensor in inputs.items()})
            except _LastBlockReached:
                continue
            raise ModelError(f"the forward of {type(model).__name__} does not run through its last block")
    return calls


def _returns_tuple(
    checkpoint: Checkpoint,
    placement: Placement,
    hidden: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    """Ask block 0's class what it returns, by running it once with its weights: the block itself is patched now."""
    with resident_block(checkpoint, 0, placement) as block:
        return isinstance(type(block).forward(block, hidden, *args, **kwargs), tuple)


@contextmanager
def head(
    checkpoint: Checkpoint,
    calls: BlockCalls,
    change: OuterChange | None = None,
    placement: Placement = HERE,
) -> Iterator[Callable[[ModelInputs, torch.Tensor], torch.Tensor]]:
    """What follows the blocks, as a function from (inputs, hidden states ``(B, T, D)``) to logits."""
    skeleton = checkpoint.skeleton
    last = len(skeleton.blocks) - 1
    current: list[torch.Tensor] = []

    def pass_through(index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = current[0] if index == last else hidden
        return (hidden,) if calls.returns_tuple else hidden

    outer = resident_outer(checkpoint, change, placement)
    with outer as model, _blocks_replaced(skeleton, pass_through):

        def logits(inputs: ModelInputs, hidden_BTD: torch.Tensor) -> torch.Tensor:
            current[:] = [hidden_BTD]
            try:
                on_device = {name: tensor.to(placement.device) for name, tensor in inputs.items()}
                return call_model(model, on_device).logits.float()
            finally:
                current.clear()

        yield logits
