"""Models that a family's own config cannot describe, for any family of transformers.

This file stands alone (torch and transformers only) because it is copied as ``modeling_secateur.py`` into every output
that needs it, where ``trust_remote_code=True`` loads it. Inside Secateur, ``secateur.load`` uses it directly. The config says
what differs from the family's own model in one of two ways:

* ``per_layer_config``, transformers' own: every block is built from its layer's config;
* ``carved``: the model is built in its dense sizes and then brought into the sizes that stand there, tensor by tensor, with
  the attributes that say these sizes in the modules' own code, and with the constants that have an entry for each head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
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


def carve(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Bring ``model`` from its dense sizes into those of ``record``; what was in resized tensors is lost.

    ``record`` has ``shapes`` (tensor name -> shape), ``attributes`` (module name -> attribute -> value) and ``arguments`` (block
    name -> argument -> dim, period and the entries kept of each period).
    """
    for name, shape in record.get("shapes", {}).items():
        owner, _, leaf = name.rpartition(".")
        module = _named(model, owner)
        kept: dict[str, Any] = module._parameters if module._parameters.get(leaf) is not None else module._buffers
        old = kept.get(leaf)
        if old is None:
            raise ValueError(f"the config's carved record names {name}, which the model does not have")
        new = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
        kept[leaf] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        _tell_sizes(module)
    for name, attributes in record.get("attributes", {}).items():
        module = _named(model, name)
        for attribute, value in attributes.items():
            if type(value) is not int or type(vars(module).get(attribute)) is not int:
                raise ValueError(f"the config's carved record gives {name}.{attribute} the size {value!r}")
            setattr(module, attribute, value)
    for name, arguments in record.get("arguments", {}).items():
        hook = functools.partial(_cut_arguments, arguments)
        _named(model, name).register_forward_pre_hook(hook, with_kwargs=True)


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the config's carved record names {name}, which the model does not have") from error


def _tell_sizes(module: nn.Module) -> None:
    """Let the modules that keep their sizes beside their weights know the new ones."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, transformers.pytorch_utils.Conv1D):
        module.nx, module.nf = weight.shape


def _cut_arguments(arguments: Mapping[str, Any], block: nn.Module, args: Any, kwargs: Any) -> Any:
    """Keep of a block's arguments the entries of the heads that stayed."""
    args = list(args)
    for path, (dim, period, kept) in arguments.items():
        values: Any = args if path.isdigit() else kwargs
        key: Any = int(path) if path.isdigit() else path
        given = values[key] if not path.isdigit() or key < len(args) else None
        if given is None or given.shape[dim] % period:
            continue  # not there, or one entry for all heads
        index = torch.as_tensor(kept, device=given.device)
        parts = given.unflatten(dim, (given.shape[dim] // period, period)).index_select(dim + 1, index)
        values[key] = parts.flatten(dim, dim + 1)
    return tuple(args), kwargs


@functools.cache
def uneven_class(base: type) -> type:
    """The subclass of ``base`` that builds what its config says beyond the family's own fields."""

    def initialise(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super(uneven, self).__init__(config, *args, **kwargs)
        if config.to_dict().get("per_layer_config"):
            blocks = largest_module_list(self)
            for index in range(len(blocks)):
                layer_config = config.per_layer_config[index]
                layer_config._attn_implementation = config._attn_implementation
                blocks[index] = type(blocks[index])(layer_config, index)
        carve(self, getattr(config, "carved", None) or {})
        self.post_init()

    uneven: Any = type(f"Pruned{base.__name__}", (base,), {"__init__": initialise, "__module__": base.__module__})
    return uneven


class PrunedForCausalLM:
    """What an ``AutoModel`` class finds through the config's ``auto_map``: it hands over to the family's own class."""

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
