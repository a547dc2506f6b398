"""Masks over single weights. A mask is boolean, of the weight's shape ``(O, I)``, True where a weight is kept.

Counts are exact; of equal scores the one with the lower index leaves first, as a stable sort gives (methods §2.1), except
under N:M, where ties fall as in the published codes' ``topk``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from secateur.errors import RecipeError

CHUNK = 1 << 22
"""Scores looked at together: what is computed on the way (a copy, indices, flags) is bounded by it, not by the matrix."""


def row_mask(score_OI: torch.Tensor, ratio: float) -> torch.Tensor:
    """In every row the ``int(I * ratio)`` lowest leave (Wanda's comparison group)."""
    return rows_without_lowest(score_OI, int(score_OI.shape[1] * ratio))


def rows_without_lowest(score_OI: torch.Tensor, leaving: int) -> torch.Tensor:
    """In every row the ``leaving`` lowest leave."""
    return _by_rows(score_OI, lambda score_RI: _without_lowest(score_RI, leaving))


def n_of_m_mask(score_OI: torch.Tensor, keep: int, group: int, name: str) -> torch.Tensor:
    """Of every ``group`` consecutive inputs of a row the ``keep`` highest stay.

    Raises:
        RecipeError: ``group`` does not divide the number of inputs; ``name`` is the matrix it names.
    """
    inputs = score_OI.shape[1]
    if inputs % group:
        raise RecipeError(
            f"{keep}:{group} needs widths that {group} divides, but '{name}' has {inputs} inputs; choose another M"
        )

    def highest(score_RI: torch.Tensor) -> torch.Tensor:
        score_GM = score_RI.reshape(-1, group)
        # Not the stable sort: of equal scores the published codes take what topk takes, and under pruned propagation a
        # handful of ties decided otherwise moves the masks of all later blocks.
        lowest_GL = torch.topk(score_GM, group - keep, dim=1, largest=False).indices
        return torch.ones_like(score_GM, dtype=torch.bool).scatter_(1, lowest_GL, False).reshape(score_RI.shape)

    return _by_rows(score_OI, highest)


def threshold_mask(score_OI: torch.Tensor, threshold: float, ties: int) -> tuple[torch.Tensor, int]:
    """Everything below ``threshold`` leaves, and of those equal to it the first ``ties``.

    Returns:
        the mask, and how many ties are left for the matrices that follow.
    """
    # Rows after rows, also where scores lie as a weight does that is kept transposed: ties are counted through them.
    keep_OI = torch.empty(score_OI.shape, dtype=torch.bool, device=score_OI.device)
    for rows in row_chunks(score_OI):
        keep_RI = torch.ge(score_OI[rows], threshold, out=keep_OI[rows])
        if ties:
            equal = torch.nonzero((score_OI[rows] == threshold).reshape(-1)).reshape(-1)[:ties]
            keep_RI.view(-1)[equal] = False
            ties -= len(equal)
    return keep_OI, ties


def _without_lowest(score_RI: torch.Tensor, leaving: int) -> torch.Tensor:
    """The ``leaving`` lowest of every row found by selection, without a sort."""
    if not leaving:
        return torch.ones_like(score_RI, dtype=torch.bool)
    threshold_R1 = _of_rank(score_RI, leaving)
    keep_RI = score_RI > threshold_R1
    spared_R = keep_RI.shape[1] - _count(keep_RI) - leaving  # of those equal to the threshold the last ones stay
    tied_R = torch.nonzero(spared_R).reshape(-1)
    if len(tied_R):
        equal_RI = score_RI[tied_R] == threshold_R1[tied_R]
        stays_R1 = (equal_RI.sum(dim=1) - spared_R[tied_R])[:, None]
        keep_RI[tied_R] |= equal_RI & (equal_RI.cumsum(dim=1, dtype=torch.int32) > stays_R1)
    return keep_RI


def _of_rank(score_RI: torch.Tensor, rank: int) -> torch.Tensor:
    """Every row's score of this rank from the lowest, 1-based, ``(R, 1)``. On a CPU numpy's selection is five times as fast."""
    if score_RI.device.type != "cpu":
        return score_RI.kthvalue(rank, dim=1, keepdim=True).values
    selected_RI = np.partition(score_RI.numpy(), rank - 1, axis=1)
    return torch.from_numpy(selected_RI[:, rank - 1 : rank].copy())


def _count(keep_RI: torch.Tensor) -> torch.Tensor:
    """How many are true in every row; on a CPU numpy's sum of bytes is twenty times as fast."""
    if keep_RI.device.type != "cpu":
        return keep_RI.sum(dim=1)
    return torch.from_numpy(np.add.reduce(keep_RI.numpy().view(np.uint8), axis=1, dtype=np.int64))


def _by_rows(score_OI: torch.Tensor, mask: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The mask of a matrix, some rows at a time."""
    keep_OI = torch.empty_like(score_OI, dtype=torch.bool)
    for rows in row_chunks(score_OI):
        keep_OI[rows] = mask(score_OI[rows])
    return keep_OI


def row_chunks(score_OI: torch.Tensor) -> Iterator[slice]:
    """Rows of about ``CHUNK`` scores, at least one."""
    step = max(1, CHUNK // max(1, score_OI.shape[1]))
    return (slice(start, start + step) for start in range(0, len(score_OI), step))


def zeros_of(mask_OI: torch.Tensor) -> int:
    """How many weights a mask takes."""
    return mask_OI.numel() - int(np.count_nonzero(mask_OI.cpu().numpy()))


def pack(mask_OI: torch.Tensor) -> torch.Tensor:
    """A mask as bits, ``(ceil(O * I / 8),)`` uint8."""
    return torch.from_numpy(np.packbits(mask_OI.cpu().reshape(-1).numpy()))


def unpack(bits: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The mask that ``pack`` packed."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape[0] * shape[1]).view(bool)).reshape(shape)
