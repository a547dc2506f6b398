"""Windows that the model writes itself: calibration without any data, and without a tokenizer.

Each window starts with one random ordinary token and goes on with what the model samples at temperature 1, so the
windows follow the distribution the model was trained towards. Special tokens never appear and never end a window, but for
the one that a family needs before every text.

Shape legend: ``N`` windows, ``T`` tokens in each, ``B`` windows written at once.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from secateur.calibration.stored import KEY, stored_windows
from secateur.calibration.tokenise import beginning, load_tokenizer
from secateur.console import log, progress
from secateur.errors import CalibrationError, ModelError
from secateur.files import atomic_file, full_disk_is_an_error
from secateur.loading import load
from secateur.memory import require_memory

VERSION = 1
"""To be raised whenever the same seed would give other windows, so that kept ones are not taken for them."""

BATCH = 16
"""Windows written at once. Part of what the seed means: another size draws in another order."""


def written_windows(
    model_folder: Path,
    model_hash: str,
    windows: int,
    window_length: int,
    seed: int,
    vocabulary: int,
    cache: Path | None,
    trust_remote_code: bool,
    memory: int | None = None,
) -> torch.Tensor:
    """Windows ``(N, T)`` written by the model in ``model_folder``; kept in ``cache`` and read back from there.

    Raises:
        ModelError: the model cannot be loaded, or gives values that are not finite.
        CalibrationError: the model cannot write windows this long, or has no ordinary tokens.
        ResourceError: the disk of the cache is full, or the model larger than ``memory`` (None: what is free).
    """
    begins = _beginning(model_folder, trust_remote_code)
    kept = None
    if cache is not None:
        key = json.dumps(["self", VERSION, model_hash, windows, window_length, seed, vocabulary, *begins])
        kept = cache / "windows" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        ids_NT = _read_kept(kept, (windows, window_length))
        if ids_NT is not None:
            log.debug("Self-written windows read from %s.", kept)
            return ids_NT
    stored = sum(file.stat().st_size for file in model_folder.glob("*.safetensors"))
    require_memory(
        stored,
        "to write its own calibration text a model has to be in memory as a whole, which",
        "give --calibration FILE or python-docs",
        memory,
    )
    model = load(model_folder, dtype="auto", trust_remote_code=trust_remote_code)
    if model.dtype == torch.float16:
        model = model.float()  # half precision overflows easily, and is slow on a CPU
    special = special_tokens(model_folder, model.config, model.generation_config, vocabulary, trust_remote_code)
    ids_NT = _write(model, model_folder, begins, special, windows, window_length, seed, vocabulary)
    if kept is not None:
        with full_disk_is_an_error(kept.parent), atomic_file(kept) as temporary:
            save_file({KEY: ids_NT}, temporary)
    return ids_NT


def special_tokens(
    model_folder: Path, config: Any, generation_config: Any, vocabulary: int, trust_remote_code: bool = False
) -> list[int]:
    """Ids that are no ordinary text, sorted: begin, end and padding, and what the tokenizer calls special or lacks."""
    found: set[int] = set()
    for holder in (config, config.get_text_config(), generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(holder, name, None)
            found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    try:
        tokenizer = load_tokenizer(model_folder, trust_remote_code)
    except CalibrationError:
        pass  # a model without a tokenizer is fine here: only its text cannot be shown
    else:
        found.update(tokenizer.all_special_ids)
        found.update(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
        # Embeddings are often padded to a round size; the model never learnt the rows past the tokenizer's end.
        found.update(range(len(tokenizer), vocabulary))
    return sorted(token for token in found if 0 <= token < vocabulary)


def _beginning(model_folder: Path, trust_remote_code: bool) -> list[int]:
    try:
        return beginning(load_tokenizer(model_folder, trust_remote_code), model_folder)
    except CalibrationError:
        return []  # without a tokenizer there is none to put


def _read_kept(path: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    """The windows kept at ``path``, or None if there are none or they are damaged, so that they are written anew."""
    if not path.exists():
        return None
    try:
        ids_NT = stored_windows(path)
    except CalibrationError as error:
        log.debug("%s", error)
        return None
    return ids_NT if ids_NT.shape == shape else None


@torch.no_grad()
def _write(
    model: Any,
    model_folder: Path,
    begins: list[int],
    special: list[int],
    windows: int,
    window_length: int,
    seed: int,
    vocabulary: int,
) -> torch.Tensor:
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    ordinary = torch.ones(vocabulary, dtype=torch.bool)
    ordinary[special] = False
    ordinary_P = ordinary.nonzero().squeeze(1)
    if not len(ordinary_P):
        raise CalibrationError(
            f"every token of the model in {model_folder} is special, so it cannot write; give a text file"
        )
    new_tokens = window_length - len(begins) - 1
    logits_outside = range(vocabulary, model.get_output_embeddings().weight.shape[0])
    # The model's own settings (temperature, penalties, an end token) would bend what it writes: all are replaced.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        suppress_tokens=[*special, *logits_outside] or None,
        pad_token_id=0,
        eos_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    first_N1 = ordinary_P[torch.randint(len(ordinary_P), (windows,), generator=generator)].unsqueeze(1)
    batches = first_N1.split(BATCH)
    written: list[torch.Tensor] = []
    with (
        torch.random.fork_rng(devices=[]),
        progress("Writing calibration windows, token by token", len(batches) * new_tokens) as step,
    ):

        class Steps(StoppingCriteria):
            """Moves the progress bar at every token; stops nothing."""

            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                step()
                return torch.zeros(len(input_ids), dtype=torch.bool)

        torch.manual_seed(seed)
        begins_P = torch.tensor(begins, dtype=torch.int64)
        for first_B1 in batches:
            first_BP = torch.cat([begins_P.expand(len(first_B1), -1), first_B1], dim=1)
            written.append(_generate(model, model_folder, first_BP, StoppingCriteriaList([Steps()]), window_length))
    return torch.cat(written)


def _generate(model: Any, model_folder: Path, first_BP: torch.Tensor, steps: Any, window_length: int) -> torch.Tensor:
    try:
        return model.generate(first_BP, attention_mask=torch.ones_like(first_BP), stopping_criteria=steps)
    except IndexError as error:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None or window_length <= positions:
            raise
        raise CalibrationError(
            f"windows of {window_length} tokens are longer than the model's {positions} positions; "
            f"give --window-length {positions} or less"
        ) from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ModelError(
            f"the model in {model_folder} gives values that are not finite when it writes; its weights are damaged"
        ) from error
