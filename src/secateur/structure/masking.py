"""Masked out: the dense model as if units had never been, for what zeroed weights alone cannot say.

Zeros at the consumers (``mask_tensors``) remove most units exactly. Three things need more: a norm that spans units takes
its statistics over those that stay, a router never chooses an expert that is gone, and a block that is gone hands its
input on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.structure.cutting import ModelCut, Removal


@contextmanager
def masked_out(model: nn.Module, blocks_name: str, cut: ModelCut) -> Iterator[None]:
    """While the context lasts ``model`` runs without what ``cut`` takes; its weights are masked by the caller.

    Weights may be brought in and let go while it lasts: they are looked up when they are used.
    """
    blocks = model.get_submodule(blocks_name)
    with ExitStack() as stack:
        stack.enter_context(masked_out_of(model, cut.outside))
        for index, removals in enumerate(cut.blocks):
            stack.enter_context(masked_out_of(blocks.get_submodule(str(index)), removals))
        for index in cut.dropped:
            stack.enter_context(_handing_on(blocks.get_submodule(str(index))))
        yield


@contextmanager
def masked_out_of(module: nn.Module, removals: Sequence[Removal]) -> Iterator[None]:
    """The same for the removals of one block (or of what stands outside: then ``module`` is the model)."""
    gone: dict[str, list[np.ndarray]] = {}
    never: list[tuple[str, np.ndarray]] = []
    for group, units in removals:
        if not len(units):
            continue
        own = np.asarray(sorted(set(units)), dtype=np.int64)
        for norm in group.norms:
            gone.setdefault(norm.module, []).append(norm.index_UC[own].reshape(-1))
        never += [(m.parameter, m.index_UC[own].reshape(-1)) for m in group.members if m.role == "choice"]
    with ExitStack() as stack:
        for name, indices in gone.items():
            stack.enter_context(_over_survivors(module.get_submodule(name), np.concatenate(indices)))
        if never:
            stack.enter_context(_NeverChosen(module, never))
        yield


@contextmanager
def _handing_on(block: nn.Module) -> Iterator[None]:
    """Let a block give back what it was given, in the form in which it returns.

    Its forward is patched, not hooked: whoever replaces the forward for a while (a sweep) replaces this too.
    """
    original: Callable[..., Any] = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


@contextmanager
def _over_survivors(norm: nn.Module, gone: np.ndarray) -> Iterator[None]:
    """Let a norm see the survivors alone; where something is gone it gives zero."""
    original: Callable[..., Tensor] = norm.forward
    switches: dict[str, Any] = vars(norm)  # attributes as such: what they mean to nn.Module does not matter here

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        width = x.shape[-1]
        stays = torch.from_numpy(np.setdiff1d(np.arange(width), gone)).to(x.device)
        whole = {name: p for name, p in norm._parameters.items() if p is not None and p.shape[-1] == width}
        shape = switches.get("normalized_shape")
        try:
            for name, parameter in whole.items():
                norm._parameters[name] = nn.Parameter(parameter.index_select(-1, stays), requires_grad=False)
            if shape is not None:
                switches["normalized_shape"] = (len(stays),)
            result = original(x.index_select(-1, stays), *args, **kwargs)
        finally:
            norm._parameters.update(whole)
            if shape is not None:
                switches["normalized_shape"] = shape
        return torch.zeros_like(x, dtype=result.dtype).index_copy(-1, stays, result)

    norm.forward = forward
    try:
        yield
    finally:
        del norm.forward


class _NeverChosen(TorchFunctionMode):
    """Makes what a router gives for experts that are gone minus infinity, and what it adds to it too."""

    def __init__(self, module: nn.Module, never: list[tuple[str, np.ndarray]]) -> None:
        super().__init__()
        self._module = module
        self._never = never

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor) or not result.is_floating_point() or function not in WEIGHING:
            return result
        for name, indices in self._never:
            used = _stored(self._module, name)
            if any(operand is not result and _same_storage(operand, used) for operand in operands):
                index = torch.from_numpy(indices).to(result.device)
                result = result.index_fill(-1, index, float("-inf"))
        return result


WEIGHING = (
    nn.functional.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.addmm,
    torch.add,
    Tensor.add,
    Tensor.__add__,
)


def _stored(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _same_storage(left: Tensor, right: Tensor) -> bool:
    if left is right:
        return True
    return (
        not left.is_meta
        and left.device == right.device
        and left.data_ptr() == right.data_ptr()
        and left.numel() == right.numel()
    )
