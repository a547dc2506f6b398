"""Text to token ids with the model's own tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from secateur.errors import CalibrationError

SEPARATOR = "\n\n"
"""What joins documents, as the published evaluations of WikiText-2 join its rows."""


def load_tokenizer(model_folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, from its folder alone.

    Raises:
        CalibrationError: the folder holds none that works.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
            raise ValueError("an empty vocabulary, which transformers makes up where a family's files are missing")
    except Exception as error:  # a missing or broken tokenizer surfaces as almost any type
        raise CalibrationError(
            f"{model_folder} has no tokenizer that loads, so text cannot be used; "
            "add the model's tokenizer files, or give a safetensors file holding input_ids of shape (N, T)"
        ) from error
    # One long text is tokenised at once and cut afterwards, so its length is nothing to warn about.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def tokenise(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text`` as it stands: no beginning-of-sequence token, nothing cut off."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def beginning(tokenizer: Any, model_folder: Path) -> list[int]:
    """What has to stand before the text of every window: the beginning-of-sequence token for Gemma's families, else nothing.

    Published perplexities are of windows without one, and most models hardly miss it. Gemma's are lost without: of
    Gemma 3 270M it takes the perplexity from 59 to 341. lm-eval puts it before the same families' texts.
    """
    try:
        family = json.loads((model_folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        family = None  # a folder of no model we open; its own error says more than one of ours could here
    return [tokenizer.bos_token_id] if "gemma" in str(family) and tokenizer.bos_token_id is not None else []


def join_enough(tokenizer: Any, documents: Iterable[str], tokens: int | None, characters: int | None) -> str:
    """Join documents, stopping once they hold ``tokens`` tokens or ``characters`` characters (None: no limit)."""
    taken: list[str] = []
    tokens_left = math.inf if tokens is None else tokens
    characters_left = math.inf if characters is None else characters
    for document in documents:
        taken.append(document)
        characters_left -= len(document)
        if tokens is not None:
            tokens_left -= len(tokenise(tokenizer, document))
        if tokens_left <= 0 or characters_left <= 0:
            break
    return SEPARATOR.join(taken)
