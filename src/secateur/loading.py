"""Loading any model that Secateur writes, blocks of different sizes included, without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from secateur.checkpoint.architecture import loader_for
from secateur.checkpoint.carved import check_runs
from secateur.checkpoint.skeleton import is_uneven, load_config
from secateur.checkpoint.uneven import PrunedForCausalLM
from secateur.errors import ModelError, reason_of


def load(folder: str | Path, dtype: Any = torch.float32, **kwargs: Any) -> Any:
    """Load a model folder as the transformers model it is.

    Args:
        folder: any folder that ``from_pretrained`` takes, or an uneven one.
        dtype: as in transformers; ``"auto"`` keeps the stored one.

    Raises:
        ModelError: the folder does not load.
    """
    folder = Path(folder)
    config = load_config(folder, trust_remote_code=bool(kwargs.get("trust_remote_code")))
    loader: Any = PrunedForCausalLM if is_uneven(config) else loader_for(config)
    try:
        model = loader.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, **kwargs
        ).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = reason_of(error)
        raise ModelError(f"{folder} does not load: {reason}") from error
    check_runs(model, folder)
    return model
