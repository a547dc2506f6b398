"""Whether numbers are all finite, at the cost of one sum."""

from __future__ import annotations

import torch


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` holds neither NaN nor infinity.

    A sum is not finite if one of its terms is not; where it overflowed although all were, they are looked at one by one.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
