"""The tiny model and its tokenizer on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calibration_model import PADDING_ROWS, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from secateur.calibration import TokenWindows, open_windows


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """The model's embedding is larger than the tokenizer, as it often is."""
    return len(tokenizer) + PADDING_ROWS


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocabulary).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    tiny_model(40).save_pretrained(folder)
    return folder


@pytest.fixture
def opened(model_folder: Path, vocabulary: int) -> Callable[..., TokenWindows]:
    """``open_windows`` with the tiny model's arguments filled in."""

    def open_them(source: object, windows: int | None = 3, window_length: int | None = 8, **given: Any) -> TokenWindows:
        settings: dict[str, Any] = {
            "model_folder": model_folder,
            "model_hash": "tiny",
            "seed": 0,
            "vocabulary": vocabulary,
            "cache": None,
        }
        return open_windows(str(source), windows=windows, window_length=window_length, **(settings | given))

    return open_them
