"""What an ordinary user does with a folder: load it with plain transformers and call it.

This file stands alone (torch, safetensors and transformers only): ``verify`` runs it in a process of its own that does not
know Secateur.
"""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import logging


def plain_logits(
    folder: str, loader: str, inputs: dict[str, torch.Tensor], remote_code: bool, scratch: str | None = None
) -> torch.Tensor:
    """Logits of the folder in float32.

    Args:
        loader: the class of transformers that loads it.
        scratch: given where the weights do not fit in memory: they stay in the folder's own files, and those of one module
            at a time are brought in. Only what transformers has to convert is written there.

    Raises:
        ValueError: a weight is missing, has no place in the model, or has another shape.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": remote_code}
    if scratch is not None:
        options |= {"device_map": {"": "disk"}, "offload_folder": scratch}
        _read_without_mapping()
    model, report = getattr(transformers, loader).from_pretrained(folder, output_loading_info=True, **options)
    wrong = {key: list(report.get(key) or ()) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if scratch is not None:
        wrong["mismatched_keys"] += _mismatched(Path(folder), model)  # what stays on disk is not compared while loading
    for key, names in wrong.items():
        if names:
            raise ValueError(f"{key}: {names[:3]}")
    return _logits(model.eval(), inputs, one_at_a_time=scratch is not None)


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, torch.Tensor], one_at_a_time: bool) -> torch.Tensor:
    try:
        found: torch.Tensor = model(**inputs).logits
    except (NotImplementedError, RuntimeError):  # weights were used, or looked at, that were not there
        if not one_at_a_time:
            raise
        _bring_in_more(model)
        found = model(**inputs).logits
    return found.float().contiguous()


def _bring_in_more(model: Any) -> None:
    """Whole blocks when they are called, instead of each module's own weights; and the input embedding stays.

    Some families look at weights of modules that they do not call, or at the device of the embedding's.
    """
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module, remove_hook_from_submodules
    from accelerate.utils import set_module_tensor_to_device

    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules())
    stored = next(weights.dataset for weights in maps if weights is not None)
    remove_hook_from_submodules(model)
    blocks = list(model._no_split_modules or ())
    dispatch_model(model, {"": "disk"}, offload_index=stored.index, preload_module_classes=blocks)
    embedding = model.get_input_embeddings()
    place = next(name for name, module in model.named_modules() if module is embedding)
    remove_hook_from_module(embedding)
    for name, _ in embedding.named_parameters():
        set_module_tensor_to_device(embedding, name, "cpu", value=stored[f"{place}.{name}"])


def _read_without_mapping() -> None:
    """Let the loader read tensors instead of mapping files whole: every page it has looked at would count as memory."""
    from transformers import modeling_utils

    if "backend" not in (safe_open.__text_signature__ or ""):
        return  # an older safetensors; mapped pages can be taken back, so they only look like memory
    modeling_utils.safe_open = functools.partial(_reading, safe_open)


def _reading(opening: Any, *args: Any, **kwargs: Any) -> Any:
    return opening(*args, **{**kwargs, "backend": "pread"})


def _mismatched(folder: Path, model: Any) -> list[str]:
    """The stored tensors whose shape is not that of the model's tensor of the same name."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            shapes = {name: list(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118 - no mapping
        found += [
            f"{n}: {shape} instead of {wanted[n]}" for n, shape in shapes.items() if wanted.get(n, shape) != shape
        ]
    return found


def main() -> None:
    """``FOLDER LOADER INPUTS RESULT REMOTE SCRATCH``: reads the inputs, writes the logits; empty ``SCRATCH``: all in memory."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, loader, inputs, result, remote, scratch = sys.argv[1:]
    try:
        found = plain_logits(folder, loader, load_file(inputs), remote == "yes", scratch or None)
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
    save_file({"logits": found}, result)


if __name__ == "__main__":
    main()
