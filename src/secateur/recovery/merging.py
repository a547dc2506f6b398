"""What was trained, rounded to what is stored and put into the plain model.

Shape legend: ``O`` output features, ``I`` input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.recovery.sharding import whole


@torch.no_grad()
def rounded(
    model: Any, new: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New values as they will be stored, by parameter name, on the host; the pattern of zeros is that of the old ones.

    Args:
        model: the plain model with its old values, float32.
        new: float32 values by parameter name. Where weights are shared out, so are they, and all workers call this at once.
        dtypes: final dtype by parameter name.
        masks: by parameter name, true where a weight is kept. Removed ones keep their very bits; a kept one that rounds to
            zero keeps its old value.

    Raises:
        SecateurError: a value is not finite, or not zero where its mask is; nothing is changed.
    """
    result = {}
    for name, value_OI in new.items():
        found_OI = whole(value_OI).to(dtypes[name])
        if not found_OI.isfinite().all():
            raise SecateurError(
                f"recovery made {name} overflow, so nothing was merged and the model is as before; "
                "lower the learning rate and run again"
            )
        if name in masks:
            mask_OI, old_OI = masks[name].to(found_OI.device), whole(model.get_parameter(name))
            if found_OI[~mask_OI].any():
                raise SecateurError(
                    f"merging would revive pruned weights of {name}, so nothing was merged and the model is as before; "
                    "please report this defect"
                )
            found_OI = torch.where(mask_OI & (found_OI != 0), found_OI, old_OI.to(found_OI.dtype))
        result[name] = found_OI.cpu()
    return result


def replace_weights(model: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give parameters new values and return the old ones; the parameters stay the same objects, so ties hold."""
    old = {}
    for name, value in values.items():
        parameter = model.get_parameter(name)
        old[name], parameter.data = parameter.data, value.to(parameter.device, parameter.dtype)
    return old
