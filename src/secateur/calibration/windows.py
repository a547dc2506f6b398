"""Token windows: what calibration and evaluation run the model on, and how a long text is cut into them.

Shape legend: ``N`` windows, ``T`` tokens in each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from secateur.errors import CalibrationError

NO_BEGINNING = "no beginning-of-sequence token"


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of token ids.

    Attributes:
        ids_NT: int64 token ids ``(N, T)``.
        source: what the user asked for, as given.
        description: how the windows were made, for people: split, tokens available, sampling.
        beginning: what stands before the text of each window, for people.
    """

    ids_NT: torch.Tensor
    source: str
    description: str
    beginning: str = NO_BEGINNING

    def __post_init__(self) -> None:
        if self.ids_NT.ndim != 2 or self.ids_NT.dtype != torch.int64:
            raise ValueError(f"windows are int64 (N, T), not {self.ids_NT.dtype} {tuple(self.ids_NT.shape)}")

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the shape and the little-endian int64 ids: the same ids give the same hash on any machine."""
        count, length = self.ids_NT.shape
        digest = hashlib.sha256(f"{count}x{length}:".encode())
        digest.update(self.ids_NT.cpu().contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def check_vocabulary(self, vocabulary: int) -> None:
        """Check that every id is one of the model's ``vocabulary`` tokens.

        Raises:
            CalibrationError: one is not; the first is named with its place.
        """
        outside_P2 = ((self.ids_NT < 0) | (self.ids_NT >= vocabulary)).nonzero()
        if len(outside_P2):
            window, position = outside_P2[0].tolist()
            raise CalibrationError(
                f"{self.source} holds token id {int(self.ids_NT[window, position])} (window {window}, position "
                f"{position}), outside the model's vocabulary of {vocabulary}; give windows made with this model's tokenizer"
            )


def cut(ids: list[int], window_length: int, beginning: list[int] | None = None) -> torch.Tensor:
    """Cut one long run of ids into windows that do not overlap, ``(N, T)``; the rest is dropped.

    Each begins with the ids of ``beginning``, which count among its T.
    """
    beginning_P = torch.tensor(beginning or [], dtype=torch.int64)
    length = window_length - len(beginning_P)
    whole = len(ids) // length
    text_NL = torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)
    return torch.cat([beginning_P.expand(whole, -1), text_NL], dim=1)


def draw(ids_NT: torch.Tensor, windows: int, seed: int) -> torch.Tensor:
    """Draw ``windows`` different rows with a seeded permutation; they stay in the order of the text."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(ids_NT), generator=generator)[:windows]
    return ids_NT[chosen.sort().values]
