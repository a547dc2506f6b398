"""Calibration: from what the user names (nothing, a file, a hub dataset) to windows of token ids."""

from secateur.calibration.source import (
    DEFAULT_WINDOW_LENGTH,
    DEFAULT_WINDOWS,
    fingerprint,
    open_windows,
    text_windows,
)
from secateur.calibration.windows import TokenWindows

__all__ = [
    "DEFAULT_WINDOWS",
    "DEFAULT_WINDOW_LENGTH",
    "TokenWindows",
    "fingerprint",
    "open_windows",
    "text_windows",
]
