"""Text documents out of whatever the user names: Python's own documentation, a file, or a dataset through ``datasets``.

Documents come one by one, so that a large file or a dataset on the hub is read only as far as it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from secateur.calibration.instructions import are_instructions, instruction_text
from secateur.errors import CalibrationError

TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")


def python_documents() -> Iterator[str]:
    """The language reference that Python itself carries, in the order of its topics' names."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CalibrationError(
            "this Python came without its documentation (pydoc_data); name a text file instead"
        ) from error
    for name in sorted(topics):
        yield topics[name]


def text_document(path: Path, most_characters: int | None) -> Iterator[str]:
    """The file as one document, its line ends as they are; only its first ``most_characters`` where given.

    Raises:
        CalibrationError: it cannot be read or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield stream.read(-1 if most_characters is None else most_characters)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}; name a readable file") from error


def row_documents(path: Path, column: str | None, ending: str = "") -> Iterator[str]:
    """The text of every row of a JSON Lines, JSON or Parquet file.

    Raises:
        CalibrationError: the file is damaged, or its text column is not there or not clear.
    """
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_documents(path, column, ending)
        elif path.suffix.lower() == ".json":
            yield from texts_of(_json_rows(path), column, str(path), f"{path}:COLUMN", ending)
        else:
            yield from texts_of(_json_lines(path), column, str(path), f"{path}:COLUMN", ending)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or error}; name a readable file") from error


def texts_of(
    rows: Iterable[dict[str, Any]], column: str | None, where: str, form: str, ending: str = ""
) -> Iterator[str]:
    """One column of ``rows``: ``column``, else "text", else the only one that holds strings; nulls are passed over.

    Rows with an instruction and an output, where no column is named and none is called "text", are instructions.

    Args:
        ending: what stands behind every answer to an instruction.
        where: what the rows came from, for errors.
        form: how to name a column of it, for errors.

    Raises:
        CalibrationError: there is no such column, several could be meant, or a row's is not a string.
    """
    name, instructions = "", False
    for number, row in enumerate(rows, start=1):
        if number == 1 and column is None:
            instructions = are_instructions(row)
        if instructions:
            yield instruction_text(row, f"row {number} of {where}") + ending
            continue
        if number == 1:
            strings = [key for key, value in row.items() if isinstance(value, str)]
            name = choose_column(list(row), strings, column, where, form)
        if name not in row:
            raise CalibrationError(
                f"row {number} of {where} has no '{name}', which earlier rows have; mend or remove that row"
            )
        value = row[name]
        if value is None:
            continue
        if not isinstance(value, str):
            raise CalibrationError(
                f"row {number} of {where} has a '{name}' that is not a string but {type(value).__name__}; "
                f"name a column of text as {form}"
            )
        yield value


def choose_column(names: list[str], strings: list[str], column: str | None, where: str, form: str) -> str:
    """The column to read of those called ``names``, where ``strings`` hold text.

    Raises:
        CalibrationError: ``column`` is not there, or none was named and several could be meant.
    """
    if column is not None:
        if column in names:
            return column
        raise CalibrationError(f"{where} has no column '{column}'; it has {_listed(names)}")
    if "text" in names:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise CalibrationError(
        f"{where} has no column 'text', and which of its columns to read is not clear; "
        f"name one as {form} (there are: {_listed(names)})"
    )


def hub_documents(name: str, config: str | None, split: str, column: str | None, ending: str = "") -> Iterator[str]:
    """The text of every row of a dataset on the hub, or in a local folder, downloaded only as far as it is read.

    Raises:
        CalibrationError: there is no such dataset, config, split or column, or it cannot be reached.
    """
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from huggingface_hub.constants import HF_HUB_OFFLINE

    where = f"the dataset '{name}'"
    if name in _PACKAGED_DATASETS_MODULES and not Path(name).is_dir():
        # To load_dataset these names are file readers, one of which unpickles what lies in the working folder.
        raise CalibrationError(f"'{name}' is a file format, not a dataset; name the file itself, or hub:OWNER/NAME")
    # A stream cannot take a slice such as train[:100], nor, offline, what an earlier download left in the cache.
    stream = "[" not in split and (Path(name).is_dir() or not HF_HUB_OFFLINE)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=stream)
        yield from texts_of(rows, column, f"split '{split}' of {where}", "hub:NAME:CONFIG:SPLIT:COLUMN", ending)
    except CalibrationError:
        raise
    except Exception as error:  # datasets lets out whatever its readers, the network and the hub raise
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise CalibrationError(
            f"split '{split}' of {where} cannot be read ({reason}); "
            "check its name and the connection, or name a local text file"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # nested too deeply
                raise CalibrationError(f"line {number} of {path} is not JSON ({error}); mend or remove it") from error
            yield _row(row, path, number)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """An array of rows; or JSON Lines under the other name, which is common."""
    content = path.read_text(encoding="utf-8-sig")
    if not content.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON ({error}); mend it or write it again") from error
    for number, row in enumerate(rows, start=1):
        yield _row(row, path, number)


def _row(row: Any, path: Path, number: int) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    if isinstance(row, dict):
        return row
    raise CalibrationError(
        f'row {number} of {path} is {type(row).__name__}; rows have to be objects such as {{"text": ...}}'
    )


def _parquet_documents(path: Path, column: str | None, ending: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [field.name for field in schema if _is_text(field.type)]
            if column is None and are_instructions(schema.names):
                wanted = [name for name in ("instruction", "input", "output") if name in schema.names]
            else:
                column = choose_column(schema.names, strings, column, str(path), f"{path}:COLUMN")
                wanted = [column]
            batches = file.iter_batches(batch_size=1024, columns=wanted)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from texts_of(rows, column, str(path), f"{path}:COLUMN", ending)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CalibrationError(f"{path} is not a readable Parquet file ({reason}); write it again") from error


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _not_utf8(path: Path, error: UnicodeDecodeError) -> CalibrationError:
    return CalibrationError(f"{path} is not UTF-8 text (byte {error.start} of what was read); convert it to UTF-8")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
