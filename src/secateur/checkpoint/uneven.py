"""Models whose blocks differ in size, for any family of transformers.

This file stands alone (torch and transformers only) because it is copied as ``modeling_secateur.py`` into every
output whose blocks differ, where ``trust_remote_code=True`` loads it. Inside Secateur, ``secateur.load`` uses it directly.
The sizes themselves stand in the config as transformers' own ``per_layer_config``.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from torch import nn


def largest_module_list(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the ``ModuleList`` of like modules that holds the most parameters."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(item) for item in module}) == 1
    ]
    if not lists:
        raise ValueError("this model has no list of like blocks")
    return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))


@functools.cache
def uneven_class(base: type) -> type:
    """The subclass of ``base`` that builds every block from its own layer's config."""

    def initialise(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(uneven, self).__init__(config, *args, **kwargs)
        blocks = largest_module_list(self)
        for index in range(len(blocks)):
            layer_config = config.per_layer_config[index]
            layer_config._attn_implementation = config._attn_implementation
            blocks[index] = type(blocks[index])(layer_config, index)
        self.post_init()

    uneven: Any = type(f"Pruned{base.__name__}", (base,), {"__init__": initialise, "__module__": base.__module__})
    return uneven


class PrunedForCausalLM:
    """What ``AutoModelForCausalLM`` finds through the config's ``auto_map``: it hands over to the family's own class."""

    @staticmethod
    def model_class(config: Any) -> type:
        return uneven_class(getattr(transformers, config.architectures[0]))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """``AutoModel`` announces itself to every remote class; there is nothing to note down."""

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if config is None:
            config = transformers.AutoConfig.from_pretrained(folder)
        return cls.model_class(config).from_pretrained(folder, *args, config=config, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls.model_class(config)._from_config(config, **kwargs)  # type: ignore[attr-defined]
