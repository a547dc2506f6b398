"""Masks over single weights. A mask is boolean, of the weight's shape ``(O, I)``, True where a weight is kept.

Counts are exact; of equal scores the one with the lower index leaves first, as a stable sort gives (methods §2.1), except
under N:M, where ties fall as in the published codes' ``topk``.
"""

from __future__ import annotations

import numpy as np
import torch

from secateur.errors import RecipeError


def row_mask(score_OI: torch.Tensor, ratio: float) -> torch.Tensor:
    """In every row the ``int(I * ratio)`` lowest leave (Wanda's comparison group)."""
    leaving = int(score_OI.shape[1] * ratio)
    return _without_lowest(score_OI, leaving)


def layer_mask(score_OI: torch.Tensor, ratio: float) -> torch.Tensor:
    """Of the whole matrix the ``int(O * I * ratio)`` lowest leave."""
    flat = score_OI.reshape(1, -1)
    return _without_lowest(flat, int(flat.shape[1] * ratio)).reshape(score_OI.shape)


def n_of_m_mask(score_OI: torch.Tensor, keep: int, group: int, name: str) -> torch.Tensor:
    """Of every ``group`` consecutive inputs of a row the ``keep`` highest stay.

    Raises:
        RecipeError: ``group`` does not divide the number of inputs; ``name`` is the matrix it names.
    """
    rows, inputs = score_OI.shape
    if inputs % group:
        raise RecipeError(
            f"{keep}:{group} needs widths that {group} divides, but '{name}' has {inputs} inputs; choose another M"
        )
    score_GM = score_OI.reshape(-1, group)
    # Not the stable sort: of equal scores the published codes take what topk takes, and under pruned propagation a
    # handful of ties decided otherwise moves the masks of all later blocks.
    lowest_GL = torch.topk(score_GM, group - keep, dim=1, largest=False).indices
    return torch.ones_like(score_GM, dtype=torch.bool).scatter_(1, lowest_GL, False).reshape(rows, inputs)


def threshold_mask(score_OI: torch.Tensor, threshold: float, ties: int) -> tuple[torch.Tensor, int]:
    """Everything below ``threshold`` leaves, and of those equal to it the first ``ties``.

    Returns:
        the mask, and how many ties are left for the matrices that follow.
    """
    keep_OI = score_OI >= threshold
    equal = torch.nonzero((score_OI == threshold).reshape(-1)).reshape(-1)[:ties]
    keep_OI.reshape(-1)[equal] = False
    return keep_OI, ties - len(equal)


def _without_lowest(score_RI: torch.Tensor, leaving: int) -> torch.Tensor:
    keep_RI = torch.ones_like(score_RI, dtype=torch.bool)
    if leaving:
        order_RI = torch.sort(score_RI, dim=1, stable=True).indices
        keep_RI.scatter_(1, order_RI[:, :leaving], False)
    return keep_RI


def pack(mask_OI: torch.Tensor) -> torch.Tensor:
    """A mask as bits, ``(ceil(O * I / 8),)`` uint8."""
    return torch.from_numpy(np.packbits(mask_OI.cpu().reshape(-1).numpy()))


def unpack(bits: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The mask that ``pack`` packed."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape[0] * shape[1]).astype(bool)).reshape(shape)
