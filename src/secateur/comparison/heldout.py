"""The held-out windows that a comparison is measured on, and whether calibration has seen them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from secateur.calibration import TokenWindows, text_windows
from secateur.calibration.source import DEFAULT_TEXT_WINDOW_LENGTH
from secateur.checkpoint.reader import Checkpoint
from secateur.console import log
from secateur.errors import RecipeError

RUN_LENGTH = 24
"""Tokens in a row that two texts share only where one holds a piece of the other."""


def held_out_windows(
    checkpoint: Checkpoint, text: str, context: int | None, max_windows: int | None, trust_remote_code: bool
) -> TokenWindows:
    """The first windows ``(N, T)`` of ``text``.

    Raises:
        CalibrationError: the text cannot be used.
        RecipeError: windows are longer than the model has positions, or have no next token.
    """
    if context is not None and context < 2:
        raise RecipeError(f"--context has to be at least 2 (a token and the next), not {context}")
    config = checkpoint.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if context is None and positions is not None and not text.endswith(".safetensors"):
        context = min(DEFAULT_TEXT_WINDOW_LENGTH, positions)
    windows = text_windows(text, checkpoint.folder, context, max_windows, config.vocab_size, trust_remote_code)
    length = windows.ids_NT.shape[1]
    if positions is not None and length > positions:
        raise RecipeError(
            f"held-out windows of {length} tokens are longer than the model's {positions} positions; give --context "
            f"{positions} or less"
        )
    return windows


def check_overlap(held_out: TokenWindows, calibration: Iterable[TokenWindows]) -> list[str]:
    """Say loudly where calibration has seen held-out text, by runs of tokens that both hold; returns what was said."""
    seen: set[int] = set()
    length = min(RUN_LENGTH, held_out.ids_NT.shape[1])
    for windows in {one.sha256: one for one in calibration}.values():
        length = min(length, windows.ids_NT.shape[1])
        for ids_T in windows.ids_NT:
            seen.update(_runs(ids_T, length))
    if not seen:
        return []
    shared = sum(not seen.isdisjoint(_runs(ids_T, length)) for ids_T in held_out.ids_NT)
    if not shared:
        return []
    sentence = (
        f"NOT HELD OUT: {shared} of {len(held_out.ids_NT)} windows of {held_out.source} share text with the calibration "
        "windows, which flatters recipes that were calibrated on it; give another --text."
    )
    log.warning(sentence)
    return [sentence]


def _runs(ids_T: torch.Tensor, length: int) -> list[int]:
    """A number for every run of ``length`` tokens, the same for the same tokens and for hardly any others."""
    generator = torch.Generator().manual_seed(length)
    factors = torch.randint(-(2**62), 2**62, (length,), generator=generator)
    numbers: list[int] = (ids_T.unfold(0, length, 1) * factors).sum(dim=-1).tolist()
    return numbers
