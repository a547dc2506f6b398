"""Opening what the user named as calibration or evaluation text: the forms of SOURCE, and windows from each.

* ``self``: windows the model writes itself; the default, since it needs neither data nor a tokenizer.
* ``python-docs``: the English text that Python itself carries.
* ``FILE.txt``, ``FILE.md``: one text.
* ``FILE.jsonl``, ``FILE.json``, ``FILE.parquet``, each with ``:COLUMN`` behind it on request: one text a row; or, without
  a column and with rows of ``instruction``, ``input`` and ``output``, the published prompt with its answer and the model's own end token.
* ``FILE.safetensors``: token ids ``input_ids`` of shape (N, T), used as they are.
* ``hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]``: a dataset on the hub or in a local folder; parts may be left empty.

Texts are joined by a blank line, tokenised once without special tokens, and cut into windows that do not overlap. Windows of
Gemma's families begin with their beginning-of-sequence token, without which those models are lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from secateur.calibration.documents import (
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    hub_documents,
    python_documents,
    row_documents,
    text_document,
)
from secateur.calibration.stored import stored_windows
from secateur.calibration.tokenise import beginning, join_enough, load_tokenizer, tokenise
from secateur.calibration.windows import NO_BEGINNING, TokenWindows, cut, draw
from secateur.calibration.written import written_windows
from secateur.errors import CalibrationError, suggest
from secateur.files import sha256_of_file

DEFAULT_WINDOWS = 32
DEFAULT_WINDOW_LENGTH = 256
DEFAULT_TEXT_WINDOW_LENGTH = 512

SPARE = 4
"""A dataset on the hub is read until it gave this many times the tokens needed, so that there is something to draw from."""

MOST_CHARACTERS = 2**21
"""No more of a text is read, unless the windows asked for need it."""

HUB_FORM = "hub:NAME[:CONFIG[:SPLIT[:COLUMN]]]"


@dataclass(frozen=True)
class _Source:
    """What a SOURCE names. ``path`` for files, ``parts`` (name, config, split) for the hub."""

    kind: Literal["self", "python-docs", "text", "rows", "tokens", "hub"]
    given: str
    path: Path = Path()
    parts: tuple[str, str | None, str] = ("", None, "")
    column: str | None = None

    def documents(self, most_characters: int | None, ending: str = "") -> Iterator[str]:
        """The texts, one by one; ``ending`` stands behind every answer to an instruction."""
        if self.kind == "python-docs":
            return python_documents()
        if self.kind == "text":
            return text_document(self.path, most_characters)
        if self.kind == "rows":
            return row_documents(self.path, self.column, ending)
        return hub_documents(*self.parts, self.column, ending)

    def named(self) -> str:
        """The source as it is described to people; for the hub with the split that was taken."""
        return f"{self.given} (split {self.parts[2]})" if self.kind == "hub" else self.given


def open_windows(
    source: str,
    *,
    model_folder: Path,
    model_hash: str,
    windows: int | None,
    window_length: int | None,
    seed: int,
    vocabulary: int,
    cache: Path | None,
    trust_remote_code: bool = False,
    memory: int | None = None,
    at_most: bool = False,
) -> TokenWindows:
    """Open calibration windows ``(N, T)``; the same arguments always give the same windows.

    Args:
        source: one of the forms above.
        model_folder: the model's folder, for its tokenizer or, with ``self``, its weights.
        model_hash: identifies the model's content, for the cache.
        windows: N; 32 by default, all of them for a safetensors file.
        window_length: T; 256 by default, what it holds for a safetensors file.
        seed: which windows are drawn (they stay in the order of the text), or what the model writes.
        vocabulary: how many token ids the model knows.
        cache: folder in which self-written windows are kept, or None.
        trust_remote_code: run code that comes with the model.
        memory: bytes that the model may take while it writes; None: what is free.
        at_most: a text that gives fewer windows than ``windows`` gives all it has.

    Raises:
        CalibrationError: the source is not there, damaged, too short, or does not fit the model.
        ModelError: ``self``, and the model does not load or is damaged.
        ResourceError: the disk of the cache is full, or the model too large to write.
    """
    _check_sizes(windows, window_length)
    named = _parse(source)
    if named.kind == "tokens":
        opened = _stored(named, windows, window_length)
    else:
        count, length = windows or DEFAULT_WINDOWS, window_length or DEFAULT_WINDOW_LENGTH
        if named.kind == "self":
            ids_NT = written_windows(
                model_folder, model_hash, count, length, seed, vocabulary, cache, trust_remote_code, memory
            )
            opened = TokenWindows(ids_NT, source, f"written by the model itself at temperature 1, seed {seed}")
        else:
            ids_NT, tokens, begins = _cut_text(named, model_folder, length, SPARE * count * length, trust_remote_code)
            if at_most:
                count = min(count, len(ids_NT))
            if len(ids_NT) < count:
                raise CalibrationError(
                    f"{source} gives {len(ids_NT)} windows of {length} tokens ({tokens:,} tokens), not the {count} "
                    f"asked for; give --windows {len(ids_NT)} or less, a shorter --window-length, or more text"
                )
            drawn = f"{named.named()}: {count} of {len(ids_NT)} windows in {tokens:,} tokens, drawn with seed {seed}"
            opened = TokenWindows(draw(ids_NT, count, seed), source, drawn, begins)
    opened.check_vocabulary(vocabulary)
    return opened


def text_windows(
    source: str,
    model_folder: Path,
    window_length: int | None = None,
    max_windows: int | None = None,
    vocabulary: int | None = None,
    trust_remote_code: bool = False,
) -> TokenWindows:
    """The first windows ``(N, T)`` of a text, in order, as perplexity is published: nothing drawn, nothing overlaps.

    Args:
        source: one of the forms above except ``self``.
        model_folder: whose tokenizer to use.
        window_length: T; 512 by default, what it holds for a safetensors file.
        max_windows: take this many where there are more; None takes all.
        vocabulary: how many token ids the model knows; None leaves that unchecked.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        CalibrationError: the source is not there, damaged, shorter than one window, or does not fit the model.
    """
    _check_sizes(max_windows, window_length, "--max-windows")
    named = _parse(source)
    if named.kind == "self":
        raise CalibrationError(
            "'self' is no text to evaluate on: a model is judged on what it did not write; name a text"
        )
    if named.kind == "tokens":
        held = len(stored_windows(named.path))
        opened = _stored(named, None if max_windows is None else min(max_windows, held), window_length)
    else:
        length = window_length or DEFAULT_TEXT_WINDOW_LENGTH
        # One window more than needed, since tokens may merge where documents join.
        enough = None if max_windows is None else (max_windows + 1) * length
        all_NT, tokens, begins = _cut_text(named, model_folder, length, enough, trust_remote_code)
        ids_NT = all_NT[:max_windows]
        taken = f"{named.named()}: first {len(ids_NT)} windows of {tokens:,} tokens"
        opened = TokenWindows(ids_NT, source, taken, begins)
    if vocabulary is not None:
        opened.check_vocabulary(vocabulary)
    return opened


def fingerprint(source: str) -> str:
    """A cheap identity of what ``source`` holds: a file's SHA-256 (and its column), else the source's own name.

    Raises:
        CalibrationError: there is no such source.
    """
    named = _parse(source)
    if named.kind in ("self", "python-docs", "hub"):
        return source
    try:
        content = sha256_of_file(named.path)
    except OSError as error:
        raise CalibrationError(f"{named.path} cannot be read: {error.strerror}; name a readable file") from error
    return content if named.column is None else f"{content}:{named.column}"


def _parse(source: str) -> _Source:
    if source in ("self", "python-docs"):
        return _Source("self" if source == "self" else "python-docs", source)
    if source.startswith("hub:"):
        return _parse_hub(source)
    path, column = Path(source).expanduser(), None
    if not path.exists() and ":" in source:
        before, after = source.rsplit(":", 1)
        if Path(before).suffix.lower() in (*ROW_SUFFIXES, *TEXT_SUFFIXES, ".safetensors"):
            path, column = Path(before).expanduser(), after
    suffix = path.suffix.lower()
    if path.is_dir():
        raise CalibrationError(f"{path} is a folder; name a file in it, or hub:{path} if it is a dataset")
    if not path.exists():
        if suffix or "/" in source:
            raise CalibrationError(f"there is no file {path}; check the path")
        raise CalibrationError(
            f"there is no text '{source}'{suggest(source, ['self', 'python-docs', HUB_FORM, 'FILE'])}"
        )
    if column is not None and (suffix not in ROW_SUFFIXES or not column):
        raise CalibrationError(
            f"'{source}' names a column, which only .jsonl, .json and .parquet have; name {path} alone"
        )
    if suffix in TEXT_SUFFIXES:
        return _Source("text", source, path)
    if suffix in ROW_SUFFIXES:
        return _Source("rows", source, path, column=column)
    if suffix == ".safetensors":
        return _Source("tokens", source, path)
    readable = ", ".join((*TEXT_SUFFIXES, *ROW_SUFFIXES, ".safetensors"))
    raise CalibrationError(f"{path} is of a kind that is not read; give one of {readable}, by that name")


def _parse_hub(source: str) -> _Source:
    parts = source.removeprefix("hub:").split(":")
    if not parts[0] or len(parts) > 4:
        raise CalibrationError(f"'{source}' is not of the form {HUB_FORM}; for example hub:allenai/c4:en:train:text")
    name, config, split, column = (*parts, "", "", "")[:4]
    return _Source("hub", source, parts=(name, config or None, split or "train"), column=column or None)


def _check_sizes(windows: int | None, window_length: int | None, flag: str = "--windows") -> None:
    if windows is not None and windows < 1:
        raise CalibrationError(f"{flag} has to be at least 1, not {windows}")
    if window_length is not None and window_length < 2:
        raise CalibrationError(f"--window-length has to be at least 2 (a token and the next), not {window_length}")


def _stored(named: _Source, windows: int | None, window_length: int | None) -> TokenWindows:
    ids_NT = stored_windows(named.path)
    held, length = ids_NT.shape
    if window_length not in (None, length):
        raise CalibrationError(
            f"the windows of {named.path} have {length} tokens, not {window_length}; leave --window-length out"
        )
    if windows is not None and windows > held:
        raise CalibrationError(
            f"{named.path} holds {held} windows, not the {windows} asked for; give --windows {held} or less"
        )
    count = windows or held
    taken = "all" if count == held else f"first {count} of"
    return TokenWindows(ids_NT[:count].contiguous(), named.given, f"{named.given}: {taken} {held} windows, as given")


def _cut_text(
    named: _Source, model_folder: Path, length: int, enough: int | None, trust_remote_code: bool
) -> tuple[torch.Tensor, int, str]:
    """Every window ``(M, T)`` of as much text as gives ``enough`` tokens (None: all of it), how many tokens it had, and what
    stands before each window's text, for people."""
    tokenizer = load_tokenizer(model_folder, trust_remote_code)
    most_characters = None if enough is None else max(MOST_CHARACTERS, 32 * enough)
    # Only a dataset on the hub is worth counting tokens for while it is read: every document is a download.
    most_tokens = enough if named.kind == "hub" else None
    documents = named.documents(most_characters, tokenizer.eos_token or "")
    text = join_enough(tokenizer, documents, most_tokens, most_characters)
    if not text.strip():
        raise CalibrationError(f"{named.given} holds no text; name one with at least a few thousand words")
    ids = tokenise(tokenizer, text)
    begins = beginning(tokenizer, model_folder)
    windows_MT = cut(ids, length, begins)
    if not len(windows_MT):
        raise CalibrationError(
            f"{named.given} has {len(ids):,} tokens, fewer than one window of {length}; "
            "give a shorter --window-length or more text"
        )
    return windows_MT, len(ids), f"begun with {tokenizer.decode(begins)}" if begins else NO_BEGINNING
