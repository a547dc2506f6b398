"""Token windows that were made beforehand: a safetensors file holding ``input_ids`` of shape (N, T)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from secateur.errors import CalibrationError

KEY = "input_ids"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


def stored_windows(path: Path) -> torch.Tensor:
    """Read ``input_ids`` of ``path`` as int64 ``(N, T)``.

    Raises:
        CalibrationError: the file is damaged, has no ``input_ids``, or they are not integers of shape (N, T).
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            ids = file.get_tensor(KEY) if KEY in names else None
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is not a readable safetensors file ({error}); write it again") from error
    if ids is None:
        held = ", ".join(names[:5]) or "nothing"
        raise CalibrationError(f"{path} has no tensor '{KEY}' (it holds {held}); save the token ids under that name")
    if ids.dtype not in INTEGERS:
        raise CalibrationError(
            f"'{KEY}' of {path} is {str(ids.dtype)[6:]}; token ids have to be integers, save them as int64"
        )
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise CalibrationError(
            f"'{KEY}' of {path} has shape {tuple(ids.shape)}; it has to be (windows, tokens) with at least 2 tokens a window"
        )
    return ids.to(torch.int64)
