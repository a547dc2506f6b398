"""Running a model without weights: what one decoder block is called with, found without naming any argument."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.errors import StructureError

BATCH, TOKENS = 2, 3

BlockCall = tuple[tuple[Any, ...], dict[str, Any]]


class _AllCapturedError(Exception):
    """Ends the forward once the last wanted block was reached."""


def on_meta(module: nn.Module) -> dict[str, Tensor]:
    """Return stand-ins on the meta device for all parameters and buffers; shared ones stay shared."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    stand_ins: dict[int, Tensor] = {}
    for _, tensor in tensors:
        if id(tensor) not in stand_ins:
            stand_ins[id(tensor)] = torch.empty_like(tensor, device="meta", requires_grad=False)
    return {name: stand_ins[id(tensor)] for name, tensor in tensors}


def run_without_weights(
    module: nn.Module, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call ``module`` in evaluation mode with its tensors replaced by those in ``state``."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            return functional_call(module, state, args, kwargs, tie_weights=False)
    finally:
        for part, mode in training:
            part.training = mode


TRACEABLE = {"_attn_implementation_internal": "eager", "_experts_implementation_internal": "batched_mm"}
"""A fused attention kernel would hide what it ties; experts in a loop are control flow on data."""


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Let every config of the model ask for the implementations that can be traced, while the context lasts."""
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None))}
    before = [
        (config, name, vars(config)[name]) for config in configs.values() for name in TRACEABLE if name in vars(config)
    ]
    try:
        for config, name, _ in before:
            setattr(config, name, TRACEABLE[name])
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def capture_calls(
    model: nn.Module, blocks: nn.ModuleList, wanted: Sequence[int], inputs: dict[str, Any]
) -> dict[int, BlockCall]:
    """Run the model on ``inputs`` without weights and return the arguments of the ``wanted`` blocks' calls.

    Raises ``StructureError`` if the model cannot be run so.
    """
    calls: dict[int, BlockCall] = {}
    handles = [
        blocks[index].register_forward_pre_hook(_keep(calls, index, len(wanted)), with_kwargs=True) for index in wanted
    ]
    why = "its forward does not call every block"
    try:
        run_without_weights(model, on_meta(model), (), inputs)
    except _AllCapturedError:
        return calls
    except Exception as error:
        why = first_line(error)
    finally:
        for handle in handles:
            handle.remove()
    raise StructureError(
        f"{type(model).__name__} cannot be run without weights on {' and '.join(inputs)} ({why}); its structure cannot be traced, "
        "so it cannot be pruned by structure (weights can still be masked)"
    )


def outputs_read(model: nn.Module, blocks: nn.ModuleList, index: int, inputs: dict[str, Any]) -> set[int]:
    """Return which of the tensors that a block returns are read by any operator of the model after it.

    Some families hand attention weights out of every block and drop them there.
    """
    watch = _Watch()
    handles = [blocks[index].register_forward_hook(lambda module, args, result: watch.begin(result))]
    try:
        with watch:
            run_without_weights(model, on_meta(model), (), inputs)
    except Exception:
        return set(range(len(watch.outputs)))  # not seen to the end: take all of them as read
    finally:
        handles[0].remove()
    return watch.read


class _Watch(TorchDispatchMode):
    """Notes which of the given tensors any operator reads."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.read: set[int] = set()

    def begin(self, result: Any) -> None:
        self.outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.outputs:
            inputs = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            self.read |= {number for number, output in enumerate(self.outputs) if id(output) in inputs}
        return function(*args, **(kwargs or {}))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _keep(calls: dict[int, BlockCall], index: int, total: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[index] = (args, kwargs)
        if len(calls) == total:
            raise _AllCapturedError

    return hook


def ways_to_call(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield arguments to try: a ready 4-D mask spares mask helpers a look at values that do not exist."""
    known = inspect.signature(model.forward).parameters
    open_ended = any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values())
    dtype = next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        config: Any = model.config
        height, width = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        yield {main: torch.zeros(BATCH, config.num_channels, height, width, dtype=dtype, device="meta")}
        return
    if main != "input_ids":
        raise StructureError(
            f"{type(model).__name__} runs on {main}, not on token ids or pixels, so its structure cannot be traced; "
            "it cannot be pruned by structure (weights can still be masked)"
        )
    with torch.device("meta"):
        input_ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
        position_ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
        mask_4d = torch.zeros(BATCH, 1, TOKENS, TOKENS, dtype=dtype)
        mask_2d = torch.ones(BATCH, TOKENS, dtype=torch.long)
    base = {"input_ids": input_ids, "use_cache": False}
    for extra in (
        {"attention_mask": mask_4d, "position_ids": position_ids},
        {"attention_mask": mask_2d, "position_ids": position_ids},
        {"attention_mask": mask_2d},
        {},
    ):
        inputs = {**base, **extra}
        yield {name: value for name, value in inputs.items() if name in known or open_ended}
