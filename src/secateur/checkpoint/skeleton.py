"""The model without its weights: every parameter on the meta device, buffers that are computed real."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from secateur.checkpoint.architecture import is_causal, loader_for
from secateur.checkpoint.carved import check_record, record_of
from secateur.checkpoint.matrices import BlockMatrix, Uses, block_matrices, find_uses
from secateur.checkpoint.uneven import PrunedForCausalLM, largest_module_list
from secateur.console import quiet_libraries
from secateur.errors import ModelError, StructureError, reason_of

REMOTE_CLASS = "modeling_secateur.PrunedForCausalLM"
"""What the config of an uneven output names for ``trust_remote_code``."""


class Skeleton:
    """A weightless model of transformers and where its decoder blocks stand.

    Attributes:
        model: the model; parameters on meta, float32 wherever weights are brought in.
        blocks: its decoder blocks.
        blocks_name: their qualified name, for example ``model.layers``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        try:
            self.blocks = largest_module_list(model)
        except ValueError as error:
            raise StructureError(f"{type(model).__name__} has no list of like blocks to prune") from error
        self.blocks_name = next(name for name, module in model.named_modules() if module is self.blocks)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def is_causal(self) -> bool:
        """Whether it is a causal language model: what calibration and perplexity are defined for."""
        return is_causal(self.config)

    def block_prefix(self, index: int) -> str:
        """The name before a block's parameters, for example ``model.layers.3.``"""
        return f"{self.blocks_name}.{index}."

    def block_names(self, index: int) -> list[str]:
        """Names of block ``index``'s stored tensors, as the block itself calls them."""
        return list(self.blocks[index].state_dict().keys())

    def block_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of block ``index``'s stored tensors, as the block itself calls them."""
        return {name: tuple(tensor.shape) for name, tensor in self.blocks[index].state_dict().items()}

    def shapes(self) -> dict[str, torch.Size]:
        """Every stored tensor's shape by its full name; of tensors tied together, all names."""
        return {name: tensor.shape for name, tensor in self.model.state_dict().items()}

    def tied(self) -> dict[str, str]:
        """Names that share another's tensor -> the name that is stored for both."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    def prunable(self, index: int) -> dict[str, BlockMatrix]:
        """The matrices of block ``index`` that masks and scores may touch (methods: the "prunable set"), by name.

        Raises:
            StructureError: the block multiplies with a parameter in a way that is not understood.
        """
        return block_matrices(self.model, self._uses, self.block_prefix(index), self.blocks[index])

    @property
    def keeps_windows_apart(self) -> bool:
        """Whether, of several windows run at once, each matrix is known to be fed one after the other.

        Packed experts get the tokens of all windows in the order of routing.
        """
        if not self._uses.seen:
            return False
        blocks = range(len(self.blocks))
        return all(matrix.expert is None for index in blocks for matrix in self.prunable(index).values())

    @cached_property
    def _uses(self) -> Uses:
        return find_uses(self.model)


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's config.

    Raises:
        ModelError: it cannot be read, or asks for remote code that was not allowed.
    """
    quiet_libraries()
    from transformers import AutoConfig

    try:
        wanted = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        remote = wanted.get("auto_map") or {}
        if remote and not trust_remote_code and not _is_ours(remote):
            raise ModelError(f"{folder} asks to run its own code; read it, and allow it with --trust-remote-code")
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise ModelError(
            f"{folder / 'config.json'} cannot be used: {reason}; get the model's own config.json again"
        ) from error
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{folder} is quantised; give the model in bf16, fp16 or fp32")
    check_record(config, folder)
    return config


def is_uneven(config: Any) -> bool:
    """Whether ``config`` describes a Secateur output whose blocks differ in size."""
    return _is_ours(getattr(config, "auto_map", None) or {})


def _is_ours(auto_map: dict[str, Any]) -> bool:
    """Whether remote code is the file that Secateur writes; it is never run from the folder, our own copy is."""
    return bool(auto_map) and set(auto_map.values()) == {REMOTE_CLASS}


LARGE = 1 << 26
"""Numbers from which a tensor is not even asked of the system: packed experts can exceed the machine's memory."""


class _LargeAreWeightless(TorchFunctionMode):
    """Makes large blank tensors on the meta device, to which accelerate would move them a moment later."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros) and kwargs.get("device") is None:
            sizes = args[0] if args and not isinstance(args[0], int) else args
            if math.prod(sizes) >= LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def build_skeleton(config: Any, trust_remote_code: bool = False) -> Skeleton:
    """Build the model that ``config`` describes without memory for its weights.

    Raises:
        ModelError: transformers cannot build a model from it.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    loader = PrunedForCausalLM if is_uneven(config) else loader_for(config)
    try:
        # Buffers stay real: rotary frequencies are computed, not stored. Without initialisation their cost is small.
        with no_init_weights(), init_empty_weights(include_buffers=False), _LargeAreWeightless():
            if hasattr(loader, "from_config"):
                model = loader.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
            else:
                model = loader._from_config(config, dtype=torch.float32)
    except Exception as error:
        reason = reason_of(error)
        advice = "mend the field it names, or give another model"
        if record_of(config):
            advice = "its carved record does not fit the other fields: get the folder's own config.json again"
        raise ModelError(f"transformers cannot build the model from config.json ({reason}); {advice}") from error
    model.eval()
    model.set_experts_implementation("eager")  # one product an expert, with the tokens that go to it
    model.tie_weights()  # replacing parameters by weightless ones has undone the ties
    model.requires_grad_(False)
    return Skeleton(model)
