"""Which class of transformers a config is for, asked of transformers itself, and what its forward is fed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError

ModelInputs = Mapping[str, torch.Tensor]
"""What a model's forward is called with, by name: ``input_ids (B, T)``, or ``pixel_values (B, C, H, W)``."""

PIXELS = "pixel_values"


def loader_for(config: Any) -> Any:
    """What an ordinary user loads the model with: ``AutoModelForCausalLM``, or the class that the config names.

    Raises:
        ModelError: transformers knows neither.
    """
    from transformers import AutoModelForCausalLM

    named, automatic = _named_class(config), _mapped_class(AutoModelForCausalLM._model_mapping, config)
    remote = _remote_loader(config)
    if remote is not None or (named is not None and named is not automatic):
        return remote or named
    if automatic is None:
        wanted = next(iter(config.architectures or ()), None)
        raise ModelError(
            f"transformers has no class '{wanted}' and no causal language model of type '{config.model_type}'; "
            "mend architectures in config.json, update transformers, or give another model"
        )
    return AutoModelForCausalLM


def is_causal(config: Any) -> bool:
    """Whether the model predicts each token from those before it, so that next-token cross-entropy is its loss."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM

    try:
        if loader_for(config) is not AutoModelForCausalLM:
            return False
    except ModelError:  # a model of the user's own making, of a type that is no language model
        return False
    # Encoders that can also be built as decoders say which they are; of other families the field means nothing.
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING or bool(getattr(config, "is_decoder", True))


def automatic_class(config: Any) -> str:
    """The name of the ``AutoModel`` class under which ``config``'s architecture is found."""
    import transformers

    remote = _remote_name(config)
    if remote:
        return remote
    architecture = config.architectures[0]
    for name in ("AutoModelForCausalLM", *_loader_names()):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        found = mapping[type(config)] if mapping is not None and type(config) in mapping else ()
        if architecture in [kind.__name__ for kind in (found if isinstance(found, tuple) else (found,))]:
            return name
    return "AutoModel"


@functools.cache
def _loader_names() -> list[str]:
    """The ``AutoModel`` classes for some task; to list what transformers has takes it a third of a second."""
    import transformers

    return [name for name in dir(transformers) if name.startswith("AutoModelFor")]


@dataclass(frozen=True)
class Loading:
    """How an ordinary user loads a folder.

    Attributes:
        model: the ``AutoModel`` class.
        processor: the class for what it reads.
        task: the hub's name for what it does, where there is one.
        remote_code: whether the folder brings its own code.
    """

    model: str
    processor: str
    task: str | None
    remote_code: bool

    def line(self, folder: str) -> str:
        """The call that loads ``folder``, a Python literal."""
        return f"{self.model}.from_pretrained({folder}{', trust_remote_code=True' if self.remote_code else ''})"


def how_to_load(config: Any) -> Loading:
    """How a folder with this config is loaded, asked of transformers' own table of tasks."""
    from transformers.pipelines import SUPPORTED_TASKS

    name = automatic_class(config)
    tasks = {
        task: entry["type"]
        for task, entry in SUPPORTED_TASKS.items()
        if [kind.__name__ for kind in entry["pt"]] == [name]
    }
    task = next(iter(tasks), None)
    processor = "AutoImageProcessor" if task and tasks[task] == "image" else "AutoTokenizer"
    return Loading(name, processor, task, bool(getattr(config, "auto_map", None)))


def named_inputs(inputs: torch.Tensor | ModelInputs) -> dict[str, torch.Tensor]:
    """Inputs by name; a bare tensor is token ids."""
    return {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)


def example_inputs(model: Any, batch: int = 1, tokens: int = 48) -> dict[str, torch.Tensor]:
    """Fixed pseudo-random inputs of the kind the model reads: token ids ``(B, T)`` or pixel values ``(B, C, H, W)``."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == PIXELS:
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, model.config.num_channels, height, width)
        return {PIXELS: torch.randn(shape, generator=generator)}
    vocabulary = model.config.get_text_config().vocab_size
    return {"input_ids": torch.randint(vocabulary, (batch, tokens), generator=generator)}


def call_model(model: nn.Module, inputs: Mapping[str, Any], cached: bool = False) -> Any:
    """The model's outputs, without a cache where it has one, or with one if ``cached``."""
    known = inspect.signature(model.forward).parameters
    passes_on = any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values())
    if "use_cache" in known or (passes_on and hasattr(model.config, "use_cache")):
        return model(**inputs, use_cache=cached)
    return model(**inputs)


def _remote_loader(config: Any) -> Any:
    """The automatic class for which the folder brings its own code."""
    import transformers

    name = _remote_name(config)
    return getattr(transformers, name, None) if name else None


def _remote_name(config: Any) -> str | None:
    named = getattr(config, "auto_map", None) or {}
    return next((name for name in named if name.startswith("AutoModelFor")), None)


def _named_class(config: Any) -> Any:
    """The model class of ``config.architectures``, where transformers has it, it fits the config and it has a head."""
    import transformers

    name = next(iter(getattr(config, "architectures", None) or ()), "")
    found: Any = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return None
    fits = isinstance(config, getattr(found, "config_class", None) or ())
    bare = found is _mapped_class(transformers.MODEL_MAPPING, config)
    return found if fits and not bare else None


def _mapped_class(mapping: Any, config: Any) -> Any:
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    if not isinstance(found, tuple):
        return found
    names = getattr(config, "architectures", None) or ()
    return next((choice for choice in found if choice.__name__ in names), found[0])
